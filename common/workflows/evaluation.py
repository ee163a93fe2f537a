"""The handler that measures a bundle on a labelled cohort, and the baselines beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.transforms import Orientation
from numpy.typing import NDArray
from torch import Tensor

from ..cohorts.table import read_cohort
from ..detection.fingerprint import Fingerprint
from ..detection.method import foreground_of
from ..detection.volume import volume_mean
from ..files import replacing
from ..images.check import voxel_volume_ml
from ..metrics import DetectionMetrics, intensity_threshold
from ..metrics.baselines import DIRECTIONS, Direction, HealthyBaselines
from ..metrics.paper_slices import PaperSlices
from ..outputs import check_result, input_files, replicates_path
from ..results.case import versions
from ..transforms.load import load_lesion
from ..transforms.postprocess import intensity_unit, intensity_zero, to_input_grid
from .engines import DetectionEvaluator, cases, method_scores
from .inference import said
from .run_time import CaseTime, RunTime


@dataclass(frozen=True)
class LabelledCase:
    """A case as it is measured: on its own grid, turned to RAS so that slices are axial; (C, H, W, D) on the CPU."""

    subject: str
    site: str
    image: Tensor  # in [0, 1], 0 outside the foreground
    unit: Tensor  # (C, 1, 1, 1) or (C, H, W, D), the intensity that 1 stands for, from `zero`
    zero: Tensor  # (C, 1, 1, 1), the intensity that 0 stands for
    brain: Tensor  # (1, H, W, D) bool
    lesion: Tensor | None  # (H, W, D) bool
    voxel_ml: float
    pixel_mm2: float  # area of a voxel in an axial slice
    prepared: Tensor  # (C, H', W', D') in [0, 1], as a network sees it
    from_prepared: Callable[[Tensor], Tensor]  # brings maps (N, H', W', D') from there to the grid of the others


def labelled_case(batch: Mapping[str, Any]) -> LabelledCase:
    """From what the preprocessing makes of an item of a cohort. Raises UADError where the lesion mask does not fit."""
    unit = _ras(MetaTensor(intensity_unit(batch), affine=batch["brain"].affine))
    brain, zero = _ras(batch["brain"]) > 0, intensity_zero(batch)
    return LabelledCase(
        subject=str(batch["subject"]),
        site=str(batch.get("site", "")),
        image=((_ras(batch["input"]) - zero) / unit).clamp(0, 1) * brain,
        unit=unit,
        zero=zero,
        brain=brain,
        lesion=_ras(load_lesion(batch["lesion"], batch["brain"]))[0] > 0 if batch.get("lesion") else None,
        voxel_ml=voxel_volume_ml(batch["brain"]),
        pixel_mm2=float(_oriented(batch["brain"]).pixdim[:2].prod()),
        prepared=batch["image"].as_tensor().cpu(),
        from_prepared=lambda anomaly_map: _ras(to_input_grid(anomaly_map, batch)),
    )


class BaselineMetrics:
    """Metrics of the baselines that cost nothing: the intensity, and what is seen beside healthy brains.

    Args:
        modalities: of the images; with several the intensity of each is a baseline.
        healthy: fitted on healthy training subjects, or None.
    """

    def __init__(self, modalities: Sequence[str], healthy: HealthyBaselines | None = None) -> None:
        self.baselines: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}
        for direction, (channel, modality) in product(DIRECTIONS, enumerate(modalities)):
            name = f"intensity_{direction}_{modality}" if len(modalities) > 1 else f"intensity_{direction}"
            self.baselines[name] = partial(_intensity, channel=channel, direction=direction)
        self.of_prepared = {} if healthy is None else healthy.atlases
        if healthy is not None:
            self.baselines["mean_healthy_image"] = healthy.mean_image
        self.metrics = self._none_yet()

    def _none_yet(self) -> dict[str, DetectionMetrics]:
        return {name: DetectionMetrics() for name in (*self.baselines, *self.of_prepared)}

    def taken(self) -> dict[str, DetectionMetrics]:
        """The metrics of the subjects that were added, by the names of the baselines; forgets them."""
        taken, self.metrics = self.metrics, self._none_yet()
        return taken

    def update(self, case: LabelledCase) -> None:
        """Add a case."""
        maps = {name: baseline(case.image, case.brain) for name, baseline in self.baselines.items()}
        foreground = foreground_of(case.prepared[None])[0]
        for name, baseline in self.of_prepared.items():
            maps[name] = case.from_prepared(baseline(case.prepared, foreground)).clamp(min=0) * case.brain
        for name, anomaly_map in maps.items():
            self.metrics[name].update(
                case.subject, anomaly_map[0], case.lesion, case.brain[0], voxel_ml=case.voxel_ml, site=case.site
            )

    def merge(self, others: Mapping[str, DetectionMetrics]) -> None:
        """Add the subjects of the same baselines, measured elsewhere."""
        for name, metrics in others.items():
            self.metrics[name].merge(metrics)

    def compute(self, seed: int) -> dict[str, dict[str, Any]]:
        """The metrics of each baseline."""
        return {name: metrics.compute(seed) for name, metrics in self.metrics.items()}


def _intensity(image: Tensor, brain: Tensor, channel: int, direction: Direction) -> Tensor:
    return intensity_threshold(image[channel : channel + 1], brain, direction)


def on_slices_of(case: LabelledCase, scores: Tensor, axis: int) -> NDArray[np.float64]:
    """Scores (D',) of the slices that the network has seen, for the axial slices of a case, (D,).

    An axial slice takes the mean of its brain's voxels, each of which has the score of the network's slice that it lies
    in, interpolated. One whose voxels lie in no slice with a score takes that of its neighbours.

    axis: of the network's slices. NaN stands for no score, but in one slice at least.
    """
    shape = [1, 1, 1, 1]
    shape[axis + 1] = -1
    known = scores.isfinite()
    values = torch.stack([torch.where(known, scores, 0), known.to(scores)]).view(2, *shape[1:])
    moved = case.from_prepared(values.expand(2, *case.prepared.shape[1:]).contiguous()).double() * case.brain
    total, weight = moved.sum(dim=(1, 2)).numpy()
    found = np.flatnonzero(weight > 0)
    return np.interp(np.arange(len(total)), found, total[found] / weight[found])


@dataclass(frozen=True)
class Measured:
    """What is kept of cases that were measured, which passes from one process to another. baselines: by their names."""

    threshold: float
    metrics: DetectionMetrics
    protocols: PaperSlices
    baselines: Mapping[str, DetectionMetrics]
    times: Sequence[CaseTime]


class Evaluate:
    """Metrics of a method, and of the baselines that cost nothing, on a labelled cohort, written as result.json.

    Slices and volumes are ranked by the map, and by the method's own image-level score where it has one. A score that
    takes passes through the network of its own is made after the map, and not counted in the run time.

    Args:
        result: path of the JSON.
        modalities: of the images, for the baselines.
        cohort: CSV, on whose healthy training subjects some baselines are fitted; without one these are left out.
        baselines: whether to measure any.
    """

    evaluator: DetectionEvaluator
    run_time: RunTime

    def __init__(
        self, result: str, modalities: Sequence[str] = (), cohort: str | None = None, baselines: bool = True
    ) -> None:
        self.result = Path(result)
        self.modalities = modalities
        self.cohort = cohort
        self.with_baselines = baselines
        self.threshold = float("nan")
        self.metrics = DetectionMetrics()
        self.protocols = PaperSlices()
        self.baselines: BaselineMetrics | None = None

    def attach(self, evaluator: DetectionEvaluator) -> None:
        """Add the handler to an evaluator of a labelled cohort, which knows network, weights and settings."""
        evaluator.add_event_handler(Events.STARTED, self.check)
        evaluator.add_event_handler(Events.STARTED, self.fit_baselines)
        self.attach_measurement(evaluator)
        evaluator.add_event_handler(Events.COMPLETED, self.finish)

    def attach_measurement(self, evaluator: DetectionEvaluator) -> None:
        """Add what measures each case, and no more."""
        self.evaluator = evaluator
        self.run_time = RunTime(evaluator.network.axis)
        self.run_time.attach(evaluator)
        evaluator.add_event_handler(Events.ITERATION_COMPLETED, self)

    def check(self) -> None:
        """Before the first subject: no result is written over an input. Raises OutputError."""
        data = getattr(getattr(self.evaluator.data_loader, "dataset", None), "data", ())
        inputs = [*input_files(data), self.evaluator.weights]
        check_result(self.result, inputs, "bundle", "weights_sha256")
        check_result(replicates_path(self.result), inputs, "replicates")

    def healthy_subjects(self) -> list[dict[str, Any]]:
        """A datalist of those that baselines are fitted on, empty where there are none. Raises CohortError."""
        wanted = self.with_baselines and self.cohort is not None
        return healthy_training_subjects(str(self.cohort), self.modalities) if wanted else []

    def fit_baselines(self) -> None:
        """Before the first subject. Raises CohortError, or what the preprocessing raises."""
        prepare: Any = self.evaluator.preprocessing
        self.use_baselines(fit_healthy_baselines(self.healthy_subjects(), prepare))

    def use_baselines(self, healthy: HealthyBaselines | None) -> None:
        """Measure the baselines, if any are wanted, with those that have seen healthy subjects."""
        if self.with_baselines:
            self.baselines = BaselineMetrics(self.modalities, healthy)

    def __call__(self, engine: Engine) -> None:
        """Add the subjects of the batch."""
        for batch, output in cases(engine):
            case = labelled_case(batch)
            self.threshold = output["threshold"]
            anomaly_map = _ras(output["anomaly_map"])[0]
            reconstruction = (_ras(output["reconstruction"]) - case.zero * case.brain) / case.unit
            network = self.evaluator.network
            scores = method_scores(network, output, separate=True)
            self.metrics.update(
                case.subject,
                anomaly_map,
                case.lesion,
                case.brain[0],
                threshold=self.threshold,
                image=case.image,
                reconstruction=reconstruction,
                segmentation=_ras(output["segmentation"])[0],
                method_slice_scores=None if scores is None else on_slices_of(case, scores, network.axis),
                method_score=volume_mean(scores),
                voxel_ml=case.voxel_ml,
                site=case.site,
            )
            self.protocols.update(
                anomaly_map.numpy(),
                None if case.lesion is None else case.lesion.numpy(),
                case.brain[0].numpy(),
                case.image.numpy(),
                reconstruction.numpy(),
                case.pixel_mm2,
            )
            if self.baselines is not None:
                self.baselines.update(case)

    def add(self, measured: Measured) -> None:
        """Add cases that were measured in another process, in the order of the cohort."""
        self.threshold = measured.threshold
        self.metrics.merge(measured.metrics)
        self.protocols.merge(measured.protocols)
        self.run_time.times.extend(measured.times)
        if self.baselines is not None:
            self.baselines.merge(measured.baselines)

    def finish(self) -> None:
        """Compute, and write the result."""
        network = self.evaluator.network
        seed, calibration = network.seed, network.calibration
        fingerprint = Fingerprint.of(network, self.evaluator.preprocessing, self.evaluator.weights)
        measured = self.metrics.compute(seed)
        lists = {name: measured.pop(name) for name in ("curves", "slice_scores")}
        result = {
            **measured,
            "bundle": self.evaluator.bundle,
            "threshold": self.threshold,
            "threshold_origin": calibration.origin(self.threshold),
            "run_time": self.run_time.result() | {"engine": self.evaluator.engine},
            **fingerprint.record(),
            "fingerprint": fingerprint.digest,
            "warnings": said(fingerprint.calibration_warning(calibration.settings)),
            "versions": versions(),
            "protocols": self.protocols.compute(),
            **({} if self.baselines is None else {"baselines": self.baselines.compute(seed)}),
            **lists,
        }
        write_result(result, self.result)


class MeasureCases(Evaluate):
    """Measures cases for another process, which joins them, fits the baselines, and writes the result."""

    def attach(self, evaluator: DetectionEvaluator) -> None:
        """Add the handler to an evaluator."""
        self.attach_measurement(evaluator)

    def taken(self) -> Measured:
        """What was measured since this was asked the last time."""
        baselines = {} if self.baselines is None else self.baselines.taken()
        found = Measured(self.threshold, self.metrics, self.protocols, baselines, self.run_time.times)
        self.metrics, self.protocols, self.run_time.times = DetectionMetrics(), PaperSlices(), []
        return found


def write_result(result: Mapping[str, Any], path: Path) -> None:
    """Write a result as JSON, an undefined number as null; its bootstrap replicates into a file of their own beside."""
    kept = {name: value for name, value in result.items() if name != "replicates"}
    if "baselines" in result:
        kept["baselines"] = {
            key: {name: value for name, value in found.items() if name != "replicates"}
            for key, found in result["baselines"].items()
        }
    if "replicates" in result:  # first: a result is never without those that belong to it
        of_all = {key: found["replicates"] for key, found in result.get("baselines", {}).items()}
        replicates = {"replicates": result["replicates"], **({"baselines": of_all} if of_all else {})}
        _write_json(replicates, replicates_path(path), indent=None)
    _write_json(kept, path, indent=2)


def _write_json(content: Mapping[str, Any], path: Path, indent: int | None) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=indent, allow_nan=False) + "\n", encoding="utf-8")


def read_result(path: Path) -> dict[str, Any]:
    """What `write_result` wrote, without the replicates of baselines. Raises OSError or ValueError."""
    result = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(result, dict) and "replicates" not in result and replicates_path(path).is_file():
        result["replicates"] = json.loads(replicates_path(path).read_text(encoding="utf-8"))["replicates"]
    return result


def _oriented(volume: MetaTensor) -> MetaTensor:
    return cast(MetaTensor, Orientation("RAS", labels=None)(volume))


def _ras(volume: MetaTensor) -> Tensor:
    return _oriented(cast(MetaTensor, volume.to(torch.float32))).as_tensor().cpu()


def healthy_training_subjects(cohort: str | Path, modalities: Sequence[str]) -> list[dict[str, Any]]:
    """A datalist of the subjects that baselines may see, empty where the cohort has none. Raises CohortError."""
    return read_cohort(cohort, modalities, "train", healthy=True, allow_empty=True)


def fit_healthy_baselines(
    data: Sequence[dict[str, Any]], transform: Callable[[dict[str, Any]], dict[str, Any]]
) -> HealthyBaselines | None:
    """The baselines that have seen prepared healthy training subjects; None where the cohort has none."""
    if not data:
        return None
    return HealthyBaselines.fit((healthy_volume(transform(item)) for item in data), len(data))


def healthy_volume(prepared: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """What baselines see of a prepared subject: image (C, H, W, D) in [0, 1] and foreground (1, H, W, D) bool."""
    image = prepared["image"].as_tensor()
    return image, foreground_of(image[None])[0]
