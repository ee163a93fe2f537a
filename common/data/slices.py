"""Slices of prepared volumes, and their cached latents: what the 2D methods train on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from monai.utils import convert_to_tensor
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..networks.latent_space import LatentSpace


class SliceDataset(Dataset):
    """All slices with enough foreground of all volumes, prepared once and kept in memory as float16.

    An item is `image` (C, H, W) float32 and `foreground` (1, H, W) bool.

    Args:
        data: MONAI datalist of volumes.
        transform: brings an item of it to `image` (C, H, W, D), all of one H and W.
        axis: spatial axis along which slices are taken.
        min_foreground: slices with fewer foreground pixels are left out; the tip of a brain teaches little.
        augmentation: MONAI dictionary transform of an item, drawn anew each time.
    """

    def __init__(
        self,
        data: Sequence[dict[str, Any]],
        transform: Callable[[dict[str, Any]], dict[str, Any]],
        axis: int = 2,
        min_foreground: int = 1,
        augmentation: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
    ) -> None:
        volumes = []
        for item in tqdm(data, desc="prepare"):
            slices = transform(item)["image"].as_tensor().movedim(axis + 1, 0)
            enough = (slices > 0).any(dim=1).flatten(1).sum(dim=1) >= min_foreground
            volumes.append(slices[enough].half())
        self.images = torch.cat(volumes)
        self.augmentation = augmentation

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image = self.images[index].float()
        item = {"image": image, "foreground": (image > 0).any(dim=0, keepdim=True)}
        if self.augmentation is None:
            return item
        # MONAI's transforms return MetaTensors, whose affines after a flip do not collate
        return {key: convert_to_tensor(value, track_meta=False) for key, value in self.augmentation(item).items()}


class LatentDataset(Dataset):
    """The latents' posterior of slices, computed once: `mean` and `std` (C_z, h, w), `foreground` (1, H, W) bool.

    Args:
        slices: dataset with `image` and `foreground`.
        latent_space: the frozen autoencoder with its scale.
        copies: how often each slice is encoded, each time with its own augmentation.
        batch_size: slices encoded at a time.
    """

    def __init__(self, slices: Dataset, latent_space: LatentSpace, copies: int = 1, batch_size: int = 64) -> None:
        device = next(latent_space.parameters()).device
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        with torch.no_grad():
            for batch in chain.from_iterable(DataLoader(slices, batch_size) for _ in range(copies)):
                mean, std = latent_space.posterior(batch["image"].to(device))
                parts.append((mean.half().cpu(), std.half().cpu(), batch["foreground"]))
        self.mean, self.std, self.foreground = (torch.cat(part) for part in zip(*parts, strict=True))

    def __len__(self) -> int:
        return len(self.mean)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {
            "mean": self.mean[index].float(),
            "std": self.std[index].float(),
            "foreground": self.foreground[index],
        }


def prepare_slices(
    batch: dict[str, Tensor], device: torch.device, non_blocking: bool = False, **kwargs: Any
) -> tuple[Tensor, None, tuple, dict[str, Any]]:
    """`prepare_batch` of the trainers for `SliceDataset`: the objective is called with images and foreground."""
    image, foreground = (batch[key].to(device, non_blocking=non_blocking) for key in ("image", "foreground"))
    return image, None, (), {"foreground": foreground, **kwargs}


def prepare_latents(
    batch: dict[str, Tensor], device: torch.device, non_blocking: bool = False, **kwargs: Any
) -> tuple[None, None, tuple, dict[str, Any]]:
    """`prepare_batch` of the trainers for `LatentDataset`: the objective is called with the cached posterior."""
    mean, std, foreground = (batch[key].to(device, non_blocking=non_blocking) for key in ("mean", "std", "foreground"))
    return None, None, (), {"foreground": foreground, "posterior": (mean, std), **kwargs}
