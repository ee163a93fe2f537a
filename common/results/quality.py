"""Numbers of a case that tell a bad scan, brain mask or registration in a table of many cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from monai.data import MetaTensor

from ..images.background import box_of
from ..transforms.registration import brain_ml, mni_overlap

if TYPE_CHECKING:
    from .case import Case

QUALITY = ("brain_mask_ml", "registration_dice", "tissue_contrast", "noise")
MAD_TO_STD = 1.4826  # of a normal distribution
KERNEL_NORM = 6.0  # of second differences along two axes: the root of the sum of the squares of their weights


def quality(case: Case, result: Mapping[str, Any]) -> dict[str, float | None]:
    """Of a case, by the names of `QUALITY`; None for what does not apply or cannot be measured.

    brain_mask_ml: volume of the brain mask, ml.
    registration_dice: overlap of the brain with that of MNI152 where the case was registered, 0 to 1.
    tissue_contrast: see `tissue_contrast`; of brain T1, where the tissues were found.
    noise: see `noise_share`.

    result: the volume in numbers, from `ScoreVolumed`.
    """
    found = {
        "brain_mask_ml": brain_ml(case.brain),
        "registration_dice": None if case.to_mni is None else mni_overlap(case.brain, case.to_mni),
        "tissue_contrast": tissue_contrast(result.get("tissue_modes")),
        "noise": noise_share(case.image, case.brain),
    }
    return {name: None if value is None else round(value, 4) for name, value in found.items()}


def tissue_contrast(modes: Sequence[float] | None) -> float | None:
    """White matter minus grey matter, as a share of white matter; of the modes of CSF, grey and white matter."""
    return None if modes is None else float((modes[2] - modes[1]) / modes[2])


def noise_share(image: MetaTensor, brain: MetaTensor) -> float | None:
    """Standard deviation of the noise as a share of the brain's median intensity; None where there is too little brain.

    The noise is what is left of second differences along the two axes of the finest voxels (Immerkaer 1996), by the
    median of their absolute values, so that edges count little. Fine anatomy counts as noise too, and an image that was
    smoothed or interpolated has less of it: compare scans of one kind.

    image: (C, H, W, D), of which the first channel counts; brain: (1, H, W, D), above 0 inside.
    """
    mask = brain.as_tensor()[0].cpu().numpy() > 0
    if not mask.any():
        return None
    box = box_of(mask)
    values, mask = image.as_tensor()[0].cpu().numpy()[box].astype(np.float64), mask[box]
    level = abs(float(np.median(values[mask])))
    plane = np.argsort(np.asarray(image.pixdim), kind="stable")[:2]
    for axis in plane:
        values = np.diff(values, 2, axis=axis)
        mask = _all_of_three(mask, int(axis))
    if level == 0 or not mask.any():
        return None
    return float(MAD_TO_STD * np.median(np.abs(values[mask])) / KERNEL_NORM / level)


def _all_of_three(mask: np.ndarray, axis: int) -> np.ndarray:
    """Where a voxel and both its neighbours along an axis are inside; shorter by two along it."""
    parts = (np.take(mask, range(start, mask.shape[axis] - 2 + start), axis=axis) for start in range(3))
    return np.logical_and.reduce(list(parts))
