"""The task of the inference workflow: write each case."""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ignite.engine import Engine, Events
from monai.data import MetaTensor

from ..cohorts.bids import describe_outputs, write_description
from ..detection.fingerprint import Fingerprint, differences
from ..detection.reliability import UNRELIABLE
from ..detection.volume import volume_mean
from ..errors import DicomError, OutputError, SettingError
from ..images.check import source_name
from ..images.dicom import Series, choose_series
from ..outputs import case_place, check_places
from ..results.case import Case, record_path, write_case
from ..results.dicom import OBJECTS
from ..weights import digest
from .engines import DetectionEvaluator, cases, method_scores

INPUTS = ("image", "brain")


class SaveDetections:
    """Write the outputs of each case, `write_case`, into `output_dir/<subject>/`.

    Those of a BIDS dataset go where and by the names that a derivative dataset wants.

    Args:
        output_dir: made if it is not there.
        dicom: for cases from DICOM write the segmentation and the map as DICOM objects too.
        force: write these for cases, too, whose result is unreliable.
        method_score: record the method's own image-level score also where it takes passes through the network of its
            own, which may take longer than the map; one that comes with the map is recorded anyway.

    `verdicts` holds what was found of each case that was written: `reliability` and `doubts`.
    """

    evaluator: DetectionEvaluator

    def __init__(self, output_dir: str, dicom: bool = False, force: bool = False, method_score: bool = False) -> None:
        self.output_dir = Path(output_dir)
        self.dicom = dicom
        self.force = force
        self.method_score = method_score
        self.verdicts: dict[str, dict[str, Any]] = {}
        self._started = 0.0

    def attach(self, evaluator: DetectionEvaluator) -> None:
        """Add the handler to an evaluator, which knows network, weights and settings, for the record."""
        self.evaluator = evaluator
        evaluator.add_event_handler(Events.STARTED, self._check)
        evaluator.add_event_handler(Events.STARTED, lambda _: self.warnings)
        evaluator.add_event_handler(Events.GET_BATCH_STARTED, self._start)
        evaluator.add_event_handler(Events.ITERATION_COMPLETED, self)

    def _check(self, engine: Engine) -> None:
        """No result is written over an input. Raises OutputError."""
        dataset = getattr(engine.state.dataloader, "dataset", None)
        check_places(self.output_dir, getattr(dataset, "data", ()), self.evaluator.bundle, [self.evaluator.weights])

    def _start(self, engine: Engine) -> None:
        dataset = getattr(engine.state.dataloader, "dataset", None)
        self._started = time.perf_counter() - getattr(dataset, "seconds", 0.0)  # that were spent on the case before

    @functools.cached_property
    def fingerprint(self) -> Fingerprint:
        """Of all cases. Raises BundleError where the weights cannot be read."""
        return Fingerprint.of(self.evaluator.network, self.evaluator.preprocessing, self.evaluator.weights)

    @functools.cached_property
    def warnings(self) -> list[str]:
        """What holds for all cases; it is said on stderr too, once. Ask for it when the weights are loaded."""
        return said(self.fingerprint.calibration_warning(self.evaluator.network.calibration.settings))

    def _identity(self, inputs: Mapping[str, str], series: object) -> dict[str, Any]:
        """What tells one result from another, by the digests of its inputs."""
        found = self.fingerprint.record()
        found["settings"] = found["settings"] | ({"series": series} if series else {})
        return {"bundle": self.evaluator.bundle, "input_sha256": inputs, **found, **self._segmentation()}

    def _segmentation(self) -> dict[str, Any]:
        if self.evaluator.postprocessing is None:
            raise SettingError("SaveDetections", "the evaluator has no postprocessing", "give it one")
        return {name: self.evaluator.postprocessing.segmentation[name] for name in ("threshold", "min_volume_ml")}

    def finished(self, item: Mapping[str, Any]) -> dict[str, Any] | None:
        """The record of the case of an item of a datalist, if all that is wanted of it has been written.

        Raises OutputError where it is another case.
        """
        path = record_path(*case_place(self.output_dir, item, self.evaluator.bundle))
        if not path.is_file():
            return None
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            return None
        inputs = {key: digest(item[key]) for key in INPUTS if key in item}
        identity = self._identity(inputs, item.get("series"))
        before = {key: record[key] for key in identity if key in record}
        if others := differences(before, identity, "not recorded"):
            fact = f"holds another result ({'; '.join(others)})"
            raise OutputError(path.parent, fact, "choose another output folder", overwrite="")
        missing = [name for name in OBJECTS if not (path.parent / name).is_file()]
        if (missing and self._wants_dicom(record)) or self._lacks_score(record):
            return None
        return record

    def _lacks_score(self, record: Mapping[str, Any]) -> bool:
        wanted = self.method_score and self.evaluator.network.detector.has_separate_score
        return wanted and record.get("method_score") is None

    def _wants_dicom(self, result: Mapping[str, Any]) -> bool:
        return self.dicom and (self.force or result.get("reliability") != UNRELIABLE)

    def _withheld(self, subject: str, result: Mapping[str, Any]) -> str | None:
        if not self.dicom or self._wants_dicom(result):
            return None
        return f"{subject}: no DICOM objects are written of an unreliable result, unless they are forced"

    def run_record(self, batch: Mapping[str, Any], device: object) -> dict[str, Any]:
        """What a record says of the run of a case: all that its result depends on."""
        inputs = {key: batch[f"{key}_sha256"] for key in INPUTS if f"{key}_sha256" in batch}
        return {
            **self._identity(inputs, batch.get("series")),
            "fingerprint": self.fingerprint.digest,
            "warnings": self.warnings,
            "brain_mask": batch["brain_source"],
            "device": str(device),
            "engine": self.evaluator.engine,
        }

    def result(self, output: Mapping[str, Any]) -> dict[str, Any]:
        """The volume in numbers, with the method's own score of it, None where there is none or it is not asked for."""
        scores = method_scores(self.evaluator.network, output, self.method_score)
        return {**output["result"], "method_score": volume_mean(scores)}

    def __call__(self, engine: Engine) -> None:
        """Write the cases of the batch. Raises OutputError, and after the rest DicomError for DICOM objects."""
        for batch, output in cases(engine):
            result = self.result(output)
            case = Case(
                subject=str(batch["subject"]),
                image=batch["input"],
                brain=batch["brain"],
                anomaly_map=output["anomaly_map"],
                reconstruction=output["reconstruction"],
                segmentation=output["segmentation"],
                to_mni=np.asarray(batch["to_mni"]) if "to_mni" in batch else None,
                find_series=partial(source_series, batch["input"]) if self._wants_dicom(result) else None,
            )
            run = self.run_record(batch, engine.state.device) | {  # type: ignore[attr-defined]
                "warnings": [*self.warnings, *said(self._withheld(case.subject, result))],
                "image": str(Path(source_name(batch["input"])).absolute()),  # for the report, which shows the scan
                "seconds": round(time.perf_counter() - self._started, 3),
            }
            folder, entities = case_place(self.output_dir, batch, self.evaluator.bundle)
            try:
                sidecars = None
                if entities is not None:
                    write_description(self.output_dir, self.evaluator.bundle, batch["dataset"])
                    sidecars = describe_outputs(self.evaluator.bundle, batch["sources"])
                failure = write_case(folder, entities, case, result, run, sidecars)
            except OSError as error:
                fact = f"cannot be written ({error.strerror or error})"
                raise OutputError(folder, fact, "choose another output folder, or make room in it") from error
            self.verdicts[case.subject] = {name: result[name] for name in ("reliability", "doubts")}
            if failure is not None:
                raise failure  # what was asked for is not all there


class KeepDetections(SaveDetections):
    """Keeps what is found in memory, in place of writing it: `found` are the items of the cases with their outputs."""

    def attach(self, evaluator: DetectionEvaluator) -> None:
        """Add the handler to an evaluator."""
        self.evaluator = evaluator
        self.found: list[tuple[dict[str, Any], dict[str, Any]]] = []
        evaluator.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Keep the cases of the batch."""
        self.found.extend(cases(engine))


def said(warning: str | None) -> list[str]:
    """The warning as a list, after it was written to stderr; empty for None."""
    if warning is None:
        return []
    print(f"Warning: {warning}", file=sys.stderr, flush=True)
    return [warning]


def source_series(image: MetaTensor) -> Series:
    """The DICOM series that an image was read from. Raises DicomError."""
    if uid := image.meta.get("series_uid"):
        return choose_series(source_name(image), str(uid))
    raise DicomError(
        source_name(image),
        "no DICOM series, which DICOM results would refer to",
        "give a DICOM folder",
        output_format="nifti",
    )
