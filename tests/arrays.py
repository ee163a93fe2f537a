"""Arrays that several tests need: those of the references, and slices that look like brains to the methods."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> dict[str, Tensor]:
    """The numbers of one file, `golden/<method>/<file>.npz`, by its method and file: "mad_ad/schedule"."""
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(value) for key, value in arrays.items() if value.dtype.kind in "biuf"}


def slices(batch: int = 3, channels: int = 1, size: int = 16) -> Tensor:
    """(batch, channels, size, size), values from 0.1 to 1; three rows and two columns are background."""
    image = torch.rand(batch, channels, size, size, generator=torch.Generator().manual_seed(1)) * 0.9 + 0.1
    image[..., :3, :] = 0
    image[..., -2:] = 0
    return image


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]
