"""Slices of prepared volumes, and their cached latents: what the 2D methods train on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from monai.data import DataLoader as SeedingDataLoader
from monai.data import DistributedSampler
from monai.transforms import Compose
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
        preprocessing: brings an item of it to `image` (C, H, W, D), all of one H and W.
        axis: spatial axis along which slices are taken.
        min_foreground: slices with fewer foreground pixels are left out; the tip of a brain teaches little.
        augmentation: MONAI dictionary transforms of an item, drawn anew each time.
    """

    def __init__(
        self,
        data: Sequence[dict[str, Any]],
        preprocessing: Callable[[dict[str, Any]], dict[str, Any]],
        axis: int = 2,
        min_foreground: int = 1,
        augmentation: Sequence[Callable[[dict[str, Tensor]], dict[str, Tensor]]] | None = None,
    ) -> None:
        volumes = []
        for item in tqdm(data, desc="prepare"):
            slices = preprocessing(item)["image"].as_tensor().movedim(axis + 1, 0)
            enough = (slices > 0).any(dim=1).flatten(1).sum(dim=1) >= min_foreground
            volumes.append(slices[enough].half())
        self.images = torch.cat(volumes)
        self.augmentation = Compose(augmentation) if augmentation else None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image = self.images[index].float()
        item = {"image": image, "foreground": (image > 0).any(dim=0, keepdim=True)}
        if self.augmentation is None:
            return item
        # MONAI's transforms return MetaTensors, whose affines after a flip do not collate, and resampled masks as float
        changed = {key: convert_to_tensor(value, track_meta=False) for key, value in self.augmentation(item).items()}
        return changed | {"foreground": changed["foreground"] > 0}


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


def latents(
    data: Sequence[dict[str, Any]],
    preprocessing: Callable[[dict[str, Any]], dict[str, Any]],
    latent_space: LatentSpace,
    augmentation: Sequence[Callable[[dict[str, Tensor]], dict[str, Tensor]]] | None = None,
    copies: int = 1,
) -> LatentDataset:
    """The `LatentDataset` of the `SliceDataset` of volumes."""
    return LatentDataset(SliceDataset(data, preprocessing, augmentation=augmentation), latent_space, copies)


def shuffled(dataset: Dataset, batch_size: int, **settings: Any) -> DataLoader:
    """Loader of a training: full batches in random order, of which each process of `torchrun` gets its own share.

    settings: further ones of `monai.data.DataLoader`, which also seeds the augmentation.
    """
    sampler = _share(dataset, shuffle=True)
    return SeedingDataLoader(
        dataset, batch_size=batch_size, shuffle=sampler is None, sampler=sampler, drop_last=True, **settings
    )


def in_order(dataset: Dataset, batch_size: int, **settings: Any) -> DataLoader:
    """Loader of a validation: everything once, of which each process of `torchrun` gets its own share."""
    return SeedingDataLoader(dataset, batch_size=batch_size, sampler=_share(dataset, shuffle=False), **settings)


def _share(dataset: Dataset, shuffle: bool) -> DistributedSampler | None:
    return DistributedSampler(dataset, even_divisible=True, shuffle=shuffle) if dist.is_initialized() else None


def prepare_batch(
    batch: dict[str, Tensor], device: torch.device, non_blocking: bool = False, **kwargs: Any
) -> tuple[Tensor | None, None, tuple, dict[str, Any]]:
    """`prepare_batch` of the trainers: what an objective is called with.

    Images and foreground for a `SliceDataset`; no images, but `posterior` (mean, std) for a `LatentDataset`.
    """
    moved = {key: value.to(device, non_blocking=non_blocking) for key, value in batch.items()}
    kwargs["foreground"] = moved["foreground"]
    if "image" in moved:
        return moved["image"], None, (), kwargs
    return None, None, (), {"posterior": (moved["mean"], moved["std"]), **kwargs}
