"""The evaluator of the bundles: errors keep their type."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from ignite.engine import Engine
from monai.engines import SupervisedEvaluator

from ..errors import UADError
from ..images.check import root_cause, typed_errors


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
