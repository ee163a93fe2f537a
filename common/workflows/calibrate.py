"""The calibration of a bundle on healthy subjects: whose scans count, and the handler that fits it."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from torch.utils.data import DataLoader, Dataset

from ..detection.fingerprint import of_map
from ..detection.method import foreground_of, top_mean
from ..detection.normalisation import ATLAS_SUBJECTS, HealthyMap
from ..errors import BundleError, CohortError, OutputError
from ..files import replacing
from ..outputs import Inputs, check_file, is_result
from ..weights import load_weights, save_weights
from .engines import DetectionEvaluator, cases

BATCH_SIZE = 16  # slices at a time
RESAMPLES, SEED = 1000, 0  # of the subjects, for the interval of the threshold
GRID_VALUES = 2000  # quantiles that stand for the values of a brain in these resamples
MIN_SUBJECTS = 4  # of fewer the interval of the threshold means nothing
REPORT_KEYS = ("threshold", "interval", "sites")


def healthy_cases(items: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], str]:
    """The items of a datalist to calibrate on, and in words which they are.

    Those without a lesion; where some of them are of the split `val`, these, and those of no split.

    Raises CohortError where they are fewer than `MIN_SUBJECTS`.
    """
    healthy = [item for item in items if not item.get("lesion")]
    has_val = any(item.get("split") == "val" for item in healthy)
    chosen = [item for item in healthy if not has_val or item.get("split", "val") == "val"]
    number = f"{len(chosen)} healthy {'subject' if len(chosen) == 1 else 'subjects'}"
    said = f"{number} of the split val" if has_val else number
    if len(chosen) < MIN_SUBJECTS:
        fact = f"{said}, too few: how much the threshold depends on who they are could not be said"
        source = items[0]["image"] if len(items) == 1 else f"{len(items)} scans"
        raise CohortError(source, fact, f"give the scans of at least {MIN_SUBJECTS} healthy subjects")
    left_out = len(items) - len(healthy)
    return chosen, said + (f"; {left_out} with a lesion left out" if left_out else "")


def check_calibrated(output: Path, inputs: Iterable[str | Path]) -> None:
    """Refuse to write calibrated weights over what is read, or over what is no earlier result. Raises OutputError."""
    Inputs(inputs).check([output, report_path(output)])
    check_file(output, _is_calibrated(output), "a file of calibrated weights")
    check_file(report_path(output), is_result(report_path(output), *REPORT_KEYS), "the report of a calibration")


def report_path(weights: Path) -> Path:
    """Where the calibration of a weights file is said for people."""
    return weights.with_suffix(".calibration.json")


def _is_calibrated(path: Path) -> bool:
    try:
        return "calibration.threshold" in load_weights(path)
    except BundleError:
        return False


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
        self.images: dict[str, str] = {}
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
            self._check_new(batch)
            anomaly_map, image = output["pred"][:1], output["image"]
            brain = foreground_of(image[None])[0]
            self.sites.append(str(batch.get("site", "")))
            if self.network.normalisation is None:
                self.values.append(anomaly_map[brain].float().cpu().numpy())
            else:
                change = output["pred"][1:] - image.to(output["pred"])
                self.healthy.append(self.network.normalisation.healthy_map(anomaly_map, brain, change))

    def _check_new(self, batch: Mapping[str, Any]) -> None:
        """Copies of one image would make the interval narrower than it is."""
        if (image := batch.get("image_sha256")) is not None:
            first = self.images.setdefault(image, batch["subject"])
            if first != batch["subject"]:
                raise CohortError(batch["subject"], f"is the same image as {first}", "give each subject once")

    def finish(self, engine: Engine) -> None:
        """Fit, and write the weights. Raises OutputError; BundleError where no threshold would mean anything."""
        network = self.network
        keeps_atlas = network.normalisation is not None and network.normalisation.keeps_atlas(len(self.healthy))
        values = self.values if network.normalisation is None else network.normalisation.fit(self.healthy)
        threshold = threshold_of(values, self.false_positive_share)
        if not threshold > 0:  # a map is never below 0, so that all of a brain would be above it
            fact = f"of the healthy maps, {1 - self.false_positive_share:g} of all values are at most {threshold:g}"
            raise BundleError(self.weights, fact, "train it on, or calibrate with a smaller false_positive_share")
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
        report = self._report([float((x > threshold).mean()) for x in values])
        try:
            with replacing(report_path(output)) as temporary:
                temporary.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
                save_weights(state, output)
        except (OSError, RuntimeError) as error:  # the latter is how torch says that it cannot write
            cause = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise OutputError(output, f"cannot be written ({cause})", "choose another place") from error
        self._say(report, keeps_atlas)

    def _report(self, shares: list[float]) -> dict[str, Any]:
        """What the threshold does to the healthy of each site."""
        of_site = defaultdict(list)
        for site, share in zip(self.sites, shares, strict=True):
            of_site[site].append(share)
        sites = {
            site: {"subjects": len(x), "healthy_share": float(np.mean(x)), "worst_healthy_share": max(x)}
            for site, x in of_site.items()
        }
        low, high = self.network.calibration.threshold_interval.tolist()
        return {"threshold": float(self.network.calibration.threshold), "interval": [low, high], "sites": sites}

    def _say(self, report: Mapping[str, Any], keeps_atlas: bool) -> None:
        subjects, (low, high) = len(self.sites), report["interval"]
        print(f"threshold {report['threshold']:.4g}, 95 % interval {low:.4g} to {high:.4g}")
        for site, row in report["sites"].items():
            text = f"{row['healthy_share']:.2%} of a healthy brain above it, at most {row['worst_healthy_share']:.2%}"
            print(f"{site or 'all'}: {row['subjects']} subjects, {text}")
        if keeps_atlas:
            print(
                f"{subjects} subjects are too few for a healthy atlas, which needs {ATLAS_SUBJECTS}: the atlas of the "
                "weights is kept; the threshold, the scores and the scales of the healthy are those of these subjects"
            )
        if subjects < ATLAS_SUBJECTS:
            print(f"with {subjects} subjects the threshold is uncertain by the interval, and the interval is rough too")


def threshold_of(values: list[np.ndarray], share: float) -> float:
    """The value that this share of all values of the subjects (each (n,)) exceed."""
    return float(np.quantile(np.concatenate(values, dtype=np.float64), 1 - share))


def threshold_interval(values: list[np.ndarray], share: float) -> tuple[float, float]:
    """95 % of the thresholds of resampled subjects."""
    grids = np.stack([np.quantile(x.astype(np.float64), np.linspace(0, 1, GRID_VALUES)) for x in values])
    draws = np.random.default_rng(SEED).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile([np.quantile(grids[draw], 1 - share) for draw in draws], (0.025, 0.975))
    return float(low), float(high)
