"""Where the brain is: given, the foreground of a skull-stripped image, verified rather than assumed, or found."""

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
from .check import same_grid, source_name, voxel_volume_ml
from .strip import atlas_brain_mask, hd_bet_brain_mask, largest_component

# below this share of the 98th percentile a voxel is background: resampling leaves ringing around a stripped brain
BACKGROUND_SHARE = 0.01
# adult brains with their ventricles stay below; heads are above even when cut at the chin
MAX_BRAIN_ML = 2300.0
# air of an unstripped scan is noise; that of a stripped one is 0 but for ringing at the rim
MAX_NOISY_AIR = 0.05


class BrainMaskd(MapTransform):
    """Add the brain mask of an image, (1, H, W, D) bool, and what it comes from; all but the brain becomes 0.

    A mask that is there already is the brain: `brain_source` is "given". Else an image that is skull-stripped says
    itself where the brain is, "stripped": the largest connected component of the non-zero voxels with its holes filled,
    so that a black lesion or ventricle belongs to it. Else the skull is stripped as `strip` says, or the image refused.

    Args:
        keys: one image; with several channels a voxel counts where any channel is non-zero.
        mask_key: where the mask is, or is put.
        strip: "atlas" fits the template's brain, `brain_source` "atlas (approximate)"; "hd-bet" calls that program;
            None refuses images with skull.
    """

    def __init__(self, keys: KeysCollection, mask_key: str = "brain", strip: str | None = None) -> None:
        super().__init__(keys)
        if strip not in (None, "atlas", "hd-bet"):
            raise ValueError(f"`strip` must be atlas, hd-bet or None, got {strip!r}.")
        self.mask_key = mask_key
        self.strip = strip

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the data with the mask and `brain_source`. Raises SkullStripError."""
        result = dict(data)
        image = result[self.keys[0]]
        if self.mask_key in result:
            mask, source = given_mask(result[self.mask_key], image), "given"
        else:
            mask, source = self._find(image)
        if source != "stripped":
            result[self.keys[0]] = image * mask.as_tensor()
        return result | {self.mask_key: mask, "brain_source": source}

    def _find(self, image: MetaTensor) -> tuple[MetaTensor, str]:
        mask = brain_mask(image)
        try:
            check_stripped(image, mask)
            return mask, "stripped"
        except SkullStripError:
            if self.strip is None:
                raise
        if self.strip == "atlas":
            return atlas_brain_mask(image), "atlas (approximate)"
        return hd_bet_brain_mask(image), "hd-bet"


def given_mask(mask: MetaTensor, image: MetaTensor) -> MetaTensor:
    """A brain mask that came with the image, as bool. Raises SkullStripError where it is empty or on another grid."""
    if not same_grid(mask, image):
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


def check_stripped(image: MetaTensor, mask: MetaTensor) -> None:
    """Raises SkullStripError where the foreground is too large for a brain or the air around it is not empty."""
    volume_ml = float(mask.sum()) * voxel_volume_ml(image)
    if volume_ml > MAX_BRAIN_ML:
        raise _not_stripped(image, f"a foreground of {volume_ml:.0f} ml is no brain alone")
    air = image.as_tensor()[:, ~mask.as_tensor()[0]]
    noisy = float((air != 0).float().mean()) if air.numel() else 0.0
    if noisy > MAX_NOISY_AIR:
        raise _not_stripped(image, f"{noisy:.0%} of the voxels around the brain are not 0")


def _not_stripped(image: MetaTensor, fact: str) -> SkullStripError:
    advice = "skull-strip it first (HD-BET, SynthStrip, ...)"
    return SkullStripError(source_name(image), fact, advice, strip="atlas", brain_mask="MASK")
