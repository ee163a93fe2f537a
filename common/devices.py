"""Where networks run: on a device that this machine has."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from .errors import SettingError

M = TypeVar("M", bound=nn.Module)


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
