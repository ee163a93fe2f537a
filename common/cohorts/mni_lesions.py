"""Real lesion masks, brought from MNI152 space into a brain and filled as the lesion looks on T1.

* `atlas` (say, multiple sclerosis): tissue is darkened strongly;
* `chronic_stroke`: a cavity, filled with the subject's own cerebrospinal fluid (CSF);
* `acute_stroke`: tissue is darkened mildly.

The modalities of one subject are the channels of its image; the first one, a T1, says where CSF is.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

import nibabel as nib
import numpy as np
from monai.config import NdarrayOrTensor
from monai.data.utils import affine_to_spacing
from monai.utils import convert_data_type
from numpy.random import RandomState
from numpy.typing import NDArray
from scipy import ndimage

Array = NDArray[Any]
StrPath = str | PathLike[str]
Atlas = StrPath | tuple[Array, Array]

KINDS = ("atlas", "chronic_stroke", "acute_stroke")
# Range of the factor by which a lesion multiplies tissue, where it is not that of every dark lesion.
FACTORS = {"acute_stroke": (0.75, 0.92)}
BORDER_MM = {"acute_stroke": 4.0}  # of the other kinds 2 mm

# Centre and standard deviation (mm) of the voxels of the ICBM152 2009a brain (nilearn's `load_mni152_template() > 0`).
MNI_CENTRE_MM = np.array([0.0, -22.1, 9.5])
MNI_STD_MM = np.array([33.5, 40.7, 31.5])

CSF_SHARE = 0.4  # of the bright level (p98, white matter): on T1 CSF is at 0.1 to 0.35 and grey matter at 0.6 or more
# The darkest share of the voxels that lie this deep (mm) are ventricle in adults of every age; near the rim a voxel
# is dark because it is partly background.
CSF_DEPTH_MM, CSF_DARKEST = 10.0, 0.02
CSF_POOL_MM = 4.0  # dark places at least so wide are ventricles or cisterns and no part of a cavity; sulci are
# Standard deviations in a cavity: of its smooth texture as a share of CSF, and of its noise as a share of the bright
# level. A flat hole is found for its flatness.
TEXTURE_SHARE, TEXTURE_MM, NOISE_SHARE = 0.12, 3.0, 0.012


def mni_weight(
    atlas: Atlas, volume: Array, brain: Array, affine: Array, mni_to_subject: Array, kind: str, border_mm: float
) -> tuple[Array, Array]:
    """Where a lesion of MNI152 space lies in a brain: its strength (H, W, D) from 0 to 1, and its mask, bool.

    volume: (C, H, W, D). brain: (H, W, D) bool. affine: (4, 4), voxel to world; mni_to_subject: (4, 4), world to world
    (mm, RAS). There is no lesion where there was CSF before, as its label would mark what does not show.
    """
    mask, mask_affine = load_atlas(atlas)
    blur_mm = 0.0 if kind == "atlas" else border_mm / 2  # many lesions of multiple sclerosis are small: not blurred
    weight = _warp(
        mask, np.linalg.inv(mni_to_subject @ mask_affine) @ affine, brain.shape, blur_mm / _size(mask_affine)
    )
    spacing = affine_to_spacing(affine)
    fluid = volume[0] <= CSF_SHARE * np.percentile(volume[0][brain].astype(np.float64), 98)
    if kind == "chronic_stroke":
        fluid = _wide(fluid, spacing)
    weight *= brain & ~fluid
    lesion: Array = weight >= 0.5
    if lesion.any():
        away_mm = ndimage.distance_transform_edt(~lesion, sampling=spacing)
        weight[away_mm > border_mm] = 0  # specks too faint for the mask are not lesions either
    return weight, lesion


def fill(volume: Array, weight: Array, brain: Array, affine: Array, kind: str, factor: float, rng: RandomState) -> None:
    """Change a volume (C, H, W, D) in place where a lesion's strength, (H, W, D), is above 0.

    factor: what the tissue is multiplied by; a cavity does not use it.
    Raises ValueError where a brain is too small to know its CSF from.
    """
    if kind != "chronic_stroke":
        volume *= 1 + weight * (factor - 1)
        return
    level = csf_level(volume, brain, affine)[:, None, None, None]
    bright = np.percentile(volume[:, brain].astype(np.float64), 98, axis=1)[:, None, None, None]
    texture = ndimage.gaussian_filter(rng.normal(size=weight.shape), TEXTURE_MM / affine_to_spacing(affine))
    cavity = level * (1 + TEXTURE_SHARE * texture / texture.std())
    cavity = cavity + NOISE_SHARE * bright * rng.normal(size=volume.shape)
    volume += weight * (np.maximum(cavity, level / 2) - volume)


def csf_level(volume: Array, brain: Array, affine: Array) -> Array:
    """The intensity of a subject's own CSF in each channel: (C, H, W, D) and (H, W, D) bool -> (C,).

    Raises ValueError where nothing of the brain is deeper than `CSF_DEPTH_MM`.
    """
    spacing = affine_to_spacing(affine)
    deep = ndimage.distance_transform_edt(np.pad(brain, 1), sampling=spacing)[1:-1, 1:-1, 1:-1] > CSF_DEPTH_MM
    if not deep.any():
        raise ValueError(f"No part of the brain is deeper than {CSF_DEPTH_MM:g} mm: its CSF cannot be told.")
    values = volume[:, deep]
    return np.median(values[:, values[0] <= np.quantile(values[0].astype(np.float64), CSF_DARKEST)], axis=1)


def match_moments(brain: Array, affine: Array) -> Array:
    """Map MNI152 to a subject without registration: match the brain's centre and spread along each world axis.

    brain: (H, W, D) bool; affine: (4, 4), voxel to world (mm, RAS). Returns (4, 4), world to world in mm.
    A tilt of the head stays. Raises ValueError for a flat brain.
    """
    points = nib.affines.apply_affine(affine, np.argwhere(brain))
    scale = points.std(axis=0) / MNI_STD_MM
    if not scale.all():
        raise ValueError("The brain mask is flat: matching it to MNI152 needs a brain with three dimensions.")
    return nib.affines.from_matvec(np.diag(scale), points.mean(axis=0) - scale * MNI_CENTRE_MM)


def list_atlases(atlas_mask: StrPath | Array | Sequence[StrPath] | None, affine: NdarrayOrTensor | None) -> list[Atlas]:
    """The lesion masks that were given, in one list. Raises ValueError for an array without its affine."""
    if isinstance(atlas_mask, np.ndarray):
        if affine is None:
            raise ValueError("An `atlas_mask` that is an array needs its `atlas_affine`.")
        return [(atlas_mask > 0, convert_data_type(affine, np.ndarray)[0])]
    return [atlas_mask] if isinstance(atlas_mask, (str, PathLike)) else list(atlas_mask or ())


def load_atlas(atlas: Atlas) -> tuple[Array, Array]:
    """A lesion mask, (H, W, D) bool, and its affine, (4, 4)."""
    if isinstance(atlas, tuple):
        return atlas
    file = nib.Nifti1Image.from_filename(atlas)
    return np.asarray(file.dataobj) > 0, file.affine


def atlas_ml(atlas: Atlas) -> float:
    """Volume of a lesion mask in MNI152 space."""
    mask, affine = load_atlas(atlas)
    return float(mask.sum()) * _size(affine) ** 3 / 1000


def _size(affine: Array) -> float:
    """Edge of the cube that has the volume of a voxel, mm."""
    return float(np.cbrt(abs(np.linalg.det(affine[:3, :3]))))


def _wide(mask: Array, spacing: Array) -> Array:
    """The parts of a mask that hold a ball of diameter `CSF_POOL_MM`."""
    core = ndimage.distance_transform_edt(mask, sampling=spacing) > CSF_POOL_MM / 2
    if not core.any():
        return core
    near: Array = ndimage.distance_transform_edt(~core, sampling=spacing) <= CSF_POOL_MM / 2
    return mask & near


def _warp(atlas: Array, matrix: Array, shape: tuple[int, ...], blur: float) -> Array:
    """Sample a binary mask at subject voxels; matrix (4, 4) maps those to voxels of the atlas. Returns [0, 1].

    blur: standard deviation of the border, in voxels of the atlas; it is at least what the step between voxels needs.
    """
    step = np.linalg.norm(matrix[:3, :3], axis=1)  # subject voxel in atlas voxels, per axis of the atlas
    sigma = np.maximum(0.4 * step, blur)  # or small lesions fall between voxels
    smooth = ndimage.gaussian_filter(atlas.astype(np.float32), sigma)
    return ndimage.affine_transform(smooth, matrix[:3, :3], matrix[:3, 3], output_shape=shape, order=1)
