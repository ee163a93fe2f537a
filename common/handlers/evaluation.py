"""Handlers that look at a whole cohort: calibration on healthy subjects, evaluation against lesion masks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.transforms import Orientation
from torch import Tensor

from ..engines import cases
from ..errors import CohortError
from ..files import replacing
from ..methods.base import foreground_of
from ..metrics import DetectionMetrics, MeanHealthyImage, intensity_threshold
from ..metrics.histograms import bin_index, bin_lower_edge
from ..networks.volume import VolumeDetector
from ..report.case import versions, volume_score
from ..transforms.load import load_lesion
from ..weights import load_weights, save_weights, sha256


class Calibrate:
    """Fit the calibration on the healthy subjects that pass, and write it into the weights.

    Args:
        network: whose `calibration` is fitted.
        weights: its file; only the calibration in it is replaced.
        false_positive_share: share of the healthy brain voxels that may exceed the threshold.
    """

    def __init__(self, network: VolumeDetector, weights: str, false_positive_share: float = 0.01) -> None:
        self.network = network
        self.weights = weights
        self.false_positive_share = false_positive_share
        self.histogram = np.zeros(int(bin_index(np.array([np.finfo(np.float32).max]))[0]) + 1, dtype=np.int64)
        self.scores: list[float] = []

    def attach(self, engine: Engine) -> None:
        """Add the handler to an evaluator of healthy subjects."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self.finish)

    def __call__(self, engine: Engine) -> None:
        """Count the values of the map in the brain."""
        for batch, output in cases(engine):
            if batch.get("lesion"):
                raise CohortError(batch["subject"], "has a lesion", "calibrate on healthy subjects only")
            anomaly_map, brain = output["anomaly_map"].as_tensor(), batch["brain"].as_tensor()
            values = anomaly_map[brain.to(anomaly_map.device)].float().cpu().numpy()
            self.histogram += np.bincount(bin_index(values), minlength=len(self.histogram))
            self.scores.append(volume_score(anomaly_map, brain.to(anomaly_map.device)))

    def finish(self, engine: Engine) -> None:
        """Fit, and replace the calibration in the weights file."""
        calibration = self.network.calibration
        threshold = exceeded_by(self.histogram, self.false_positive_share)
        calibration.fit(threshold, self.false_positive_share, torch.tensor(self.scores))
        state = load_weights(self.weights)
        state.update({f"calibration.{name}": value for name, value in calibration.state_dict().items()})
        save_weights(state, self.weights)


def exceeded_by(histogram: np.ndarray, share: float) -> float:
    """The smallest bin edge that at most this share of the counted values exceed or equal."""
    above = np.cumsum(histogram[::-1])[::-1]
    return float(bin_lower_edge(np.array([np.flatnonzero(above <= share * above[0])[0]]))[0])


class Evaluate:
    """Metrics of DESIGN section 7 of the method and of the baselines that cost nothing, written as result.json.

    Args:
        network: for the threshold and the seed.
        weights: its file, for the digest.
        bundle: name and version.
        result: path of the JSON.
        mean_image: fitted on healthy training subjects, or None.
    """

    def __init__(
        self,
        network: VolumeDetector,
        weights: str,
        bundle: str,
        result: str,
        mean_image: MeanHealthyImage | None = None,
    ) -> None:
        self.network = network
        self.weights = weights
        self.bundle = bundle
        self.result = Path(result)
        self.metrics = DetectionMetrics()
        self.baselines: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "intensity_dark": lambda image, brain: intensity_threshold(image, brain, "dark"),
            "intensity_bright": lambda image, brain: intensity_threshold(image, brain, "bright"),
        }
        if mean_image is not None:
            self.baselines["mean_healthy_image"] = mean_image
        self.baseline_metrics = {name: DetectionMetrics() for name in self.baselines}

    def attach(self, engine: Engine) -> None:
        """Add the handler to an evaluator of a labelled cohort."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self.finish)

    def __call__(self, engine: Engine) -> None:
        """Add the subjects of the batch, on their own grid, with axial slices."""
        for batch, output in cases(engine):
            unit = torch.tensor(np.asarray(batch["image"].meta["intensity_unit"], dtype=np.float32).ravel())
            unit = unit.view(-1, 1, 1, 1)
            brain = _ras(batch["brain"]) > 0
            image = (_ras(batch["input"]) / unit).clamp(0, 1) * brain
            lesion = _ras(load_lesion(batch["lesion"], batch["brain"]))[0] > 0 if batch.get("lesion") else None
            self.metrics.update(
                batch["subject"],
                _ras(output["anomaly_map"])[0],
                lesion,
                brain[0],
                threshold=self.network.calibration.threshold.item(),
                image=image,
                reconstruction=_ras(output["reconstruction"]) / unit,
            )
            for name, baseline in self.baselines.items():
                self.baseline_metrics[name].update(batch["subject"], baseline(image, brain)[0], lesion, brain[0])

    def finish(self, engine: Engine) -> None:
        """Compute, and write the result."""
        seed = self.network.seed
        result = {
            "bundle": self.bundle,
            **self.metrics.compute(seed),
            "baselines": {name: metrics.compute(seed) for name, metrics in self.baseline_metrics.items()},
            "threshold": self.network.calibration.threshold.item(),
            "weights_sha256": sha256(self.weights),
            "seed": seed,
            "versions": versions(),
        }
        with replacing(self.result) as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _ras(volume: MetaTensor) -> Tensor:
    return cast(MetaTensor, Orientation("RAS", labels=None)(volume.to(torch.float32))).as_tensor().cpu()


def fit_mean_image(
    data: Sequence[dict[str, Any]], transform: Callable[[dict[str, Any]], dict[str, Any]]
) -> MeanHealthyImage | None:
    """The mean healthy image of prepared training subjects; None where the cohort has none."""
    if not data:
        return None

    def volumes() -> Iterator[tuple[Tensor, Tensor]]:
        for item in data:
            image = transform(item)["image"].as_tensor()
            yield image, foreground_of(image[None])[0]

    return MeanHealthyImage().fit(volumes())
