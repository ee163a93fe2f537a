"""The preprocessing of a whole head, windowed CT or MR: head and skull, slices of one size."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, ClassVar

import numpy as np
import SimpleITK
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import Compose, CopyItemsd, DeleteItemsd, EnsureTyped, MapTransform, Orientationd, Resized
from scipy import ndimage

from ..errors import ImageIntensityError
from ..images.check import CheckVolumed, source_name
from ..recorded import Recorded
from .brain import given_mask
from .intensity import FOREGROUND_FLOOR, ScaleIntensityByForegroundd
from .load import LoadImageCheckedd

BONE = 240  # grey value from which it is bone in a CT windowed as that of MedNIST


class HeadPreprocessing(Recorded, Compose):
    """Load, check, find the head, RAS, resize the axial slices, scale.

    As `BrainPreprocessing`, for slices of whole heads whose spacing nobody knows, which fill the slices alike. In:
    `image`, and `brain`, a mask of where to look, if there is one. Out: `image` (C, size, size, D) float32, head in
    (0, 1], else exactly 0; `input`, and the head as `brain`, on the input's grid, with `brain_source`, "given" or
    "head".

    Args:
        size: H and W of the slices.
        channels: modalities.
        mask: adds the mask `brain` of `image`.
        scale: brings `image` to [0, 1], with its mask as `foreground`.
    """

    def __init__(self, size: int, channels: int, mask: MapTransform, scale: MapTransform) -> None:
        both = ("image", "foreground")
        super().__init__(
            [
                LoadImageCheckedd("image"),
                LoadImageCheckedd("brain", allow_missing_keys=True),
                EnsureTyped("image"),
                CheckVolumed("image", channels),
                mask,
                CopyItemsd(("image", "brain"), names=("input", "foreground")),
                Orientationd(both, axcodes="RAS", labels=None),
                Resized("image", (size, size, -1), mode="bilinear", anti_aliasing=True),
                Resized("foreground", (size, size, -1), mode="nearest"),
                scale,
                DeleteItemsd("foreground"),
            ]
        )

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments; and `register`, whether the network works in MNI152, which every preprocessing says."""
        return super().settings | {"register": False}

    @property
    def preparation(self) -> dict[str, Any]:
        """The settings that a network is trained for, and that its weights therefore hold."""
        return super().settings


class HeadCTPreprocessing(HeadPreprocessing):
    """Windowed head CT as MedNIST has it: grey values in [0, 255], air at 25.

    Adds `air_level` and `bone_share`, see `HeadCTMaskd`.

    Args:
        size: H and W of the slices.
        air: grey values up to this are air; that of MedNIST is 25 with noise of JPEG up to 44 about it.
    """

    def __init__(self, size: int = 64, air: float = 45.0) -> None:
        scale = ScaleGreyValuesd("image", "foreground")
        super().__init__(size, 1, HeadCTMaskd("image", "brain", air), scale)


class HeadMRPreprocessing(HeadPreprocessing):
    """Axial slices of MR heads, skull on, several modalities of one grid.

    Args:
        size: H and W of the slices.
        percentile, upper: see `ScaleIntensityByForegroundd`.
        channels: modalities.
    """

    def __init__(self, size: int, percentile: float, upper: float, channels: int = 1) -> None:
        scale = ScaleIntensityByForegroundd("image", "foreground", percentile, upper)
        mask = HeadMRMaskd("image", "brain")
        super().__init__(size, channels, mask, scale)


class HeadMaskd(MapTransform):
    """Add the mask of the head, (1, H, W, D) bool, and `brain_source`; what is outside becomes 0.

    A mask that is there already is taken. Else the head is what is not air, axial slice by slice, without what is
    thinner than 3 pixels (the head rest), and with its holes filled: sinuses belong to it. Something bright in the air
    does too; it is an anomaly.

    Args:
        keys: one image.
        mask_key: where the mask is put.
    """

    remedy: ClassVar[str]

    def __init__(self, keys: KeysCollection, mask_key: str) -> None:
        super().__init__(keys)
        self.mask_key = mask_key

    def brightness(self, image: MetaTensor) -> tuple[np.ndarray, float]:
        """(H, W, D), and the level up to which it is air."""
        raise NotImplementedError

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the data with the mask.

        Raises ImageIntensityError for an image that is all air, SkullStripError for a mask that does not fit.
        """
        result = dict(data)
        image: MetaTensor = result[self.keys[0]]
        brightness, air = self.brightness(image)
        if self.mask_key in result:
            mask, source = given_mask(result[self.mask_key], image), "given"
        else:
            axial = int(np.abs(np.asarray(image.affine, dtype=float)[2, :3]).argmax())
            head = head_mask(brightness, air, axial)
            mask, source = MetaTensor(torch.from_numpy(head)[None], meta=dict(image.meta)), "head"
        if not mask.any():
            raise ImageIntensityError(source_name(image), "all of it is air", self.remedy)
        result[self.keys[0]] = image * mask.as_tensor().to(image.device)
        return result | {self.mask_key: mask, "brain_source": source}


class HeadCTMaskd(HeadMaskd):
    """The head in a CT that is windowed to 0 ... 255, and what tells that it is one.

    Added: `air_level`, the grey value of air (NaN where there is none), and `bone_share`, what of all that is not air
    is as bright as bone.

    Args:
        air: highest grey value of air.
    """

    remedy = "give a head CT, with air at 25"

    def __init__(self, keys: KeysCollection, mask_key: str, air: float) -> None:
        super().__init__(keys, mask_key)
        self.air = air

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the data with the mask, `air_level` and `bone_share`. Raises as `HeadMaskd`."""
        result = super().__call__(data)
        values = data[self.keys[0]].as_tensor().cpu().numpy()
        air, rest = values[values <= self.air], values[values > self.air]
        air_level = float(np.median(air)) if air.size else np.nan
        return result | {"air_level": air_level, "bone_share": float((rest >= BONE).mean()) if rest.size else np.nan}

    def brightness(self, image: MetaTensor) -> tuple[np.ndarray, float]:
        """Grey values. Raises ImageIntensityError for what is not windowed."""
        low, high = float(image.min()), float(image.max())
        if low < 0 or high > 255:
            fact = f"grey values from {low:g} to {high:g}, not windowed to 0 ... 255"
            raise ImageIntensityError(source_name(image), fact, "window the CT, with air at 25")
        return image.as_tensor()[0].cpu().numpy(), self.air


class HeadMRMaskd(HeadMaskd):
    """The head in MR: brighter, in the mean of its modalities, than the triangle threshold (Zack et al. 1977)."""

    remedy = "give a scan of a head"

    def brightness(self, image: MetaTensor) -> tuple[np.ndarray, float]:
        """Mean over the modalities, each as a share of its 98th percentile, and what is air in it."""
        values = image.as_tensor().clamp(min=0).double().cpu().numpy()
        levels = np.percentile(values, 98, axis=(1, 2, 3), keepdims=True)
        if not (levels > 0).all():
            raise ImageIntensityError(source_name(image), "hardly a voxel is above 0", self.remedy)
        mean = np.minimum(values / levels, 1).mean(axis=0).astype(np.float32)
        triangle = SimpleITK.TriangleThresholdImageFilter()
        triangle.Execute(SimpleITK.GetImageFromArray(mean))
        return mean, triangle.GetThreshold()


def head_mask(image: np.ndarray, air: float, axial: int = 2) -> np.ndarray:
    """(H, W, D) -> same, bool; slices along `axial` do not see each other."""
    in_plane = [1 if axis == axial else 3 for axis in range(3)]
    dense = ndimage.median_filter(image, size=in_plane) > air
    opened = ndimage.binary_opening(dense, structure=np.ones(in_plane))
    cross = ndimage.generate_binary_structure(3, 1)
    cross[tuple([0, 2] if axis == axial else slice(None) for axis in range(3))] = False
    return ndimage.binary_fill_holes(opened, structure=cross)


class ScaleGreyValuesd(MapTransform):
    """x / 255 in the foreground, at least 1 / 255 there and at most 1; else exactly 0.

    No percentile: grey values of a windowed CT mean the same in every image.
    """

    def __init__(self, keys: KeysCollection, foreground_key: str) -> None:
        super().__init__(keys)
        self.foreground_key = foreground_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the data with scaled images, and `meta["intensity_unit"]`."""
        result = dict(data)
        foreground = result[self.foreground_key].as_tensor() > 0
        for key in self.key_iterator(result):
            result[key] = (result[key] / 255).clamp(FOREGROUND_FLOOR, 1.0) * foreground
            result[key].meta["intensity_unit"] = [255.0]
        return result
