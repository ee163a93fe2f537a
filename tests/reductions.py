"""Finds reductions whose last bit is the library's: in float32, over more than two values, called by the package.

NumPy, PyTorch and SciPy add in an order that differs between their versions and processors, and NumPy 1 and 2
interpolate percentiles of float32 in another precision.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

SUMS = {"sum", "mean", "std", "var", "prod", "cumsum", "average"}
BY_VALUES = {"percentile", "quantile", "nanpercentile", "nanquantile", "histogram"}  # no argument makes these float64
COARSE = (np.float32, np.float16, torch.float32, torch.float16, torch.bfloat16)


@contextmanager
def coarse_reductions(package: str = "common") -> Iterator[set[str]]:
    """The places in a package, `module:line name`, that reduced coarse values while the block ran."""
    found: set[str] = set()

    def look(frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or not frame.f_globals.get("__name__", "").startswith("numpy"):
            return
        name, caller, given = frame.f_code.co_name.strip("_"), frame.f_back, frame.f_locals
        if name not in SUMS | BY_VALUES or caller is None or not _is_of(caller, package):
            return
        values = given.get("a")
        if isinstance(values, np.ndarray) and _is_coarse(values, given.get("dtype"), given.get("axis"), name):
            found.add(_place(caller, name))

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        with _TorchReductions(found, package):
            yield found
    finally:
        sys.setprofile(before)


class _TorchReductions(TorchFunctionMode):
    def __init__(self, found: set[str], package: str) -> None:
        super().__init__()
        self.found, self.package = found, package

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given, name, caller = kwargs or {}, getattr(func, "__name__", ""), sys._getframe(1)
        if name in SUMS | BY_VALUES and args and isinstance(args[0], torch.Tensor) and _is_of(caller, self.package):
            axis = given.get("dim", args[1] if len(args) > 1 and name in SUMS else None)
            if _is_coarse(args[0], given.get("dtype"), axis, name):
                self.found.add(_place(caller, name))
        return func(*args, **given)


def _is_coarse(values: Any, dtype: Any, axis: Any, name: str) -> bool:
    if (values.dtype if isinstance(values, torch.Tensor) else values.dtype.type) not in COARSE:
        return False
    if name in BY_VALUES:
        return True
    axes = range(values.ndim) if axis is None else np.atleast_1d(axis).tolist()
    return dtype in (None, *COARSE) and prod(values.shape[i] for i in axes) > 2  # the sum of two is the same both ways


def _is_of(frame: FrameType, package: str) -> bool:
    return f"{frame.f_globals.get('__name__', '')}.".startswith(f"{package}.")


def _place(frame: FrameType, name: str) -> str:
    return f"{frame.f_globals['__name__']}:{frame.f_lineno} {name}"
