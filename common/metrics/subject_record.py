"""What `DetectionMetrics` keeps of one subject, and how it is taken from the volumes.

Shapes: volumes slices first, (D, H, W): scores float32, lesion and foreground bool.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .histograms import bin_index, dice_curve
from .lesions import LesionRecord


@dataclass(frozen=True)
class SubjectRecord:
    """All that is kept of a subject: its size is bounded by the numbers of bins and of slices, not of voxels."""

    site: str  # where it was scanned, "" if unknown
    has_lesion: bool  # anywhere, also outside the foreground
    lesion_voxels: int  # in the foreground, as everything below
    lesion_voxels_outside: int
    foreground_voxels: int
    n_lesion_slices: int
    slices: NDArray[np.int64]  # (N,), of the volume, those that hold foreground
    slice_scores: NDArray[np.float64]  # (N,)
    slice_labels: NDArray[np.bool_]  # (N,), whether they hold lesion
    volume_score: float  # mean of the highest 1 % of the foreground
    method_slice_scores: NDArray[np.float64]  # (N,), the method's own; NaN where it has none
    method_score: float  # of the volume, its own; NaN where it has none
    at_threshold: tuple[int, int] | None  # true positive and all predicted voxels; None without a threshold
    lesions: LesionRecord  # without a threshold, that of an empty segmentation
    # the map's histograms, occupied bins only, (K,) each; of subjects with a lesion, K = 0 for the healthy
    bins: NDArray[np.int32]
    pos: NDArray[np.int64]
    neg: NDArray[np.int64]
    dice_sum: NDArray[np.float64]  # Dice of each lesion slice when this bin and all above are predicted, summed
    psnr: float
    ssim: float


def voxel_histograms(
    scores: NDArray[np.float32], lesion: NDArray[np.bool_], foreground: NDArray[np.bool_]
) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """`bins`, `pos`, `neg` and `dice_sum` of a `SubjectRecord`; `lesion` lies in the foreground."""
    bins = bin_index(scores[foreground])
    occupied = np.bincount(bins) > 0
    n_bins = int(occupied.sum())
    column = np.cumsum(occupied)[bins] - 1  # of every voxel, its bin's position among the occupied ones
    abnormal = lesion[foreground]
    dice_sum = np.zeros(n_bins)
    ends = np.cumsum(foreground.sum((1, 2)))
    for index in np.flatnonzero(lesion.any((1, 2))):
        here = slice(ends[index - 1] if index else 0, ends[index])
        dice_sum += dice_curve(*_split(column[here], abnormal[here], n_bins))
    return np.flatnonzero(occupied).astype(np.int32), *_split(column, abnormal, n_bins), dice_sum


def highest_share_means(
    scores: NDArray[np.float32], foreground: NDArray[np.bool_], share: float = 0.01
) -> NDArray[np.float64]:
    """Per slice the mean of the highest `share` of its foreground voxels (at least one), (D,); NaN without foreground.

    Less noisy than the maximum, and still high for a small lesion: 1 % of an axial brain slice is about 1.5 cm2.
    """
    means = np.full(len(scores), np.nan)
    for index in np.flatnonzero(foreground.any((1, 2))):
        means[index] = highest_share_mean(scores[index][foreground[index]], share)
    return means


def highest_share_mean(values: NDArray[np.float32], share: float = 0.01) -> float:
    """Mean of the highest `share` of some values, (N,), N > 0; of at least one of them."""
    count = math.ceil(share * values.size)
    return float(np.partition(values, -count)[-count:].mean(dtype=np.float64))


def _split(
    column: NDArray[np.int64], abnormal: NDArray[np.bool_], n_bins: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    pos, neg = (np.bincount(column[which], minlength=n_bins) for which in (abnormal, ~abnormal))
    return pos, neg
