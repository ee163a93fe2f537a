"""Where the brain is: the foreground of a skull-stripped image, verified rather than assumed."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from scipy import ndimage

from ..errors import SkullStripError
from .check import source_name, voxel_volume_ml

# below this share of the 98th percentile a voxel is background: resampling leaves ringing around a stripped brain
BACKGROUND_SHARE = 0.01
# adult brains with their ventricles stay below; heads are above even when cut at the chin
MAX_BRAIN_ML = 2300.0
# air of an unstripped scan is noise; that of a stripped one is 0 but for ringing at the rim
MAX_NOISY_AIR = 0.05


class BrainMaskd(MapTransform):
    """Add the brain mask of a skull-stripped image, (1, H, W, D) bool; refuse an image that is not stripped.

    A mask that is there already is applied to the image instead. Else the mask is the largest connected component of
    the non-zero voxels with its holes filled, so that a black lesion or ventricle belongs to the brain.

    Args:
        keys: one image; with several channels a voxel counts where any channel is non-zero.
        mask_key: where the mask is, or is put.
    """

    def __init__(self, keys: KeysCollection, mask_key: str = "brain") -> None:
        super().__init__(keys)
        self.mask_key = mask_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the data with the mask. Raises SkullStripError."""
        result = dict(data)
        image = result[self.keys[0]]
        if self.mask_key in result:
            mask = given_mask(result[self.mask_key], image)
            result[self.keys[0]] = image * mask.as_tensor()
        else:
            mask = brain_mask(image)
            check_stripped(image, mask)
        result[self.mask_key] = mask
        return result


def given_mask(mask: MetaTensor, image: MetaTensor) -> MetaTensor:
    """A brain mask that came with the image, as bool. Raises SkullStripError where it is empty or on another grid."""
    if mask.shape[1:] != image.shape[1:] or not np.allclose(mask.affine, image.affine, atol=1e-3):
        raise SkullStripError(source_name(mask), "the brain mask is on another grid", "resample it to the image's grid")
    if not mask.any():
        raise SkullStripError(source_name(mask), "the brain mask is empty", "give a mask of the brain, or none")
    return MetaTensor(mask.as_tensor() > 0, meta=dict(image.meta))


def brain_mask(image: MetaTensor) -> MetaTensor:
    """(C, H, W, D) -> (1, H, W, D) bool with the affine of the image."""
    values = image.as_tensor()
    positive = values[values > 0]
    if positive.numel() == 0:
        raise SkullStripError(source_name(image), "no voxel is above zero", "shift the intensities so that air is 0")
    level = BACKGROUND_SHARE * np.percentile(positive.cpu().numpy(), 98)
    component = largest_component((values > level).any(dim=0).cpu().numpy())
    filled = ndimage.binary_fill_holes(component)
    return MetaTensor(torch.from_numpy(filled)[None], meta=dict(image.meta))


def largest_component(mask: np.ndarray) -> np.ndarray:
    """(H, W, D) bool -> bool: the largest 26-connected component. MONAI's needs scikit-image for this."""
    labels, _ = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return labels == sizes.argmax()


def check_stripped(image: MetaTensor, mask: MetaTensor) -> None:
    """Raises SkullStripError where the foreground is too large for a brain or the air around it is not empty."""
    remedy = "skull-strip it first (HD-BET, SynthStrip, ...) so that all but the brain is 0"
    volume_ml = float(mask.sum()) * voxel_volume_ml(image)
    if volume_ml > MAX_BRAIN_ML:
        raise SkullStripError(source_name(image), f"a foreground of {volume_ml:.0f} ml is no brain alone", remedy)
    air = image.as_tensor()[:, ~mask.as_tensor()[0]]
    noisy = float((air != 0).float().mean()) if air.numel() else 0.0
    if noisy > MAX_NOISY_AIR:
        raise SkullStripError(source_name(image), f"{noisy:.0%} of the voxels around the brain are not 0", remedy)
