"""Handlers of the inference workflow: load the weights, write each case, calibrate, evaluate."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events

from ..engines import cases
from ..networks.volume import VolumeDetector
from ..report.case import Case, write_case
from ..weights import load_into, sha256


class LoadWeights:
    """Load the bundle's weights, strictly, before the first case. Raises BundleError."""

    def __init__(self, network: VolumeDetector, path: str) -> None:
        self.network = network
        self.path = path

    def attach(self, engine: Engine) -> None:
        """Add the handler to an evaluator."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Load."""
        load_into(self.network, self.path)
        self.network.eval()


class SaveDetections:
    """Write the outputs of each case, `write_case`, into `output_dir/<subject>/`.

    Args:
        output_dir: made if it is not there.
        network: for the calibration and the seed.
        weights: its file, for the digest in run.json.
        bundle: name and version of the bundle, for run.json.
    """

    def __init__(self, output_dir: str, network: VolumeDetector, weights: str, bundle: str) -> None:
        self.output_dir = Path(output_dir)
        self.network = network
        self.weights = weights
        self.bundle = bundle
        self._started = 0.0
        self._digest = ""

    def attach(self, engine: Engine) -> None:
        """Add the handler to an evaluator."""
        engine.add_event_handler(Events.STARTED, self._read_digest)
        engine.add_event_handler(Events.GET_BATCH_STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def _read_digest(self, engine: Engine) -> None:
        self._digest = sha256(self.weights)  # once: the file is the same for all cases

    def _start(self, engine: Engine) -> None:
        self._started = time.perf_counter()

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
            )
            run = self._run(engine, batch)
            write_case(self.output_dir / case.subject, case, output["threshold"], self.network.calibration, run)

    def _run(self, engine: Any, batch: dict[str, Any]) -> dict[str, Any]:
        return {
            "bundle": self.bundle,
            "weights_sha256": self._digest,
            "input_sha256": sha256(batch["input"].meta["filename_or_obj"]),
            "seed": self.network.seed,
            "device": str(engine.state.device),
            "seconds": round(time.perf_counter() - self._started, 3),
        }
