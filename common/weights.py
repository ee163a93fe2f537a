"""Weights files: safe to load, half the size, never half-written."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from .errors import BundleError
from .files import replacing


def load_weights(path: str | Path | None) -> dict[str, Any]:
    """Read a state dict onto the CPU, tensors only. Raises BundleError."""
    if path is None or not Path(path).is_file():
        raise BundleError(path, "no weights", "train the bundle, or download its models/model.pt")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        cause = str(error).splitlines()[0]
        raise BundleError(path, f"not a weights file ({cause})", "download or train it again") from error


def save_weights(state_dict: Mapping[str, Tensor], path: str | Path) -> None:
    """Write a state dict, float32 in half precision (float64 buffers, such as thresholds, as they are)."""
    compact = {
        name: value.detach().cpu().half() if value.dtype == torch.float32 else value.detach().cpu()
        for name, value in state_dict.items()
    }
    with replacing(path) as temporary:
        torch.save(compact, temporary)


def sha256(path: str | Path) -> str:
    """Hexadecimal digest of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
