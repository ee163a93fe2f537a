"""Slices of a labelled cohort, drawn and measured as such: a slice costs a hundredth of a volume."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import SpatialResample
from torch import Tensor
from tqdm import tqdm

from ..cohorts.table import read_cohort
from ..detection.method import foreground_of
from ..detection.volume import slice_seeds
from ..images.check import typed_errors
from ..metrics import DetectionMetrics
from ..transforms.load import load_lesion


@dataclass(frozen=True)
class Slices:
    """Prepared slices with foreground: image (N, C, H, W), lesion (N, H, W) bool, subject and seed of each."""

    image: Tensor
    lesion: Tensor
    subject: list[str]
    seed: Tensor

    @property
    def diseased(self) -> Tensor:
        """(N,) bool."""
        return self.lesion.flatten(1).any(1)

    def take(self, indices: Tensor) -> Slices:
        """Some of the slices."""
        return Slices(self.image[indices], self.lesion[indices], [self.subject[i] for i in indices], self.seed[indices])


def load_slices(
    cohort: Path, modalities: Sequence[str], split: Any, preprocessing: Callable[..., Any], seed: int
) -> Slices:
    """All slices with foreground of a split, their lesions brought to the network's grid (nearest).

    `<subject>_healthy`, the tumour-free slices of a subject that is there too, is left out.
    """
    items = read_cohort(cohort, modalities, split)
    names = {str(item["subject"]) for item in items}
    parts = []
    for item in tqdm(items, desc="prepare"):
        subject = str(item["subject"])
        if subject.endswith("_healthy") and subject.removesuffix("_healthy") in names:
            continue
        with typed_errors():
            data = preprocessing(item)
        image = data["image"]
        lesion = torch.zeros(image.shape[1:], dtype=torch.bool)
        if "lesion" in item:
            to_grid = SpatialResample(mode="nearest", padding_mode="zeros")
            mask = load_lesion(str(item["lesion"]), data["brain"])
            moved = cast(MetaTensor, to_grid(mask, dst_affine=image.affine, spatial_size=image.shape[1:]))
            lesion = moved.as_tensor()[0] > 0
        values = image.as_tensor().movedim(-1, 0)
        used = (values > 0).flatten(1).any(1).nonzero().flatten()
        seeds = slice_seeds(seed, used)
        parts.append(Slices(values[used], lesion.movedim(-1, 0)[used], [subject] * len(used), seeds))
    return Slices(
        torch.cat([part.image for part in parts]),
        torch.cat([part.lesion for part in parts]),
        [subject for part in parts for subject in part.subject],
        torch.cat([part.seed for part in parts]),
    )


def drawn(diseased: np.ndarray, count: int, seed: int) -> Tensor:
    """Indices of `count` slices at most, half of them diseased where there are as many; diseased: (N,) bool."""
    rng = np.random.default_rng(seed)
    sick, well = (rng.permutation(np.flatnonzero(which)) for which in (diseased, ~diseased))
    half = min(len(sick), max(count // 2, count - len(well)))
    return torch.from_numpy(np.sort(np.concatenate([sick[:half], well[: count - half]])))


def pooled(
    slices: Slices, maps: Tensor, seed: int, scores: Tensor | None = None, reconstruction: Tensor | None = None
) -> dict[str, Any]:
    """This project's metrics over the slices' foreground, with intervals over subjects.

    maps: (N, H, W);  scores: (N,);  reconstruction: (N, C, H, W), for PSNR and SSIM.
    """
    metrics = DetectionMetrics()
    subjects = np.array(slices.subject)
    foreground = foreground_of(slices.image)[:, 0]
    for subject in np.unique(subjects):
        own = torch.from_numpy(subjects == subject)
        anomaly_map, lesion, brain = (x[own].movedim(0, -1) for x in (maps, slices.lesion, foreground))
        metrics.update(
            str(subject),
            anomaly_map,
            lesion,
            brain,
            method_slice_scores=None if scores is None else scores[own],
            image=None if reconstruction is None else slices.image[own].movedim(0, -1),
            reconstruction=None if reconstruction is None else reconstruction[own].movedim(0, -1),
        )
    return metrics.compute(seed)
