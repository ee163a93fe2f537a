"""From the records of the subjects to metrics with bootstrap intervals.

Every metric is a function of weights (B, S), how often each of the S subjects counts: ones give the value, multinomial
draws give the resamples, so that a value and its interval come from the same lines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .histograms import auroc, average_precision, bin_lower_edge, dice_curve, exact_histograms
from .lesions import N_SIZES, SIZE_BOUNDS_ML
from .subject_record import SubjectRecord

Replicates = dict[str, NDArray[np.float64]]  # metric -> (B,), one value per row of the weights
PAIRED = ("auprc", "dice_at_threshold")  # metrics whose replicates are kept, to compare methods on the same resamples
FEW_SUBJECTS = 5  # an interval over fewer is marked: so few say little about the spread between subjects
_CHUNK = 2**21  # replicates x bins held at once, 16 MB per array


class _Statistic(NamedTuple):
    """Metrics as a function of the weights, and which of the S subjects they rest on."""

    function: Callable[[NDArray[np.float64]], Replicates]
    subjects: NDArray[np.bool_]
    n_bins: int = 1


def metrics_with_intervals(records: Sequence[SubjectRecord], seed: int, n_bootstrap: int) -> dict[str, Any]:
    """All metrics as `{"value": ..., "ci95": [low, high]}` and, a plain number, `oracle_threshold`; None if undefined.

    An interval over fewer than `FEW_SUBJECTS` is marked by `few_subjects`, their number, beside these two.

    `sites` and `lesion_sizes` have such metrics for each site and group of lesions, `replicates` the values of `PAIRED`
    in each resample.

    The intervals are the 2.5th and 97.5th percentile over resamples of the subjects with replacement.
    """
    n = len(records)
    resamples = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_bootstrap).astype(float)
    voxels, oracle_threshold = _voxels(records)
    statistics = (
        voxels,
        _dice_at_threshold(records),
        _voxel_recall(records),
        _slices([r.slice_scores for r in records], records),
        _slices([r.method_slice_scores for r in records], records, "_method"),
        *_volumes(records),
        _false_positives(records),
        _mean_over_subjects("psnr", np.array([r.psnr for r in records])),
        _mean_over_subjects("ssim", np.array([r.ssim for r in records])),
        _lesion_shares(records),
        _lesion_wise(records),
        _healthy_false_lesions(records),
    )
    result: dict[str, Any] = {}
    kept: dict[str, list[float | None]] = {}
    for statistic in statistics:
        metrics, replicates = _measured(statistic, resamples)
        result |= metrics
        kept |= {name: [_defined(x) for x in replicates[name]] for name in PAIRED if name in metrics}
    result |= {"healthy_worst_share": _with_interval(_worst_share(records), np.empty(0))}
    result |= {"oracle_threshold": oracle_threshold, "sites": _sites(records, resamples)}
    return result | {"lesion_sizes": _lesion_sizes(records, resamples), "replicates": kept}


def paired_difference(result: Mapping[str, Any], other: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """A metric of one result minus that of another, `{"value", "ci95"}`, from the same resamples of the same subjects.

    The results are those of `DetectionMetrics.compute`, with one seed; the metric is one of `PAIRED`.
    """
    values = [np.nan if r[metric]["value"] is None else r[metric]["value"] for r in (result, other)]
    replicates = [np.array(r["replicates"][metric], dtype=float) for r in (result, other)]  # None becomes NaN
    return _with_interval(values[0] - values[1], replicates[0] - replicates[1])


def _voxels(records: Sequence[SubjectRecord]) -> tuple[_Statistic, float | None]:
    """Metrics of the pooled voxels, and the threshold of the highest pooled Dice."""
    lesion = np.array([r.has_lesion for r in records])
    with_lesion = [r for r in records if r.has_lesion]
    # the union of the occupied bins; without a lesion one empty bin, so that every metric comes out undefined
    bins = np.unique(np.concatenate([r.bins for r in with_lesion])) if with_lesion else np.zeros(1, np.int32)
    pos, neg, dice = np.zeros((3, len(with_lesion), len(bins)))
    for row, r in enumerate(with_lesion):
        columns = np.searchsorted(bins, r.bins)
        pos[row, columns], neg[row, columns] = r.pos, r.neg
        # a threshold between two occupied bins predicts the same as the next occupied one, nothing above the last
        dice[row] = np.append(r.dice_sum, 0)[np.searchsorted(r.bins, bins)]
    n_slices = np.array([r.n_lesion_slices for r in with_lesion], dtype=float)

    def metrics(weights: NDArray[np.float64]) -> Replicates:
        w = weights[:, lesion]
        p, n = w @ pos, w @ neg
        return {
            "auprc": average_precision(p, n),
            "auroc": auroc(p, n),
            "max_dice_pooled": dice_curve(p, n).max(-1),
            "max_dice_mean": _ratio((w @ dice).max(-1), w @ n_slices),
        }

    oracle_threshold = None
    if n_slices.any():
        best = bins[dice_curve(pos.sum(0), neg.sum(0)).argmax()]
        # the next smaller float: this bin is predicted, and the rule is map > threshold
        oracle_threshold = float(np.nextafter(bin_lower_edge(best), np.float32(-1)))
    return _Statistic(metrics, lesion, len(bins)), oracle_threshold


def _slices(scores: Sequence[NDArray[np.float64]], records: Sequence[SubjectRecord], suffix: str = "") -> _Statistic:
    """Image-level metrics by scores (N,) of each subject; one bin per different score, so they are exact."""
    used = np.array([bool(np.isfinite(x).all()) for x in scores])
    levels = np.unique(np.concatenate([np.zeros(1), *(x for x, known in zip(scores, used, strict=True) if known)]))
    pos, neg = np.zeros((2, len(records), len(levels)))
    for row in np.flatnonzero(used).tolist():
        columns = np.searchsorted(levels, np.unique(scores[row]))
        pos[row, columns], neg[row, columns] = exact_histograms(scores[row], records[row].slice_labels)

    def metrics(w: NDArray[np.float64]) -> Replicates:
        p, n = w @ pos, w @ neg
        return {f"image_auroc{suffix}": auroc(p, n), f"image_auprc{suffix}": average_precision(p, n)}

    return _Statistic(metrics, used, len(levels))


def _dice_at_threshold(records: Sequence[SubjectRecord]) -> _Statistic:
    used = np.array([r.has_lesion and r.at_threshold is not None for r in records])
    true, predicted = _at_threshold(records)
    truth = np.array([r.lesion_voxels for r in records], dtype=float)

    def metrics(weights: NDArray[np.float64]) -> Replicates:
        w = weights * used
        dice = _ratio(w @ (2 * true), w @ (predicted + truth))
        return {"dice_at_threshold": np.where(w @ truth > 0, dice, np.nan)}

    return _Statistic(metrics, used)


def _volumes(records: Sequence[SubjectRecord]) -> list[_Statistic]:
    """Whole volumes by their score, by their largest component where there is a threshold, by the method's score."""
    everyone = np.ones(len(records), dtype=bool)
    known = np.array([r.at_threshold is not None for r in records])
    scores = np.array([r.volume_score for r in records])
    clusters = np.array([r.lesions.largest_ml for r in records])
    of_method = np.array([r.method_score for r in records])
    named = {
        "volume_auroc": (scores, everyone),
        "volume_auroc_cluster": (clusters, known),
        "volume_auroc_method": (of_method, np.isfinite(of_method)),
    }
    return [_ranked(name, records, *values) for name, values in named.items()]


def _ranked(
    name: str, records: Sequence[SubjectRecord], values: NDArray[np.float64], used: NDArray[np.bool_]
) -> _Statistic:
    """AUROC of one value a subject; exact, as every different value has a bin."""
    levels, columns = np.unique(values, return_inverse=True)
    lesion = np.array([r.has_lesion for r in records])
    pos, neg = np.zeros((2, len(records), len(levels)))
    pos[np.arange(len(records)), columns] = lesion & used
    neg[np.arange(len(records)), columns] = ~lesion & used
    return _Statistic(lambda w: {name: auroc(w @ pos, w @ neg)}, used, len(levels))


def _voxel_recall(records: Sequence[SubjectRecord]) -> _Statistic:
    used = np.array([r.has_lesion and r.at_threshold is not None for r in records])
    true, _ = _at_threshold(records) * used
    truth = np.array([r.lesion_voxels for r in records]) * used
    return _Statistic(lambda w: {"voxel_recall_at_threshold": _ratio(w @ true, w @ truth)}, used)


def _sites(records: Sequence[SubjectRecord], resamples: NDArray[np.float64]) -> list[dict[str, Any]]:
    """The false alarms and the recall of each site, in the same resamples."""
    of_sites = []
    for site in sorted({r.site for r in records}):
        here = np.array([r.site == site for r in records])
        own = [r for r in records if r.site == site]
        summed: dict[str, Any] = {
            "site": site,
            "n_healthy": sum(not r.has_lesion for r in own),
            "n_lesion_subjects": sum(r.has_lesion for r in own),
        }
        for statistic in (_mean_over_subjects("healthy_share", _healthy_shares(own)), _voxel_recall(own)):
            summed |= _measured(statistic, resamples[:, here])[0]
        of_sites.append(summed | {"healthy_worst_share": _with_interval(_worst_share(own), np.empty(0))})
    return of_sites


def _healthy_shares(records: Sequence[SubjectRecord]) -> NDArray[np.float64]:
    """(S,) share of each healthy subject's foreground above the threshold, NaN of the others."""
    return np.array(
        [np.nan if r.has_lesion or r.at_threshold is None else r.at_threshold[1] / r.foreground_voxels for r in records]
    )


def _worst_share(records: Sequence[SubjectRecord]) -> float:
    shares = _healthy_shares(records)
    return float(np.max(shares, where=np.isfinite(shares), initial=-1)) if np.isfinite(shares).any() else math.nan


def _false_positives(records: Sequence[SubjectRecord]) -> _Statistic:
    used = np.array([not r.has_lesion and r.at_threshold is not None for r in records])
    _, predicted = _at_threshold(records) * used
    foreground = np.array([r.foreground_voxels for r in records]) * used
    return _Statistic(lambda w: {"healthy_fp_share": _ratio(w @ predicted, w @ foreground)}, used)


def _lesion_shares(records: Sequence[SubjectRecord]) -> _Statistic:
    lesion = np.array([r.has_lesion for r in records])
    inside = np.array([r.lesion_voxels for r in records], dtype=float)
    outside = np.array([r.lesion_voxels_outside for r in records], dtype=float)
    foreground = np.array([r.foreground_voxels for r in records], dtype=float) * lesion

    def metrics(w: NDArray[np.float64]) -> Replicates:
        return {
            "lesion_share": _ratio(w @ inside, w @ foreground),
            "lesion_share_outside_foreground": _ratio(w @ outside, w @ (inside + outside)),
        }

    return _Statistic(metrics, lesion)


def _lesion_wise(records: Sequence[SubjectRecord]) -> _Statistic:
    used = np.array([r.has_lesion and r.at_threshold is not None for r in records])
    counts = [(r.lesions.lesions.sum(), r.lesions.found.sum(), r.lesions.paired) for r in records]
    lesions, found, paired = np.array(counts, dtype=float).T * used
    predicted, true = np.array([(r.lesions.predicted, r.lesions.predicted_true) for r in records], dtype=float).T * used

    def metrics(w: NDArray[np.float64]) -> Replicates:
        n_lesions, n_predicted = w @ lesions, w @ predicted
        recall, precision = _ratio(w @ found, n_lesions), _ratio(w @ true, n_predicted)
        harmonic = np.where(w @ found > 0, _ratio(2 * precision * recall, precision + recall), 0)
        return {
            "lesion_recall": recall,
            "lesion_precision": precision,
            "lesion_f1": np.where(n_lesions > 0, harmonic, np.nan),
            "lesion_recall_iou": _ratio(w @ paired, n_lesions),
            "lesion_precision_iou": _ratio(w @ paired, n_predicted),
            "lesion_f1_iou": np.where(n_lesions > 0, _ratio(2 * (w @ paired), n_lesions + n_predicted), np.nan),
        }

    return _Statistic(metrics, used)


def _lesion_sizes(records: Sequence[SubjectRecord], resamples: NDArray[np.float64]) -> list[dict[str, Any]]:
    bounds = [0.0, *SIZE_BOUNDS_ML, None]
    used = np.array([r.at_threshold is not None for r in records])
    groups = []
    for size in range(N_SIZES):
        n_lesions, found, voxels, voxels_found = np.array(
            [
                [c[size] for c in (r.lesions.lesions, r.lesions.found, r.lesions.voxels, r.lesions.voxels_found)]
                for r in records
            ],
            dtype=float,
        ).T
        ratios = {"lesion_recall": (found, n_lesions * used), "voxel_recall": (voxels_found, voxels * used)}

        def metrics(w: NDArray[np.float64], ratios: Mapping[str, tuple[Any, Any]] = ratios) -> Replicates:
            return {name: _ratio(w @ numerator, w @ denominator) for name, (numerator, denominator) in ratios.items()}

        recalls, _ = _measured(_Statistic(metrics, used & (n_lesions > 0)), resamples)
        groups.append({"ml": bounds[size : size + 2], "n_lesions": int(n_lesions.sum()), **recalls})
    return groups


def _healthy_false_lesions(records: Sequence[SubjectRecord]) -> _Statistic:
    used = np.array([not r.has_lesion and r.at_threshold is not None for r in records])
    predicted = np.array([r.lesions.predicted for r in records]) * used
    return _Statistic(lambda w: {"healthy_false_lesions": _ratio(w @ predicted, w @ used.astype(float))}, used)


def _mean_over_subjects(name: str, values: NDArray[np.float64]) -> _Statistic:
    known = np.isfinite(values)
    return _Statistic(lambda w: {name: _ratio(w[:, known] @ values[known], w[:, known].sum(1))}, known)


def _at_threshold(records: Sequence[SubjectRecord]) -> NDArray[np.float64]:
    """(2, S): true positive and all predicted voxels of each subject; 0 without a threshold."""
    return np.array([r.at_threshold or (0, 0) for r in records], dtype=float).T


def _ratio(numerator: NDArray[np.float64], denominator: NDArray[np.float64]) -> NDArray[np.float64]:
    """NaN where the denominator is 0: undefined, not zero."""
    return np.divide(numerator, denominator, out=np.full(np.shape(denominator), np.nan), where=denominator > 0)


def _measured(statistic: _Statistic, resamples: NDArray[np.float64]) -> tuple[dict[str, dict[str, Any]], Replicates]:
    """The metrics of all subjects with their intervals, and in each resample.

    There are no resamples where they rest on fewer than two subjects: one says nothing about the spread between them.
    """
    values = {name: float(v[0]) for name, v in statistic.function(np.ones((1, resamples.shape[1]))).items()}
    subjects = int(statistic.subjects.sum())
    replicates = {name: np.empty(0) for name in values}
    if subjects >= 2:
        step = max(1, _CHUNK // statistic.n_bins)
        parts = [statistic.function(resamples[start : start + step]) for start in range(0, len(resamples), step)]
        replicates = {name: np.concatenate([part[name] for part in parts]) for name in values}
    return {name: _with_interval(values[name], replicates[name], subjects) for name in values}, replicates


def _with_interval(value: float, replicates: NDArray[np.float64], subjects: int = FEW_SUBJECTS) -> dict[str, Any]:
    """subjects: how many the value rests on."""
    defined = replicates[np.isfinite(replicates)]  # a resample may hold no lesion
    low_high = np.percentile(defined, [2.5, 97.5]) if len(defined) else (np.nan, np.nan)
    few = {"few_subjects": subjects} if len(defined) and subjects < FEW_SUBJECTS else {}
    return {"value": _defined(value), "ci95": [_defined(x) for x in low_high], **few}


def _defined(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
