"""Whether a bundle can know: signs that an image is unlike those that its network and calibration have seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

OK, UNRELIABLE = "ok", "unreliable"

SCALE_FACTOR = 1.4  # times the largest scale of the healthy subjects of the calibration
MAX_SPACING_MM = 3.5  # thicker slices mix the tissues of several slices that the network was trained on


def doubts(
    map_scale: float | None = None,
    healthy_scales: Tensor | None = None,
    tissue_modes: Sequence[float] | None = None,
    spacing_mm: Sequence[float] = (),
) -> list[str]:
    """Reasons not to believe the result of a case, one line each; none where nothing is known.

    Args:
        map_scale: by which the map was divided: how well the network understood the image.
        healthy_scales: quantiles of it among the healthy subjects of the calibration.
        tissue_modes: of CSF, grey and white matter, NaN where they were not found.
        spacing_mm: of the voxels of the input.
    """
    reasons = []
    if map_scale is not None and healthy_scales is not None:
        limit = SCALE_FACTOR * float(healthy_scales[-1])
        if map_scale > limit:
            times = map_scale / float(healthy_scales[len(healthy_scales) // 2])
            reasons.append(
                f"the reconstruction differs from the image {times:.1f} times as much as in a healthy subject of the "
                "calibration: the image is of another contrast than the training data, or not a brain alone"
            )
    if tissue_modes is not None and np.isnan(np.asarray(tissue_modes)).any():
        reasons.append("CSF, grey and white matter do not show as in a T1 image: the image is of another contrast")
    if len(spacing_mm) and max(spacing_mm) > MAX_SPACING_MM:
        reasons.append(f"slices of {max(spacing_mm):.1f} mm, the networks were trained on thin ones")
    return reasons


def verdict(reasons: Sequence[str]) -> dict[str, Any]:
    """`reliability` (`ok` or `unreliable`) and `doubts`, for the record."""
    return {"reliability": UNRELIABLE if reasons else OK, "doubts": list(reasons)}
