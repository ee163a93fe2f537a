"""Intensities from scanner units to [0, 1], the same way for training and inference."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import SimpleITK
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

from ..errors import ImageIntensityError
from ..images.check import source_name

FOREGROUND_FLOOR = 1 / 255  # foreground is never exactly 0, so that `image > 0` tells it from the background


class ScaleIntensityByForegroundd(MapTransform):
    """x * upper / (percentile of the foreground, per channel), clipped to [1 / 255, 1]; background exactly 0.

    MONAI's `ScaleIntensityRangePercentiles` counts the background too. The papers clip at the 98th percentile itself,
    which erases bright lesions; with `upper` below 1 there is room above it.

    The factor that brings values back to the image's own units is kept in `meta["intensity_unit"]` (one per channel).

    Args:
        keys: images (C, H, W, D).
        foreground_key: their foreground (1, H, W, D) bool.
        percentile: of the foreground's values, 0 to 100.
        upper: what that percentile becomes, at most 1.
    """

    def __init__(self, keys: KeysCollection, foreground_key: str, percentile: float = 98.0, upper: float = 0.8) -> None:
        super().__init__(keys)
        self.foreground_key = foreground_key
        self.percentile = percentile
        self.upper = upper

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the data with scaled images. Raises ImageIntensityError where the percentile is not positive."""
        result = dict(data)
        foreground = result[self.foreground_key].as_tensor().bool()
        for key in self.key_iterator(result):
            image = result[key]
            units = []
            for channel in image.as_tensor():
                level = float(np.percentile(channel[foreground[0]].double().cpu().numpy(), self.percentile))
                if not level > 0:
                    fact = f"the {self.percentile:g}th percentile of the foreground is {level:g}"
                    raise ImageIntensityError(source_name(image), fact, "give an image whose tissue is above 0")
                units.append(level / self.upper)
            unit = image.new_tensor(units).view(-1, 1, 1, 1).as_tensor()
            result[key] = (image / unit).clamp(FOREGROUND_FLOOR, 1.0) * foreground
            result[key].meta["intensity_unit"] = units
        return result


class SubtractZerod(MapTransform):
    """Shift grey values from which a mean was taken away, so that no signal is 0; others stay as they are, bit for bit.

    Args:
        keys: one image (C, H, W, D).
        foreground_key: its foreground (1, H, W, D) bool; the background stays 0.
        zero_key: where the item says what no signal is, (C,), if it is not 0, see `BrainMaskd`.
    """

    def __init__(self, keys: KeysCollection, foreground_key: str, zero_key: str = "intensity_zero") -> None:
        super().__init__(keys)
        self.foreground_key = foreground_key
        self.zero_key = zero_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the data with the shifted image."""
        if self.zero_key not in data:
            return dict(data)
        image, foreground = data[self.keys[0]], data[self.foreground_key].as_tensor()
        zero = data[self.zero_key].view(-1, 1, 1, 1).to(image.device)
        return dict(data) | {self.keys[0]: (image - zero) * foreground.to(image.device)}


class CorrectBiasFieldd(MapTransform):
    """Divide an image by its bias field (N4, Tustison et al. 2010, by SimpleITK), which is kept as another image.

    The coils of a scanner make tissue brighter here than there; a network that has seen one scanner only takes that for
    part of the anatomy, and the image of another scanner for abnormal.

    Args:
        keys: one image (C, H, W, D); the field of each channel is found by itself.
        foreground_key: its foreground (1, H, W, D) bool, where the field is looked for.
        field_key: where the field is put, (C, H, W, D) on the image's grid; its geometric mean in the tissue is 1.
    """

    SPACING_MM = 8.0  # of the grid on which the field is looked for
    ITERATIONS = (50,) * 3  # at most, with 1, 2 and 4 splines along the brain: a fourth level would fit lesions too

    def __init__(self, keys: KeysCollection, foreground_key: str, field_key: str = "bias_field") -> None:
        super().__init__(keys)
        self.foreground_key = foreground_key
        self.field_key = field_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the data with the corrected image and its field."""
        image: MetaTensor = data[self.keys[0]]
        foreground = data[self.foreground_key].as_tensor().bool()[0].cpu().numpy()
        steps = [round(self.SPACING_MM / spacing) for spacing in image.pixdim.tolist()]
        shrink = [max(min(step, size // 4), 1) for step, size in zip(steps, foreground.shape, strict=True)]
        fields = [self._field(channel, foreground, shrink) for channel in image.as_tensor().cpu().numpy()]
        field = torch.from_numpy(np.stack(fields)).to(image.device)
        return dict(data) | {self.keys[0]: image / field, self.field_key: MetaTensor(field, affine=image.affine)}

    def _field(self, channel: np.ndarray, foreground: np.ndarray, shrink: list[int]) -> np.ndarray:
        """(H, W, D) -> float32, the same; of a single slice in its two dimensions."""
        thick = [axis for axis, size in enumerate(channel.shape) if size > 1]
        tissue = foreground & (channel > 0)
        image, mask = (SimpleITK.GetImageFromArray(x.squeeze().T) for x in (channel, tissue.astype(np.uint8)))
        correction = SimpleITK.N4BiasFieldCorrectionImageFilter()
        correction.SetMaximumNumberOfIterations(self.ITERATIONS)
        correction.SetNumberOfThreads(1)  # sums in another order would be other sums
        correction.Execute(*(SimpleITK.Shrink(x, [shrink[axis] for axis in thick]) for x in (image, mask)))
        logarithm = SimpleITK.GetArrayFromImage(correction.GetLogBiasFieldAsImage(image)).T.reshape(channel.shape)
        if not tissue.any():
            return np.ones_like(channel, dtype=np.float32)
        # in float64, rounded once: in float32 the last bit is another in each version of numpy
        logarithm = logarithm.astype(np.float64)
        return np.exp(logarithm - logarithm[tissue].mean()).astype(np.float32)
