"""Handlers of the inference workflow: load the weights, write each case."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ignite.engine import Engine, Events
from monai.data import MetaTensor

from ..data.bids import write_description
from ..data.dicom import Series, choose_series
from ..engines import cases
from ..errors import DicomError, OutputError
from ..networks.volume import VolumeDetector
from ..report.case import Case, record_path, write_case
from ..transforms.check import source_name
from ..transforms.pipeline import BrainPreprocessing
from ..weights import digest, load_into, sha256

INPUTS = ("image", "brain")


class LoadWeights:
    """Load the bundle's weights, strictly, before the first case; once, however often the evaluator runs.

    Raises BundleError.
    """

    def __init__(self, network: VolumeDetector, path: str) -> None:
        self.network = network
        self.path = path
        self._loaded = False

    def attach(self, engine: Engine) -> None:
        """Add the handler to an evaluator."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Load."""
        if not self._loaded:
            load_into(self.network, self.path)
            self.network.eval()
            self._loaded = True


class SaveDetections:
    """Write the outputs of each case, `write_case`, into `output_dir/<subject>/`.

    Those of a BIDS dataset go where and by the names that a derivative dataset wants.

    Args:
        output_dir: made if it is not there.
        network: for the calibration and the seed.
        weights: its file, for the digest in run.json.
        bundle: its key.
        preprocessing: for its settings, which the results depend on.
        dicom: for cases from DICOM write the segmentation and the map as DICOM objects too.
    """

    def __init__(
        self,
        output_dir: str,
        network: VolumeDetector,
        weights: str,
        bundle: str,
        preprocessing: BrainPreprocessing,
        dicom: bool = False,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.network = network
        self.weights = weights
        self.bundle = bundle
        self.dicom = dicom
        self.settings = preprocessing.settings
        self._started = 0.0
        self._weights_sha256 = ""

    def attach(self, engine: Engine) -> None:
        """Add the handler to an evaluator."""
        engine.add_event_handler(Events.GET_BATCH_STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def _start(self, engine: Engine) -> None:
        self._started = time.perf_counter()

    def _identity(self, inputs: Mapping[str, str], series: object) -> dict[str, Any]:
        """What tells one result from another, by the digests of its inputs."""
        if not self._weights_sha256:
            self._weights_sha256 = sha256(self.weights)  # once: the file is the same for all cases
        return {
            "bundle": self.bundle,
            "weights_sha256": self._weights_sha256,
            "input_sha256": inputs,
            "seed": self.network.seed,
            "settings": self.settings | ({"series": series} if series else {}),
        }

    def is_finished(self, item: Mapping[str, Any]) -> bool:
        """Whether the case of an item of a datalist has been written. Raises OutputError where it is another case."""
        path = record_path(*self._place(item))
        if not path.is_file():
            return False
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            return False
        inputs = {key: digest(item[key]) for key in INPUTS if key in item}
        identity = self._identity(inputs, item.get("series"))
        if others := [key for key, value in identity.items() if record.get(key) != value]:
            fact = f"holds a result with another {', '.join(others)}"
            raise OutputError(path.parent, fact, "choose another output folder", overwrite="")
        return True

    def _place(self, item: Mapping[str, Any]) -> tuple[Path, str | None]:
        if derivative := item.get("derivative"):
            path = self.output_dir / str(derivative)
            return path.parent, path.name
        return self.output_dir / str(item["subject"]), None

    def __call__(self, engine: Engine) -> None:
        """Write the cases of the batch."""
        for batch, output in cases(engine):
            case = Case(
                subject=str(batch["subject"]),
                image=batch["input"],
                brain=batch["brain"],
                anomaly_map=output["anomaly_map"],
                reconstruction=output["reconstruction"],
                segmentation=output["segmentation"],
                to_mni=np.asarray(batch["to_mni"]) if "to_mni" in batch else None,
                series=source_series(batch["input"]) if self.dicom else None,
            )
            inputs = {key: batch[f"{key}_sha256"] for key in INPUTS if f"{key}_sha256" in batch}
            run = {
                **self._identity(inputs, batch.get("series")),
                "image": str(Path(source_name(batch["input"])).absolute()),  # for the report, which shows the scan
                "brain_mask": batch["brain_source"],
                "device": str(engine.state.device),  # type: ignore[attr-defined]
                "seconds": round(time.perf_counter() - self._started, 3),
            }
            folder, entities = self._place(batch)
            try:
                write_case(folder, entities, case, output["threshold"], self.network.calibration, run)
                if entities is not None:
                    write_description(self.output_dir, self.bundle)
            except OSError as error:
                fact = f"cannot be written ({error.strerror or error})"
                raise OutputError(folder, fact, "choose another output folder, or make room in it") from error


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
