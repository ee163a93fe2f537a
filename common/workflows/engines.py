"""The evaluator of the bundles: it loads the weights, a task takes what comes out, errors keep their type."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Protocol

import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedEvaluator
from monai.engines.utils import IterationEvents
from monai.inferers import Inferer
from monai.utils import convert_to_tensor
from torch import Tensor
from torch.utils.data import DataLoader

from ..detection.onnx_runtime import check_engine, describe_engine, use_engine
from ..detection.volume import VolumeDetector
from ..devices import checked_device, moved
from ..errors import UADError, one_line
from ..images.check import root_cause, typed_errors
from ..recorded import Recorded
from ..transforms.postprocess import Postprocessing
from ..weights import load_into


class Task(Protocol):
    """What is done with the cases: write them, measure them, calibrate on them."""

    def attach(self, evaluator: DetectionEvaluator) -> None:
        """Add handlers to the evaluator, whose network, weights, preprocessing and postprocessing the task may use."""


class DetectionEvaluator(SupervisedEvaluator):
    """Takes cases through the network of a bundle and its postprocessing, for a task.

    Raises a `UADError` as such, without the RuntimeErrors that MONAI wraps around it.

    Args:
        bundle: its key.
        device: where the network is moved to.
        val_data_loader: of prepared cases.
        network: gets its weights, strictly, before the first case; once, however often the evaluator runs.
        weights: their file.
        preprocessing: that of the cases, for its settings.
        task: is attached after the weights are.
        inferer: how the network is called.
        postprocessing: of each case; None for a task that takes the prediction itself.
        engine: what computes the networks, "torch" or, on the CPU, "onnxruntime".

    Raises what `check_engine` raises.
    """

    network: VolumeDetector

    def __init__(
        self,
        bundle: str,
        device: torch.device | str,
        val_data_loader: DataLoader,
        network: VolumeDetector,
        weights: str,
        preprocessing: Recorded,
        task: Task,
        inferer: Inferer | None = None,
        postprocessing: Postprocessing | None = None,
        engine: str = "torch",
    ) -> None:
        device = checked_device(str(device))
        if engine != "torch":
            check_engine(engine, network.detector, device)
        super().__init__(
            device=device,
            val_data_loader=val_data_loader,
            network=moved(network, device),
            inferer=inferer,
            postprocessing=postprocessing,
        )
        self.bundle = bundle
        self.weights = weights
        self.preprocessing = preprocessing
        self.postprocessing = postprocessing
        self._engine = engine
        self._loaded = False
        self.add_event_handler(Events.STARTED, self.load)
        self.add_event_handler(IterationEvents.FORWARD_COMPLETED, self._keep_scores)
        task.attach(self)

    def load(self) -> None:
        """Put the weights into the network, the first time. Raises BundleError."""
        if not self._loaded:
            load_into(self.network, self.weights)
            self.network.eval()
            if self._engine != "torch":
                use_engine(self._engine, self.network.detector)
            self._loaded = True

    @property
    def engine(self) -> str:
        """What computes the networks, with its version where it is not torch, whose version is recorded anyway."""
        return describe_engine(self._engine)

    def _keep_scores(self) -> None:
        """Those that come with the map, beside the prediction, as `slice_scores`."""
        if self.network.slice_scores is not None:
            self.state.output["slice_scores"] = self.network.slice_scores  # type: ignore[index,call-overload]

    def run(self, global_epoch: int = 1) -> None:  # type: ignore[override]
        """Run over the data loader once."""
        with typed_errors():
            super().run(global_epoch)


def method_scores(network: VolumeDetector, output: Mapping[str, Any], separate: bool) -> Tensor | None:
    """The method's own score of every slice of a case, (D,) on the CPU, NaN of those without foreground; or None.

    output: of the case: `slice_scores`, where they come with the map, and the prepared `image` (C, H, W, D).
    separate: whether scores are wanted, too, that take passes through the network of their own.
    """
    scores: Tensor | None = output.get("slice_scores")
    if scores is None and separate:
        found = network.score(output["image"][None])
        scores = None if found is None else found[0]
    return None if scores is None else convert_to_tensor(scores, track_meta=False).cpu()


def run_or_exit(evaluator: DetectionEvaluator) -> None:
    """Run; end the process with one line instead of a traceback where an input is to blame.

    For the `run` of a config: there MONAI would wrap any exception in RuntimeErrors, but lets SystemExit pass.
    """
    one_line(evaluator.run)()


def one_line_errors() -> None:
    """End the process with one line instead of a traceback where an object of a config cannot be made.

    For the `run` of a config, before `run_or_exit`, for which the objects are made: MONAI finds the modules of an
    exported bundle from there on, and not yet in `initialize`. Other errors keep their traceback.
    """
    if getattr(sys.excepthook, "__module__", "") == __name__:
        return
    others = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        cause = root_cause(error)
        if isinstance(cause, UADError):
            print(f"{type(cause).__name__}: {cause}", file=sys.stderr)
        else:
            others(kind, error, trace)

    sys.excepthook = hook


def cases(engine: Engine) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The items of an evaluator's last batch, each with its output."""
    batch: Any = engine.state.batch
    output: Any = engine.state.output
    return zip(batch, output, strict=True)
