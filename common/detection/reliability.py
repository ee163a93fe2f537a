"""Whether a bundle can know: signs that an image is unlike those that its network and calibration have seen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

OK, UNRELIABLE = "ok", "unreliable"
# what the preprocessing and the normalisation measure of an image, a number each; NaN where it could not be measured
MEASURED = ("map_scale", "contrast_order", "vessel_share", "air_level", "bone_share")

# The limits lie in the gaps between the groups of docs/reliability.md
SCALE_FACTOR = 1.55  # times the largest scale of the healthy subjects of the calibration
LEAST_ORDER = 0.25  # T1: 0.33 and more, of healthy subjects 0.45 and more; FLAIR and T2: 0.19 and less
MOST_VESSELS = 0.005  # T1: 0.0045 and less, of healthy subjects 0.002 and less; after contrast agent 0.0065 and more
MAX_SPACING_MM = 3.5  # thicker slices mix the tissues of several slices that the network was trained on
CT_AIR, CT_AIR_TOLERANCE = 25.0, 10.0  # grey values; MR has 0 to 4
LEAST_BONE = 0.04  # of all that is not air; CT: 0.15 and more, of single slices 0.07; MR: 0.015 and less


def doubts(
    measured: Mapping[str, float],
    healthy_scales: Tensor | None = None,
    tissue_modes: Sequence[float] | None = None,
    spacing_mm: Sequence[float] = (),
) -> list[str]:
    """Reasons not to believe the result of a case, one line each; none where nothing is known.

    Args:
        measured: of the image, what is known of `MEASURED`: `map_scale`, by which the map was divided, which says how
            well the network understood the image; `contrast_order` and `vessel_share` (`common.transforms.tissue`);
            `air_level` and `bone_share` (`common.transforms.head`).
        healthy_scales: quantiles of `map_scale` among the healthy subjects of the calibration.
        tissue_modes: of CSF, grey and white matter, NaN where they were not found.
        spacing_mm: of the voxels of the input.
    """
    reasons = []
    scale = measured.get("map_scale", math.nan)
    if healthy_scales is not None and scale > SCALE_FACTOR * float(healthy_scales[-1]):
        times = scale / float(healthy_scales[len(healthy_scales) // 2])
        reasons.append(
            f"the reconstruction differs from the image {times:.1f} times as much as in a healthy subject of the "
            "calibration: the image is of another contrast than the training data, or not a brain alone"
        )
    reasons += _doubts_of_contrast(measured, tissue_modes) + _doubts_of_ct(measured)
    if len(spacing_mm) and max(spacing_mm) > MAX_SPACING_MM:
        reasons.append(f"slices of {max(spacing_mm):.1f} mm, the networks were trained on thin ones")
    return reasons


def _doubts_of_contrast(measured: Mapping[str, float], tissue_modes: Sequence[float] | None) -> list[str]:
    reasons = []
    if tissue_modes is not None and np.isnan(np.asarray(tissue_modes)).any():
        reasons.append("CSF, grey and white matter do not show as in a T1 image: the image is of another contrast")
    if measured.get("contrast_order", math.inf) < LEAST_ORDER:
        reasons.append(
            "the brightest tissue does not lie within the darker one, as white matter lies within grey matter in a T1 "
            "image: the image is a FLAIR, a T2 or of another contrast"
        )
    if (vessels := measured.get("vessel_share", 0.0)) > MOST_VESSELS:
        reasons.append(
            f"thin structures much brighter than white matter fill {vessels:.1%} of the brain, as vessels do after "
            "contrast agent: the networks were trained on images without it"
        )
    return reasons


def _doubts_of_ct(measured: Mapping[str, float]) -> list[str]:
    reasons, remedy = [], "the image is no head CT, or windowed in another way than the training data"
    air = measured.get("air_level", CT_AIR)
    if abs(air - CT_AIR) > CT_AIR_TOLERANCE:
        reasons.append(f"air has the grey value {air:.0f} instead of {CT_AIR:.0f}: {remedy}")
    if (bone := measured.get("bone_share", math.inf)) < LEAST_BONE:
        reasons.append(f"{bone:.1%} of the head is as bright as bone, where at least {LEAST_BONE:.0%} are: {remedy}")
    return reasons


def verdict(reasons: Sequence[str]) -> dict[str, Any]:
    """`reliability` (`ok` or `unreliable`) and `doubts`, for the record."""
    return {"reliability": UNRELIABLE if reasons else OK, "doubts": list(reasons)}
