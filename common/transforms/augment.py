"""Random changes of the slices that the 2D methods train on, by the names of what they change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from monai.transforms import (
    RandAdjustContrastd,
    RandAffined,
    RandBiasFieldd,
    RandFlipd,
    RandHistogramShiftd,
    RandomizableTransform,
    RandScaleIntensityd,
)

BOTH = ("image", "foreground")


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
