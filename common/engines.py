"""What the bundles need beside MONAI's engines: bfloat16 on any device, and errors that keep their type."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import torch
from ignite.engine import Engine
from ignite.metrics import Average
from monai.engines import SupervisedEvaluator
from monai.inferers import SimpleInferer
from torch import Tensor, nn

from .errors import UADError
from .transforms.check import root_cause, typed_errors


class Bfloat16Inferer(SimpleInferer):
    """Calls the network under bfloat16 autocast; unlike the engines' `amp` also on the CPU, where it is 2 to 3 times
    faster on processors with bfloat16 instructions. Not for inference: maps stay in float32."""

    def __call__(self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The network's output, losses in float32."""
        device = next(network.parameters()).device.type if isinstance(network, nn.Module) else inputs.device.type
        with torch.autocast(device, torch.bfloat16):
            return network(inputs, *args, **kwargs)


class DetectionEvaluator(SupervisedEvaluator):
    """`SupervisedEvaluator` that raises a `UADError` as such, without the RuntimeErrors that MONAI wraps around it."""

    def run(self, global_epoch: int = 1) -> None:  # type: ignore[override]
        """Run over the data loader once."""
        with typed_errors():
            super().run(global_epoch)


def run_or_exit(evaluator: DetectionEvaluator) -> None:
    """Run; end the process with one line instead of a traceback where an input is to blame.

    For the `run` of a config: there MONAI would wrap any exception in RuntimeErrors, but lets SystemExit pass.
    """
    try:
        evaluator.run()
    except UADError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from None


def one_line_errors() -> None:
    """End the process with one line instead of a traceback where an object of a config cannot be made.

    For the `initialize` of a config: `run_or_exit` is called after that. Other errors keep their traceback.
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


def total_loss(losses: dict[str, Tensor], target: None) -> Tensor:
    """`loss_function` of the trainers: a training objective returns its losses itself."""
    return losses["loss"]


def mean_loss(key: str = "loss") -> Average:
    """Metric: mean of one of the objective's losses over the batches of an epoch."""
    return Average(output_transform=lambda output: output["pred"][key].item())


def is_lower(loss: float, best: float) -> bool:
    """`metric_cmp_fn` of the validation: of two losses the lower is better, where MONAI takes the higher for it."""
    return loss < best
