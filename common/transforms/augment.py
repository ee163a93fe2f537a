"""Random changes of the slices that the 2D methods train on, by the names of what they change."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from monai.transforms import (
    MapTransform,
    RandAdjustContrastd,
    RandAffined,
    RandBiasFieldd,
    RandFlipd,
    RandHistogramShiftd,
    RandomizableTransform,
    RandScaleIntensityd,
)
from monai.utils import convert_to_dst_type

from ..errors import SettingError

BOTH = ("image", "foreground")
FAINTEST = 1e-3  # of a brain voxel: what is exactly 0 is background


def slices(
    affine: Mapping[str, Any] | None = None,
    bias_field: float = 0.0,
    gamma: tuple[float, float] | None = None,
    control_points: tuple[int, int] | None = None,
    gain: float = 0.0,
    prob: float = 0.5,
) -> list[RandomizableTransform]:
    """MONAI's transforms of an item of a `SliceDataset`, in this order; a flip of left and right is always among them.

    Args:
        affine: settings of `RandAffined`, if any: ranges, and `prob` where it is another one.
        bias_field: largest coefficient of a smooth field; 0 for none.
        gamma: range of the exponent of the contrast.
        control_points: range of their number, where the histogram is bent.
        gain: the intensity is multiplied by 1 - gain to 1 + gain; 0 for none.
        prob: of each.
    """
    found: list[Any] = [RandFlipd(BOTH, prob=prob, spatial_axis=0)]
    if affine is not None:
        ways = {"mode": ("bilinear", "nearest"), "padding_mode": "zeros"}
        found.append(RandAffined(BOTH, **({"prob": prob} | ways | dict(affine))))
    if bias_field:
        found.append(RandBiasFieldd("image", prob=prob, coeff_range=(-bias_field, bias_field)))
    if gamma is not None:
        found.append(RandAdjustContrastd("image", prob=prob, gamma=gamma))
    if control_points is not None:
        found.append(RandHistogramShiftd("image", prob=prob, num_control_points=control_points))
    if gain:
        found.append(RandScaleIntensityd("image", prob=prob, factors=gain))
    return found


class RandTissueContrastd(RandomizableTransform, MapTransform):
    """A T1 brain with the contrast of another sequence: a curve of its intensity, drawn anew for each item.

    The curve is linear between 0, the modes of the tissues and 1, where its values are drawn from a range each. What
    lies between two tissues in the T1 lies between them afterwards too, so that the border of fluid and white matter
    gets a rim of grey matter. The background stays 0, and the brain above it.

    Args:
        modes: of CSF, grey and white matter in the T1, rising, in (0, 1), see `StandardiseTissued`.
        ranges: lowest and highest value in [0, 1] at 0, CSF, grey matter, white matter and 1.

    Raises SettingError where they are no such numbers.
    """

    def __init__(
        self,
        keys: str | Sequence[str],
        modes: Sequence[float],
        ranges: Sequence[tuple[float, float]],
        prob: float = 1.0,
    ) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)
        self.knots = (0.0, *modes, 1.0)
        self.ranges = ranges
        if len(modes) != 3 or any(a >= b for a, b in zip(self.knots, self.knots[1:], strict=False)):
            raise SettingError("modes", f"{list(modes)} are no three rising numbers in (0, 1)", "give CSF, grey, white")
        if len(ranges) != 5 or not all(0 <= low <= high <= 1 for low, high in ranges):
            raise SettingError("ranges", f"{list(ranges)} are no five ranges in [0, 1]", "give one for each knot")

    def randomize(self, data: Any = None) -> None:
        """Draw the values of the curve."""
        super().randomize(data)
        self.values = [self.R.uniform(low, high) for low, high in self.ranges]

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Of an item with images in [0, 1] of any shape, 0 outside of the brain."""
        item = dict(data)
        self.randomize()
        if self._do_transform:
            for key in self.key_iterator(item):
                seen = np.asarray(item[key])
                changed = np.interp(seen, self.knots, self.values).clip(FAINTEST, 1) * (seen > 0)
                item[key], *_ = convert_to_dst_type(changed, item[key])
        return item
