"""The handler that fits the calibration of a bundle on healthy subjects."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from torch.utils.data import DataLoader, Dataset

from ..detection.fingerprint import of_map
from ..detection.method import foreground_of, top_mean
from ..detection.normalisation import HealthyMap
from ..errors import CohortError
from ..files import replacing
from ..weights import load_weights, save_weights
from .engines import DetectionEvaluator, cases

BATCH_SIZE = 16  # slices at a time
RESAMPLES, SEED = 1000, 0  # of the subjects, for the interval of the threshold
GRID_VALUES = 2000  # quantiles that stand for the values of a brain in these resamples


class Calibrate:
    """Fit the calibration on the healthy subjects that pass, and write it into the weights.

    What is fitted: the healthy atlas and the scales of the normalisation, where the network has one; the threshold; the
    scores of the healthy. All on the network's grid, without postprocessing, so that every brain counts alike whatever
    the grid of its scan. Per site (item `site` of the cohort) the share of the healthy brain above the threshold is
    said, each subject compared with the atlas of the others.

    All but this stays in the weights. The settings of network and preprocessing are stored with it, to know a run of
    other settings by.

    Args:
        output: the file that is written, by default the weights that were read.
        false_positive_share: share of the healthy brain voxels that may exceed the threshold.
        slices: of the same subjects, for a method that has a threshold of its own, which `fit_threshold(batches)` sets
            before the first of them passes.
    """

    def __init__(
        self, output: str | None = None, false_positive_share: float = 0.01, slices: Dataset | None = None
    ) -> None:
        self.output = output
        self.false_positive_share = false_positive_share
        self.slices = slices
        self.sites: list[str] = []
        self.values: list[np.ndarray] = []
        self.healthy: list[HealthyMap] = []

    def attach(self, evaluator: DetectionEvaluator) -> None:
        """Add the handler to an evaluator of healthy subjects that has no postprocessing."""
        self.network = evaluator.network
        self.weights = evaluator.weights
        self.preprocessing = evaluator.preprocessing
        evaluator.add_event_handler(Events.STARTED, self.start)
        evaluator.add_event_handler(Events.ITERATION_COMPLETED, self)
        evaluator.add_event_handler(Events.COMPLETED, self.finish)

    def start(self, engine: Engine) -> None:
        """Fit the method's own threshold."""
        if self.slices is not None:
            detector: Any = self.network.detector
            device = next(detector.parameters()).device
            detector.fit_threshold(batch["image"].to(device) for batch in DataLoader(self.slices, BATCH_SIZE))

    def __call__(self, engine: Engine) -> None:
        """Keep the maps of the batch."""
        for batch, output in cases(engine):
            if batch.get("lesion"):
                raise CohortError(batch["subject"], "has a lesion", "calibrate on healthy subjects only")
            anomaly_map, image = output["pred"][:1], output["image"]
            brain = foreground_of(image[None])[0]
            self.sites.append(str(batch.get("site", "")))
            if self.network.normalisation is None:
                self.values.append(anomaly_map[brain].float().cpu().numpy())
            else:
                self.healthy.append(self.network.normalisation.healthy_map(anomaly_map, brain))

    def finish(self, engine: Engine) -> None:
        """Fit, and write the weights."""
        network = self.network
        values = self.values if network.normalisation is None else network.normalisation.fit(self.healthy)
        threshold = threshold_of(values, self.false_positive_share)
        network.calibration.fit(
            threshold,
            self.false_positive_share,
            torch.stack([top_mean(torch.from_numpy(x)) for x in values]),
            of_map(network, self.preprocessing),
            threshold_interval(values, self.false_positive_share),
        )
        state = load_weights(self.weights)
        for part in ("calibration", "normalisation"):
            module = getattr(network, part)
            if module is not None:
                state.update({f"{part}.{name}": value for name, value in module.state_dict().items()})
        if self.slices is not None:
            state["detector.threshold"] = network.detector.threshold
        output = Path(self.output or self.weights)
        save_weights(state, output)
        self._report([float((x > threshold).mean()) for x in values], output)

    def _report(self, shares: list[float], output: Path) -> None:
        """Say, and write beside the weights, what the threshold does to the healthy of each site."""
        of_site = defaultdict(list)
        for site, share in zip(self.sites, shares, strict=True):
            of_site[site].append(share)
        sites = {
            site: {"subjects": len(x), "healthy_share": float(np.mean(x)), "worst_healthy_share": max(x)}
            for site, x in of_site.items()
        }
        low, high = self.network.calibration.threshold_interval.tolist()
        report = {"threshold": float(self.network.calibration.threshold), "interval": [low, high], "sites": sites}
        with replacing(output.with_suffix(".calibration.json")) as temporary:
            temporary.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        print(f"threshold {report['threshold']:.4g}, 95 % interval {low:.4g} to {high:.4g}")
        for site, row in sites.items():
            text = f"{row['healthy_share']:.2%} of a healthy brain above it, at most {row['worst_healthy_share']:.2%}"
            print(f"{site or 'all'}: {row['subjects']} subjects, {text}")


def threshold_of(values: list[np.ndarray], share: float) -> float:
    """The value that this share of all values of the subjects (each (n,)) exceed."""
    return float(np.quantile(np.concatenate(values), 1 - share))


def threshold_interval(values: list[np.ndarray], share: float) -> tuple[float, float]:
    """95 % of the thresholds of resampled subjects."""
    grids = np.stack([np.quantile(x, np.linspace(0, 1, GRID_VALUES)) for x in values])
    draws = np.random.default_rng(SEED).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile([np.quantile(grids[draw], 1 - share) for draw in draws], (0.025, 0.975))
    return float(low), float(high)
