"""Where the voxels of a brain lie in MNI152, by its mask alone, and what is carried there, back, and to the other side.

A mask has no contrast, so that a lesion or another scanner moves nothing. A grid is taken to have voxels of one size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.utils import optional_import
from scipy import ndimage
from torch import Tensor

from ..images.background import box_of
from ..images.mni import (
    GRID_MM,
    MASK_SIGMA_MM,
    MASK_STEP_MM,
    MIN_DICE,
    as_matrix,
    centre_of,
    dice,
    mni_grid,
    register,
    template,
    to_itk,
)

sitk, _ = optional_import("SimpleITK")

ATLAS_MM = 4.0
ATLAS_SIGMA_VOX = 1.5  # at 2 mm: two brains match to within some millimetres
MIRROR = np.diag([-1.0, 1.0, 1.0, 1.0])  # left to right in MNI152
SHRINK = 4  # of the grid of 2 mm: a finer level takes three times as long and moves nothing that an atlas would notice
MARGIN_VOX = 5  # of background, so that the rim of the brain guides the estimate
KEPT_BRAINS = 64  # estimates that are kept: several bundles look at the same brain

Align = Callable[[np.ndarray], np.ndarray]  # a brain (H, W, D) bool, not empty -> (4, 4), its voxels to mm of MNI152


def by_boxes(brain: np.ndarray) -> np.ndarray:
    """Each axis by itself: the box around the brain to that around the brain of MNI152, the middle to x = 0."""
    here, there = _edges(brain), nib.affines.apply_affine(template()[1].affine, _edges(_template_brain()))
    there[:, 0] -= there[:, 0].mean()
    scale = (there[1] - there[0]) / (here[1] - here[0])
    return nib.affines.from_matvec(np.diag(scale), there[0] - scale * here[0])


def by_registration(brain: np.ndarray) -> np.ndarray:
    """The affine that matches the masks best by mean squares; by boxes where they do not come to overlap.

    That is so where a mask is no whole brain: a slab, a few slices. The same result every time.
    """
    return _registered(np.packbits(brain).tobytes(), brain.shape)


@lru_cache(maxsize=KEPT_BRAINS)
def _registered(packed: bytes, shape: tuple[int, ...]) -> np.ndarray:
    brain = np.unpackbits(np.frombuffer(packed, np.uint8), count=int(np.prod(shape))).reshape(shape).astype(bool)
    target = template()[1]
    box = box_of(brain)
    near = torch.from_numpy(np.pad(brain[box], MARGIN_VOX)).float()[None]
    corner = np.array([side.start - MARGIN_VOX for side in box]) * GRID_MM
    moving = MetaTensor(near, affine=nib.affines.from_matvec(np.eye(3) * GRID_MM, corner))
    centre, brain_centre = centre_of(target), centre_of(moving)
    to_brain = sitk.AffineTransform(3)
    to_brain.Scale(float(np.cbrt(brain.sum() / _template_brain().sum())))
    to_brain.SetCenter(centre.tolist())
    to_brain.SetTranslation((brain_centre - centre).tolist())
    masks = to_itk(target, MASK_SIGMA_MM), to_itk(moving, MASK_SIGMA_MM)
    try:
        register(*masks, to_brain, shrink=(SHRINK,), step_mm=MASK_STEP_MM, information=False)
    except RuntimeError:  # ITK's own word for masks that lost each other
        return by_boxes(brain)
    to_mni = np.linalg.inv(as_matrix(to_brain)) @ np.diag([*[GRID_MM] * 3, 1.0])
    return to_mni if _overlap(brain, to_mni) >= MIN_DICE else by_boxes(brain)


def to_atlas(volumes: np.ndarray, to_mni: np.ndarray, spacing_mm: float = ATLAS_MM) -> Tensor:
    """Volumes (C, H, W, D), 0 outside the brain, smoothed on the grid of MNI152, (C, *mni_grid); sums and counts alike.

    to_mni: what an `Align` said of the brain.
    """
    (fine, fine_shape), (coarse, shape) = mni_grid(GRID_MM), mni_grid(spacing_mm)
    there, steps = np.linalg.inv(to_mni) @ fine, np.linalg.inv(fine) @ coarse
    carried = [ndimage.gaussian_filter(_moved(volume, there, fine_shape), ATLAS_SIGMA_VOX) for volume in volumes]
    return torch.from_numpy(np.stack([_moved(volume, steps, shape) for volume in carried]))


def from_atlas(atlas: Tensor, to_mni: np.ndarray, shape: tuple[int, ...], spacing_mm: float = ATLAS_MM) -> np.ndarray:
    """An atlas (C, *mni_grid) at the voxels of a brain's volume, (C, *shape)."""
    there = np.linalg.inv(mni_grid(spacing_mm)[0]) @ to_mni
    return np.stack([_moved(values, there, shape) for values in atlas.numpy()])


def mirrored(values: np.ndarray, to_mni: np.ndarray) -> np.ndarray:
    """What is at the same place of the other side, (H, W, D) -> same."""
    return _moved(values, np.linalg.inv(to_mni) @ MIRROR @ to_mni, values.shape)


def _moved(volume: np.ndarray, matrix: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A volume at matrix @ voxel of a grid of this shape, linearly, 0 beyond it; matrix (4, 4), voxel to voxel."""
    return ndimage.affine_transform(
        volume, matrix, output_shape=shape, output=np.float32, order=1, mode="grid-constant"
    )


def _overlap(brain: np.ndarray, to_mni: np.ndarray) -> float:
    """Dice of a brain in MNI152 and that of the template."""
    there, grid = _template_brain(), np.asarray(template()[1].affine)
    here = _moved(brain.astype(np.float32), np.linalg.inv(to_mni) @ grid, there.shape) >= 0.5
    return dice(torch.from_numpy(here), torch.from_numpy(there))


@cache
def _template_brain() -> np.ndarray:
    return template()[1].numpy()[0] > 0


def _edges(mask: np.ndarray) -> np.ndarray:
    """Where the box around a mask begins and ends, (2, 3), in voxels."""
    return np.array([(side.start - 0.5, side.stop - 0.5) for side in box_of(mask)]).T
