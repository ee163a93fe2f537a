"""The evaluation protocols of the papers, by name, for comparison with published numbers.

They take all test images at once (maps, masks: (N, H, W)), count every pixel, background included, and are ORACLES:
the threshold is chosen on the test set with its labels. `DetectionMetrics` is what this project reports.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .histograms import exact_histograms, max_dice

_EPS = 1e-6  # in the denominator of Dice, in the reference programs of both papers


def mad_ad_max_dice(maps: NDArray[Any], masks: NDArray[Any]) -> float:
    """Highest mean per-image Dice over 201 common thresholds in [0, 1] (MAD-AD, Beizaee et al., IPMI 2025, BraTS'21).

    maps: (N, ...) float in [0, 1], positive where map > threshold; masks: (N, ...) bool or {0, 1}.
    An image without lesion counts 1 if nothing is predicted and 0 otherwise.
    """
    scores, lesions = _flat(maps, masks)
    truth = lesions.sum(1)
    best = 0.0
    for threshold in np.linspace(0, 1, 201):
        predicted = scores > threshold
        size = predicted.sum(1)
        dice = 2 * (predicted & lesions).sum(1) / (size + truth + _EPS)
        best = max(best, float(np.where(truth > 0, dice, size == 0).mean()))
    return best


def auto_ddpm_max_dice(maps: NDArray[Any], masks: NDArray[Any]) -> float:
    """Highest pooled Dice over 101 thresholds in [0, 1] (AutoDDPM, Bercea et al., 2023, the column with ceiling marks).

    maps: (N, ...) float in [0, 1], positive where map > threshold; masks: (N, ...) bool or {0, 1}. The grid is coarse
    for maps that are products of small numbers: see `global_max_dice` for the maximum over all thresholds.
    """
    scores, lesions = _flat(maps, masks)
    predictions = (scores > threshold for threshold in np.linspace(0, 1, 101))
    return max(float(2 * (p & lesions).sum() / (p.sum() + lesions.sum() + _EPS)) for p in predictions)


def global_max_dice(maps: NDArray[Any], masks: NDArray[Any]) -> float:
    """Highest F1 = Dice over all thresholds, all pixels pooled (MAD-AD, ATLAS: anomalib's `F1Max`).

    maps: (N, ...) float of any scale; masks: (N, ...) bool or {0, 1}. NaN without a lesion.
    """
    scores, lesions = _flat(maps, masks)
    return float(max_dice(*exact_histograms(scores.ravel(), lesions.ravel())))


def _flat(maps: NDArray[Any], masks: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    scores, lesions = np.asarray(maps), np.asarray(masks)
    if scores.shape != lesions.shape or scores.ndim < 2:
        raise ValueError(f"maps {scores.shape} and masks {lesions.shape} must have the same shape (N, ...)")
    return scores.reshape(len(scores), -1), lesions.reshape(len(lesions), -1) > 0
