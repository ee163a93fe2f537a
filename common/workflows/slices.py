"""Slices of prepared volumes, and their cached latents: what the 2D methods train on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
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

from ..errors import SettingError
from ..networks.latent_space import LatentSpace
from ..recorded import Recorded
from .slice_cache import SliceCache


class SliceDataset(Dataset):
    """All slices with enough foreground of all volumes, prepared once and kept as float16, in memory or on disk.

    An item is `image` (C, H, W) float32 and `foreground` (1, H, W) bool.

    Args:
        data: MONAI datalist of volumes.
        preprocessing: brings an item of it to `image` (C, H, W, D), all of one H and W.
        axis: spatial axis along which slices are taken.
        min_foreground: slices with fewer foreground pixels are left out; the tip of a brain teaches little.
        augmentation: MONAI dictionary transforms of an item, drawn anew each time.
        middle: of each volume only so many slices, the middle ones of those with foreground; None for all.
        cache_dir: folder of a `SliceCache`, which takes the place of the memory; the items are the same.
        processes: that fill the cache.

    Raises SettingError where `cache_dir` is given and the preprocessing does not record its settings, and what
    `SliceCache` raises.
    """

    def __init__(
        self,
        data: Sequence[dict[str, Any]],
        preprocessing: Callable[[dict[str, Any]], dict[str, Any]],
        axis: int = 2,
        min_foreground: int = 1,
        augmentation: Sequence[Callable[[dict[str, Tensor]], dict[str, Tensor]]] | None = None,
        middle: int | None = None,
        cache_dir: str | Path | None = None,
        processes: int = 1,
    ) -> None:
        self.preprocessing = preprocessing
        self.axis = axis
        self.min_foreground = min_foreground
        self.middle = middle
        self.images: Tensor | SliceCache
        if cache_dir is None:
            self.images = torch.cat([self._slices(item) for item in tqdm(data, desc="prepare")])
        elif isinstance(preprocessing, Recorded):
            settings = [preprocessing, axis, min_foreground, middle]
            self.images = SliceCache(cache_dir, data, self._slices, settings, processes)
        else:
            fact = f"{type(preprocessing).__name__} does not record its settings, so that a change would not be seen"
            raise SettingError("cache_dir", fact, "leave out the cache")
        self.augmentation = Compose(augmentation) if augmentation else None

    def _slices(self, item: Mapping[str, Any]) -> Tensor:
        """(n, C, H, W) float16 of a volume."""
        slices = self.preprocessing(dict(item))["image"].as_tensor().movedim(self.axis + 1, 0)
        enough = (slices > 0).any(dim=1).flatten(1).sum(dim=1) >= self.min_foreground
        return middle_of(slices[enough], self.middle).half()

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


def middle_of(slices: Tensor, count: int | None) -> Tensor:
    """The `count` middle slices of (N, ...), all where there are fewer or `count` is None."""
    left_out = 0 if count is None else max(0, len(slices) - count)
    return slices[left_out // 2 : len(slices) - (left_out - left_out // 2)]


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
    middle: int | None = None,
    cache_dir: str | Path | None = None,
    processes: int = 1,
) -> LatentDataset:
    """The `LatentDataset` of the `SliceDataset` of volumes."""
    slices = SliceDataset(
        data, preprocessing, augmentation=augmentation, middle=middle, cache_dir=cache_dir, processes=processes
    )
    return LatentDataset(slices, latent_space, copies)


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
