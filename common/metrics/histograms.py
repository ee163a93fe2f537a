"""Detection metrics from histograms of the scores of abnormal and of normal elements.

torchmetrics computes the same from all scores at once. Histograms are used instead because they add up: over subjects
(so that a cohort never lies in memory) and with weights (so that a bootstrap is one matrix product); torchmetrics also
passes scores outside [0, 1] through a sigmoid, which merges high ones into ties. The tests compare with torchmetrics.

In all functions `pos` and `neg` are (..., K): how many abnormal / normal elements (voxels or slices) fall into each
bin, bins in rising order of score, any real weight >= 0. Predictions are "this bin and all above it"; elements of one
bin are ties. The result has the leading shape and is NaN where it is undefined.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[Any]  # integers, or sums of weights
Floats = NDArray[np.float64]

# A bin is a float32 cut to 9 bits of mantissa: 512 bins per octave, hence 0.2 % wide at most, at any scale of the map
# and without a range to choose. Bit patterns of floats >= 0 rise with the value, so the index is a shift.
_DROPPED_BITS = 23 - 9


def bin_index(values: NDArray[np.float32]) -> NDArray[np.int32]:
    """Logarithmic bin of every value (any shape, float32, finite and >= 0); 0 has its own bin, 0."""
    return (values + np.float32(0)).view(np.int32) >> _DROPPED_BITS  # + 0 turns -0.0, whose sign bit is set, into 0.0


def bin_lower_edge(index: NDArray[np.int32]) -> NDArray[np.float32]:
    """The smallest value of every bin, float32 of the shape of `index`."""
    return (np.asarray(index, dtype=np.int32) << _DROPPED_BITS).view(np.float32)


def exact_histograms(scores: NDArray[Any], labels: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """`pos` and `neg` with one bin per different score: (N,) scores of any scale, (N,) bool -> two times (K,)."""
    distinct, bins = np.unique(scores, return_inverse=True)
    labels = labels.astype(bool)
    return np.bincount(bins[labels], minlength=len(distinct)), np.bincount(bins[~labels], minlength=len(distinct))


def at_or_above(histogram: Counts) -> Counts:
    """How many elements lie in each bin or above it, (..., K) -> (..., K)."""
    return np.flip(np.cumsum(np.flip(histogram, -1), axis=-1), -1)


def average_precision(pos: Counts, neg: Counts) -> Floats:
    """Area under the precision-recall curve as a step function: sum of precision times the rise of recall."""
    true, false = at_or_above(pos), at_or_above(neg)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.where(true > 0, true / (true + false), 0)
        return (precision * pos).sum(-1) / true[..., 0]


def auroc(pos: Counts, neg: Counts) -> Floats:
    """P(abnormal scores higher than normal), ties count one half: the area under the ROC curve by trapezoids."""
    above = at_or_above(pos)
    with np.errstate(invalid="ignore"):
        return ((above - pos / 2) * neg).sum(-1) / (above[..., 0] * neg.sum(-1))


def dice_curve(pos: Counts, neg: Counts) -> Floats:
    """Dice = 2 TP / (P + G) of the prediction "this bin and above", (..., K); NaN without abnormal elements."""
    true, predicted = at_or_above(pos), at_or_above(pos) + at_or_above(neg)
    abnormal = true[..., :1]
    with np.errstate(invalid="ignore"):
        return np.where(abnormal > 0, 2 * true / (predicted + abnormal), np.nan)


def max_dice(pos: Counts, neg: Counts) -> Floats:
    """Highest Dice over all thresholds. ORACLE: the threshold is chosen with the labels, so this is an upper bound."""
    return dice_curve(pos, neg).max(-1)
