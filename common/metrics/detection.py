"""Evaluation of anomaly maps over a cohort, one subject at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from monai.config import NdarrayOrTensor
from monai.utils import convert_to_numpy
from numpy.typing import NDArray

from .bootstrap import metrics_with_intervals
from .curves import all_slice_scores, pooled_curves
from .lesions import compare_lesions
from .reconstruction import psnr_outside_lesions, ssim_outside_lesions
from .subject_record import SubjectRecord, highest_share_mean, highest_share_means, voxel_histograms

_NO_HISTOGRAMS = np.empty(0, np.int32), np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0)


class DetectionMetrics:
    """Streaming evaluation: `update` once per subject, `compute` at the end; no voxels of a cohort are kept.

    Voxel metrics pool the foreground voxels of all slices of the subjects that have a lesion; image-level metrics are
    over the slices with foreground of all subjects. Maps of any scale are binned, 512 bins per octave, which moves
    AUPRC by less than 0.002 unless the map carries an offset far larger than its spread; Dice at the threshold, false
    positives and image-level metrics are exact.

    Args:
        axis: spatial axis along which the slices run; the last one for axial slices of volumes oriented RAS.
    """

    def __init__(self, axis: int = -1) -> None:
        self.axis = axis
        self._records: dict[str, SubjectRecord] = {}

    def update(
        self,
        subject: str,
        anomaly_map: NdarrayOrTensor,
        lesion: NdarrayOrTensor | None,
        foreground: NdarrayOrTensor,
        threshold: float | None = None,
        method_slice_scores: NdarrayOrTensor | None = None,
        method_score: float | None = None,
        image: NdarrayOrTensor | None = None,
        reconstruction: NdarrayOrTensor | None = None,
        segmentation: NdarrayOrTensor | None = None,
        voxel_ml: float = 0.001,
        site: str = "",
    ) -> None:
        """Add one subject, on its own grid.

        Args:
            anomaly_map: (H, W, D) float >= 0, raw; values outside the foreground are ignored.
            lesion: (H, W, D) bool; None or all False for a healthy subject.
            foreground: (H, W, D) bool, where anomalies are looked for.
            threshold: the shipped one; positive where map > threshold. None: metrics that need it are undefined.
            method_slice_scores: (D,) the method's own score of every slice along `axis`, of any scale. Slices without
                foreground are ignored. None: metrics of it are undefined.
            method_score: its own score of the volume, likewise.
            image, reconstruction: ([C,] H, W, D) float in [0, 1], for PSNR and SSIM; both or none.
            segmentation: (H, W, D) bool, whose components are compared with the lesions; needs a threshold, and by
                default it is map > threshold.
            voxel_ml: volume of a voxel; the default is 1 mm3.
            site: where the subject was scanned; subjects of one site are summed up together.

        Raises:
            ValueError: a subject twice, shapes that differ, an empty foreground, a map or scores that are not finite,
                a negative map.
        """
        if subject in self._records:
            raise ValueError(f"{subject}: was added before; call update once per subject")
        if (image is None) != (reconstruction is None):
            raise ValueError(f"{subject}: PSNR and SSIM need both image and reconstruction, only one was given")
        shape = tuple(foreground.shape)
        inside: NDArray[np.bool_] = self._slices_first(subject, "foreground", foreground, shape) > 0
        scores = self._slices_first(subject, "anomaly_map", anomaly_map, shape).astype(np.float32, copy=False)
        _check_map(subject, scores, inside)
        everywhere: NDArray[np.bool_] = (
            np.zeros_like(inside) if lesion is None else self._slices_first(subject, "lesion", lesion, shape) > 0
        )
        lesions = everywhere & inside
        predicted = (scores > threshold) & inside if threshold is not None else np.zeros_like(inside)
        if segmentation is not None and threshold is not None:
            segmented = (self._slices_first(subject, "segmentation", segmentation, shape) > 0) & inside
        else:
            segmented = predicted
        has_foreground, has_lesion = np.any(inside, axis=(1, 2)), np.any(lesions, axis=(1, 2))
        bins, pos, neg, dice_sum = voxel_histograms(scores, lesions, inside) if everywhere.any() else _NO_HISTOGRAMS
        psnr, ssim = self._fidelity(subject, image, reconstruction, everywhere, inside)
        self._records[subject] = SubjectRecord(
            site=site,
            has_lesion=bool(everywhere.any()),
            lesion_voxels=int(lesions.sum()),
            lesion_voxels_outside=int(everywhere.sum() - lesions.sum()),
            foreground_voxels=int(inside.sum()),
            n_lesion_slices=int(has_lesion.sum()),
            slices=np.flatnonzero(has_foreground),
            slice_scores=highest_share_means(scores, inside)[has_foreground],
            slice_labels=has_lesion[has_foreground],
            volume_score=highest_share_mean(scores[inside]),
            method_slice_scores=_method_slice_scores(subject, method_slice_scores, has_foreground),
            method_score=_method_score(subject, method_score),
            at_threshold=None if threshold is None else (int((predicted & lesions).sum()), int(predicted.sum())),
            lesions=compare_lesions(lesions, segmented, voxel_ml),
            bins=bins,
            pos=pos,
            neg=neg,
            dice_sum=dice_sum,
            psnr=psnr,
            ssim=ssim,
        )

    def merge(self, other: DetectionMetrics) -> None:
        """Add the subjects that others are the metrics of, from another process perhaps.

        Raises ValueError for a subject that is in both.
        """
        if twice := sorted(self._records.keys() & other._records.keys()):
            raise ValueError(f"{twice[0]}: was added before; measure each subject once")
        self._records |= other._records

    def compute(self, seed: int = 0, n_bootstrap: int = 1000) -> dict[str, Any]:
        """The result, ready for JSON; None where undefined. Does not depend on the order of the subjects.

        Every metric is `{"value": float, "ci95": [low, high]}`: percentile bootstrap, `n_bootstrap` resamples of the
        subjects with replacement, drawn from `seed`. Resamples in which the metric is undefined (no lesion drawn) are
        left out; a metric that rests on fewer than two subjects has no interval, and one that rests on fewer than five
        says so: `few_subjects` is their number.

        auprc, auroc: voxels.
        max_dice_pooled: ORACLE (the threshold is chosen with the labels), highest Dice of all voxels pooled over all
            thresholds ("global"); reached by map > `oracle_threshold`, a plain number.
        max_dice_mean: ORACLE, highest mean Dice of the single lesion slices over all common thresholds.
        dice_at_threshold, voxel_recall_at_threshold: pooled Dice, and share of the lesion voxels found, at the shipped
            threshold, chosen without labels.
        image_auroc, image_auprc: slices, by the mean of the highest 1 % of the map; abnormal = holds lesion voxels.
        volume_auroc, volume_auroc_cluster: whole volumes with a lesion against those without, by the mean of the
            highest 1 % of the map, and by the volume of the segmentation's largest component.
        image_auroc_method, image_auprc_method, volume_auroc_method: the same by the method's own scores; of the
            subjects that have them.
        healthy_fp_share: share of the healthy subjects' foreground voxels above the shipped threshold.
        healthy_worst_share: this share of the subject where it is the largest; no interval.
        sites: for each site `site`, `n_healthy` and `n_lesion_subjects`, and of its subjects alone `healthy_share`
            (mean over the healthy subjects), `healthy_worst_share` and `voxel_recall_at_threshold`.
        lesion_recall, lesion_precision, lesion_f1: lesion-wise, by any overlap; with `_iou`, paired one to one by IoU
            (see `common.metrics.lesions`). Of the subjects that have a lesion.
        healthy_false_lesions: components of the segmentation in a healthy subject, on average.
        lesion_sizes: for each group of lesions by volume (`ml`: more than the first, at most the second number; None:
            no bound) `n_lesions`, `lesion_recall` (any overlap) and `voxel_recall` at the shipped threshold.
        psnr (dB), ssim: mean over subjects, of the reconstruction in the foreground outside lesions, data range 1.
        lesion_share: prevalence of lesion voxels, the AUPRC of a map without information.
        lesion_share_outside_foreground: share of the lesion voxels that the foreground misses; no other metric
            counts them.
        n_subjects, n_lesion_subjects, n_lesion_slices, n_lesions: plain integers.
        curves: `threshold`, `precision`, `recall`, `dice` of the pooled voxels where map >= threshold, some 200 points.
        slice_scores: `subject`, `slice` (its index), `score`, `method_score` (None where there is none), `abnormal` of
            every slice with foreground.
        replicates: AUPRC and Dice at the threshold in each resample, for differences between methods that were
            measured on the same subjects with the same seed.

        Raises:
            ValueError: no subject was added.
        """
        if not self._records:
            raise ValueError("nothing to evaluate: no subject was added")
        subjects = sorted(self._records)
        records = [self._records[subject] for subject in subjects]
        return metrics_with_intervals(records, seed, n_bootstrap) | {
            "n_subjects": len(records),
            "n_lesion_subjects": sum(r.has_lesion for r in records),
            "n_lesion_slices": sum(r.n_lesion_slices for r in records),
            "n_lesions": int(sum(r.lesions.lesions.sum() for r in records)),
            "curves": pooled_curves(records),
            "slice_scores": all_slice_scores(subjects, records),
        }

    def _slices_first(self, subject: str, name: str, volume: NdarrayOrTensor, shape: tuple[int, ...]) -> NDArray[Any]:
        if volume.ndim != 3 or tuple(volume.shape) != shape:
            raise ValueError(
                f"{subject}: {name} has shape {tuple(volume.shape)}; expected (H, W, D) like the foreground, {shape}"
            )
        return np.moveaxis(convert_to_numpy(volume), self.axis % 3, 0)

    def _fidelity(
        self,
        subject: str,
        image: NdarrayOrTensor | None,
        reconstruction: NdarrayOrTensor | None,
        lesion: NDArray[np.bool_],
        foreground: NDArray[np.bool_],
    ) -> tuple[float, float]:
        """PSNR and SSIM; NaN without a reconstruction."""
        if image is None or reconstruction is None:
            return float("nan"), float("nan")
        shape = np.moveaxis(foreground, 0, self.axis % 3).shape
        x, y = (
            torch.from_numpy(np.stack([self._slices_first(subject, name, c, shape) for c in channels], axis=1)).float()
            for name, channels in (("image", _channels(image)), ("reconstruction", _channels(reconstruction)))
        )
        masks = torch.from_numpy(lesion), torch.from_numpy(foreground)
        return psnr_outside_lesions(x, y, *masks), ssim_outside_lesions(x, y, *masks)


def _channels(volume: NdarrayOrTensor) -> NdarrayOrTensor:
    return volume if volume.ndim == 4 else volume[None]


def _check_map(subject: str, scores: NDArray[np.float32], inside: NDArray[np.bool_]) -> None:
    if not inside.any():
        raise ValueError(f"{subject}: the foreground is empty, there is nothing to evaluate")
    lowest, highest = scores[inside].min(), scores[inside].max()  # NaN if any voxel is
    if not (lowest >= 0 and np.isfinite(highest)):
        raise ValueError(f"{subject}: the anomaly map must be finite and >= 0, found {lowest} to {highest}")


def _method_slice_scores(
    subject: str, given: NdarrayOrTensor | None, has_foreground: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Of the slices with foreground."""
    if given is None:
        return np.full(int(has_foreground.sum()), np.nan)
    own = convert_to_numpy(given).astype(np.float64)
    n = len(has_foreground)
    if own.shape != (n,) or not np.isfinite(own[has_foreground]).all():
        raise ValueError(f"{subject}: method_slice_scores {own.shape} must be one finite number for each of {n} slices")
    return own[has_foreground]


def _method_score(subject: str, given: float | None) -> float:
    if given is None:
        return float("nan")
    if not np.isfinite(given):
        raise ValueError(f"{subject}: method_score must be finite, found {given}")
    return float(given)
