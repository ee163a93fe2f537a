"""Where the brain is: given, the foreground of a skull-stripped image, verified rather than assumed, or found."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from scipy import ndimage

from ..errors import SettingError, SkullStripError
from ..images.background import (
    background,
    box_of,
    field_of_view,
    filled_in,
    is_negative,
    joined_to_border,
    zero_of_tissue,
)
from ..images.check import same_grid, source_name, voxel_volume_ml
from .deepbet import deepbet_brain_mask
from .strip import Strip, atlas_brain_mask, hd_bet_brain_mask, largest_component

# below this share of the 98th percentile a voxel is background: resampling leaves ringing around a stripped brain
BACKGROUND_SHARE = 0.01
# of adults with their ventricles, in their own size or in MNI152's; heads are above even when cut at the chin
BRAIN_VOLUME_ML = (800.0, 2300.0)
# a brain ends within the image; one whose outermost slice is this share of the largest one is cut there
CUT_SHARE = 0.25
# air of an unstripped scan is noise; that of a stripped one is constant but for ringing, which is below this share
NOISE_SHARE = 0.005
MAX_NOISY_AIR = 0.05
RING_VOXELS = 4
MIN_FAR = 0.1  # of the air, to be judged by
# an integer mask with more values than labels have, of which the highest is the commonest, is a probability
MAX_LABELS = 20

VOLUME_ADVICE = "check the voxel sizes and the mask; children and animals need a range of their own"
VOLUME_ITEM = "preprocessing::brain_volume_ml=[50,2300]"


class BrainMaskd(MapTransform):
    """Add the brain mask of an image, (1, H, W, D) bool, and what it comes from; all but the brain becomes 0.

    A mask that is there already is the brain: `brain_source` is "given". Else an image that is skull-stripped says
    itself where the brain is, "stripped": the largest connected component of what is not background, with its holes
    filled, so that a black lesion or ventricle belongs to it. Else the skull is stripped as `strip` says, or the image
    refused. What was filled into the field of view is no tissue, whatever says so.

    Where a mean was taken away from the grey values, `intensity_zero`, (C,), says what no signal is in them.

    Args:
        keys: one image; with several channels a voxel counts where any channel is not background.
        mask_key: where the mask is, or is put.
        strip: "atlas" fits the template's brain, `brain_source` "atlas (approximate)"; "deepbet" (for T1) and "hd-bet"
            call what may be installed beside this package; None refuses images with skull.
        brain_volume_ml: lowest and highest volume of a brain; one that is cut by the field of view is judged by its
            largest slice.
    """

    def __init__(
        self,
        keys: KeysCollection,
        mask_key: str = "brain",
        strip: str | None = None,
        brain_volume_ml: Sequence[float] = BRAIN_VOLUME_ML,
    ) -> None:
        super().__init__(keys)
        if strip is not None and strip not in list(Strip):
            raise ValueError(f"`strip` must be {', '.join(Strip)} or None, got {strip!r}.")
        self.mask_key = mask_key
        self.strip = strip
        self.limits = check_limits(brain_volume_ml)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the data with the mask and `brain_source`. Raises SkullStripError."""
        result = dict(data)
        image = result[self.keys[0]]
        values = image.as_tensor().cpu().numpy()
        around = background(values)
        if self.mask_key in result:
            mask, source = given_mask(result[self.mask_key], image), "given"
            seen = torch.from_numpy(field_of_view(values, around))
            mask = MetaTensor(mask.as_tensor() & seen.to(mask.device), meta=dict(image.meta))
            check_volume(mask, self.limits, source_name(result[self.mask_key]))
        else:
            mask, source = self._find(image, values, around)
        zero = zero_of_tissue(values, mask.as_tensor()[0].cpu().numpy(), around)
        if source != "stripped" or around.any() or zero.any():
            result[self.keys[0]] = image * mask.as_tensor().to(image.device)
        found = {self.mask_key: mask, "brain_source": source}
        return result | found | ({"intensity_zero": torch.from_numpy(zero)} if zero.any() else {})

    def _find(self, image: MetaTensor, values: np.ndarray, around: np.ndarray) -> tuple[MetaTensor, str]:
        mask = brain_mask(image)
        try:
            check_stripped(image, mask, self.limits[1])
        except SkullStripError:
            if self.strip is None:
                raise
        else:
            check_volume(mask, self.limits, source_name(image))
            return mask, "stripped"
        # a head whose air is below 0 looks like any other once its air is 0
        below = torch.from_numpy(np.minimum(around, 0)).to(image.device)
        head = cast(MetaTensor, image - below) if below.any() else image
        find = {"atlas": atlas_brain_mask, "deepbet": deepbet_brain_mask, "hd-bet": hd_bet_brain_mask}
        found = find[self.strip](head)
        tissue = torch.from_numpy(~filled_in(values, around))
        mask = MetaTensor(found.as_tensor() & tissue.to(found.device), meta=dict(image.meta))
        check_volume(mask, self.limits, source_name(image))
        return mask, "atlas (approximate)" if self.strip == "atlas" else self.strip


def check_limits(brain_volume_ml: Any) -> tuple[float, float]:
    """Two numbers, 0 <= lowest < highest. Raises SettingError."""
    try:
        low, high = (float(value) for value in brain_volume_ml)
    except (TypeError, ValueError):
        low, high = 1.0, 0.0
    if not 0 <= low < high:
        fact = f"{brain_volume_ml!r} is not a lowest and a highest volume in ml"
        raise SettingError("brain_volume_ml", fact, "write, for example, [50,2300]")
    return low, high


def given_mask(mask: MetaTensor, image: MetaTensor) -> MetaTensor:
    """A brain mask that came with the image, (1, H, W, D), as bool.

    All labels above 0 are the brain; of a probability, or of a mask that was resampled with splines, what is above half
    of the highest value. Raises SkullStripError where it is empty, not one volume or on another grid.
    """
    name = source_name(mask)
    if mask.ndim != 4 or mask.shape[0] != 1:
        raise SkullStripError(name, "the brain mask is not one 3D volume", "give one mask for all modalities")
    if not same_grid(mask, image):
        raise SkullStripError(name, "the brain mask is on another grid", "resample it to the image's grid")
    values = mask.as_tensor()
    inside = values > (values.max() / 2 if is_probability(values) else 0)
    if not inside.any():
        raise SkullStripError(name, "the brain mask is empty", "give a mask of the brain, or none")
    return MetaTensor(inside, meta=dict(image.meta))


def is_probability(mask: torch.Tensor) -> bool:
    """Whether the values of a mask are shares rather than labels."""
    if mask.dtype == torch.bool:
        return False
    if not torch.equal(mask, mask.round()):
        return True
    values, counts = mask[mask > 0].unique(return_counts=True)
    return bool(len(values) > MAX_LABELS and counts.argmax() == len(values) - 1)


def brain_mask(image: MetaTensor) -> MetaTensor:
    """(C, H, W, D) -> (1, H, W, D) bool with the affine of the image: where it is not background.

    Brighter than that, but for images from which a mean was taken away. Raises SkullStripError where nothing is.
    """
    above, level = above_background(image)
    filled = _filled(np.any(above > level * BACKGROUND_SHARE, axis=0))
    below = above < -level * BACKGROUND_SHARE
    if below.sum() > filled.sum() / 20:  # else overshoot
        both = _filled(np.any(np.abs(above) > level * BACKGROUND_SHARE, axis=0))
        if any(is_negative(channel, both) for channel in above):
            filled = both
    return MetaTensor(torch.from_numpy(filled)[None], meta=dict(image.meta))


def above_background(image: MetaTensor) -> tuple[np.ndarray, float]:
    """Grey values from the background's, (C, H, W, D), and the 98th percentile of those above it."""
    values = image.as_tensor().cpu().numpy()
    above = values - background(values)
    positive = above[above > 0]
    if 20 * positive.size < (above < 0).sum():
        fact = "hardly a voxel is brighter than the background"
        raise SkullStripError(source_name(image), fact, "give a scan whose air is darker than its tissue")
    return above, float(np.percentile(positive.astype(np.float64), 98))


def _filled(mask: np.ndarray) -> np.ndarray:
    box, filled = box_of(mask), np.zeros(mask.shape, dtype=bool)
    filled[box] = ~joined_to_border(~largest_component(mask[box]))
    return filled


def check_stripped(image: MetaTensor, mask: MetaTensor, max_ml: float = BRAIN_VOLUME_ML[1]) -> None:
    """Raises SkullStripError where the foreground is too large for a brain or the air around it is not empty."""
    volume_ml = float(mask.sum()) * voxel_volume_ml(image)
    if volume_ml > max_ml:
        raise _not_stripped(image, f"a foreground of {volume_ml:.0f} ml is no brain alone")
    above, level = above_background(image)
    noise, inside = np.abs(above) > level * NOISE_SHARE, mask.as_tensor()[0].cpu().numpy()
    noisy = _share(noise, ~inside)
    if noisy > MAX_NOISY_AIR:  # or it is the ringing of a spline, which ends near the brain
        far = ~ndimage.binary_dilation(inside, iterations=RING_VOXELS)
        noisy = _share(noise, far) if far.sum() > MIN_FAR * (~inside).sum() else noisy
    if noisy > MAX_NOISY_AIR:
        raise _not_stripped(image, f"{noisy:.0%} of the voxels around the brain are not empty")


def _share(noise: np.ndarray, air: np.ndarray) -> float:
    return float((noise & air).sum() / (len(noise) * air.sum())) if air.any() else 0.0


def check_volume(mask: MetaTensor, limits: tuple[float, float], name: str) -> None:
    """Raises SkullStripError where a mask, (1, H, W, D) bool, is smaller or larger than a brain."""
    inside, voxel_ml = mask.as_tensor()[0].cpu().numpy(), voxel_volume_ml(mask)
    volume_ml = float(inside.sum()) * voxel_ml
    if (
        volume_ml <= limits[1]
        and max(volume_ml, *whole_volumes_ml(inside, voxel_ml, mask.pixdim.tolist())) >= limits[0]
    ):
        return
    fact = f"a brain of {volume_ml:.0f} ml, where {limits[0]:.0f} to {limits[1]:.0f} ml are plausible"
    raise SkullStripError(name, fact, VOLUME_ADVICE, items=VOLUME_ITEM)


def whole_volumes_ml(inside: np.ndarray, voxel_ml: float, spacing_mm: Sequence[float]) -> list[float]:
    """For each axis along which a brain is cut, the volume of a ball with its largest slice; 0 for the others.

    Of 151 adults (IXI) such balls have 0.8 to 1.4 times the volume of the brain.
    """
    volumes = []
    for axis in range(3):
        areas = np.trim_zeros(inside.sum(axis=tuple(other for other in range(3) if other != axis)))
        if not areas.size:
            return [0.0]
        largest_mm2 = areas.max() * voxel_ml * 1000 / spacing_mm[axis]
        is_cut = max(areas[0], areas[-1]) >= CUT_SHARE * areas.max()
        volumes.append(4 / 3 * largest_mm2**1.5 / np.pi**0.5 / 1000 if is_cut else 0.0)
    return volumes


def _not_stripped(image: MetaTensor, fact: str) -> SkullStripError:
    advice = "skull-strip it first (HD-BET, SynthStrip, ...)"
    return SkullStripError(source_name(image), fact, advice, strip="atlas", brain_mask="MASK")
