"""Intensities from scanner units to [0, 1], the same way for training and inference."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
from monai.config import KeysCollection
from monai.transforms import MapTransform

from ..errors import ImageIntensityError
from .check import source_name

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
                level = float(np.percentile(channel[foreground[0]].cpu().numpy(), self.percentile))
                if not level > 0:
                    fact = f"the {self.percentile:g}th percentile of the foreground is {level:g}"
                    raise ImageIntensityError(source_name(image), fact, "give an image whose tissue is above 0")
                units.append(level / self.upper)
            unit = image.new_tensor(units).view(-1, 1, 1, 1).as_tensor()
            result[key] = (image / unit).clamp(FOREGROUND_FLOOR, 1.0) * foreground
            result[key].meta["intensity_unit"] = units
        return result
