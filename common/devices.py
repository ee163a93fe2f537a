"""Where networks run: on a device that this machine has, and with memory that is used again."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import TypeVar

import torch
from torch import Tensor, nn

from .errors import SettingError

M = TypeVar("M", bound=nn.Module)

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
MMAP_THRESHOLD, TRIM_THRESHOLD = 32 * 2**20, 256 * 2**20  # the first is the highest that glibc takes


def checked_device(name: str) -> torch.device:
    """The device of a name such as cpu, cuda, cuda:1 or mps. Raises SettingError where this machine has none."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SettingError(name, "is no device", "choose cpu, cuda, cuda:0, ..., or mps") from error
    remedy = "choose cpu"
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SettingError(name, "torch finds no GPU on this machine", f"{remedy}, or install a torch build for it")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SettingError(name, f"this machine has {torch.cuda.device_count()} GPU(s), counted from 0", remedy)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise SettingError(name, "torch finds no Apple GPU (MPS) on this machine", remedy)
    return device


def moved(module: M, device: torch.device) -> M:
    """The module, on the device; on MPS, which has no float64, buffers of that type stay on the CPU.

    These are the numbers of the calibration and of the preparation, which are read one by one.
    """
    if device.type != "mps":
        return module.to(device)
    return module._apply(lambda tensor: _unless_double(tensor, device))


def _unless_double(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.to(device)


def keep_freed_memory() -> None:
    """Let glibc keep large blocks that were freed for the next one who asks, where the environment says nothing else.

    By default it gives them back to Linux, which hands them out again page by page: a fifth of the CPU time of a
    network, whose layers all ask for such blocks. The memory that is needed at most stays the same.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # other C libraries need no such thing
        mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)
        mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD)
