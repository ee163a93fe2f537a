"""What a report draws of an evaluation: the curves of the pooled voxels, and the score of every slice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .histograms import at_or_above, bin_lower_edge, dice_curve
from .subject_record import SubjectRecord

N_POINTS = 200


def pooled_curves(records: Sequence[SubjectRecord]) -> dict[str, list[float]]:
    """`threshold` (rising), `precision`, `recall` and `dice` where map >= threshold; empty without a lesion.

    About `N_POINTS` points at even steps of recall, and the one of the highest Dice.
    """
    bins = np.unique(np.concatenate([np.empty(0, np.int32), *(r.bins for r in records)]))
    pos, neg = np.zeros((2, len(bins)))
    for r in records:
        columns = np.searchsorted(bins, r.bins)
        pos[columns] += r.pos
        neg[columns] += r.neg
    if not pos.any():
        return {"threshold": [], "precision": [], "recall": [], "dice": []}
    true, false = at_or_above(pos), at_or_above(neg)
    recall, dice = true / true[0], dice_curve(pos, neg)
    # of the bins with at least a wished recall the highest, which has the best precision among them
    chosen = np.searchsorted(-recall, -np.linspace(1, 0, N_POINTS), side="right") - 1
    points = np.unique(np.append(chosen, dice.argmax()))
    curves = {
        "threshold": bin_lower_edge(bins).astype(float),
        "precision": true / np.maximum(true + false, 1),
        "recall": recall,
        "dice": dice,
    }
    return {name: _rounded(values[points]) for name, values in curves.items()}


def all_slice_scores(subjects: Sequence[str], records: Sequence[SubjectRecord]) -> dict[str, list[Any]]:
    """`subject`, `slice`, `score`, `method_score` and `abnormal` of the slices with foreground, one entry a slice."""
    of_method = np.concatenate([r.method_slice_scores for r in records])
    return {
        "subject": [name for name, r in zip(subjects, records, strict=True) for _ in r.slices],
        "slice": [int(index) for r in records for index in r.slices],
        "score": _rounded(np.concatenate([r.slice_scores for r in records])),
        "method_score": [None if np.isnan(x) else _rounded(x[None])[0] for x in of_method],
        "abnormal": [bool(label) for r in records for label in r.slice_labels],
    }


def _rounded(values: NDArray[np.float64]) -> list[float]:
    """Six digits, as many as a float32 has."""
    return [float(f"{value:.6g}") for value in values]
