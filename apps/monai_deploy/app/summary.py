"""The results of a volume in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.results.case import Case, describe, find_lesions


def summarise(about: Mapping[str, str], case: Case, result: Mapping[str, Any]) -> str:
    """Lines `name: value`: what `about` says, then score, threshold and lesions; nothing of the patient.

    Volumes are in ml, places are centroids in mm (right, anterior, superior), values are the map's.
    """
    lesions = find_lesions(case)
    found = describe(result, lesions)
    percentile = found["volume_score_percentile"]
    among = "" if percentile is None else f" (above {percentile:.0f} % of the healthy subjects)"
    lines = [
        *(f"{name}: {value}" for name, value in about.items()),
        f"score: {found['volume_score']:.6g}{among}",
        f"threshold: {found['threshold']:.6g}",
        f"above the threshold: {100 * found['abnormal_share']:.2f} % of the brain",
        f"lesions: {found['lesions']}, {found['lesion_volume_ml']:.2f} ml",
        *(f"lesion {number}: {_lesion(lesion)}" for number, lesion in enumerate(lesions, 1)),
        *(f"warning: {warning}" for warning in found["warnings"]),
    ]
    return "\n".join(lines) + "\n"


def _lesion(one: Mapping[str, float]) -> str:
    place = " ".join(str(round(one[axis])) for axis in ("x_mm", "y_mm", "z_mm"))
    return f"{one['volume_ml']:.2f} ml, centroid {place}, mean {one['mean_map']:.3g}, maximum {one['max_map']:.3g}"
