"""The papers' protocols over a cohort of volumes: the slices that each takes, and what it makes of them.

The papers test on slices of data sets of their own, cut to a common size. Here the same rules are applied to the axial
slices of any labelled cohort, on the scans' own grids, so that methods can be compared as each paper does it; numbers
are those of a paper on its data only. All but "masked_bernoulli" choose the threshold with the labels (oracle).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from monai.metrics.regression import compute_ssim_and_cs
from numpy.typing import NDArray

from .histograms import average_precision, exact_histograms
from .masked_bernoulli import map_metrics, psnr
from .protocols import auto_ddpm_max_dice, global_max_dice, mad_ad_max_dice

SIZES_MM2 = {"small": (0.0, 250.0), "medium": (250.0, 2004.0), "large": (2004.0, 35156.0)}
"""AutoDDPM's groups by the area in its slice, 71, 570 and 10,000 pixels of (1.875 mm)^2; lower bounds are exclusive."""

Slice = tuple[NDArray[np.float32], NDArray[np.bool_]]  # map and lesion, (H, W)


class PaperSlices:
    """Collects a few slices of each subject; `compute` gives the numbers of each protocol."""

    def __init__(self) -> None:
        self._middle: list[Slice] = []
        self._largest: list[Slice] = []
        self._areas_mm2: list[float] = []  # of the lesions in the middle slices
        self._healthy_ssim: list[float] = []
        self._by_slice: dict[str, list[float]] = {"dice": [], "auprc": [], "psnr": []}

    def update(
        self,
        anomaly_map: NDArray[Any],
        lesion: NDArray[np.bool_] | None,
        foreground: NDArray[np.bool_],
        image: NDArray[Any],
        reconstruction: NDArray[Any],
        pixel_mm2: float,
    ) -> None:
        """Add one subject, axial slices last: (H, W, D), images (C, H, W, D) in [0, 1]; the foreground is not empty."""
        truth = np.zeros(foreground.shape, bool) if lesion is None else lesion
        scores = np.where(foreground, anomaly_map, 0).astype(np.float32)
        used = np.flatnonzero(foreground.any((0, 1)))
        middle = used[len(used) // 2]
        self._middle.append((scores[..., middle], truth[..., middle]))
        self._areas_mm2.append(float(truth[..., middle].sum() * pixel_mm2))
        if not truth[..., middle].any():
            self._healthy_ssim.append(_ssim(image[..., middle], reconstruction[..., middle]))
        areas = truth.sum((0, 1))
        if areas.any():
            self._largest.append((scores[..., areas.argmax()], truth[..., areas.argmax()]))
        for index in np.flatnonzero(areas):
            found = map_metrics(scores[None, None, ..., index], truth[None, ..., index])
            self._by_slice["dice"].append(found["dice"]["mean"])
            self._by_slice["auprc"].append(found["auprc"]["mean"])
            self._by_slice["psnr"].append(float(psnr(image[None, ..., index], reconstruction[None, ..., index])[0]))

    def merge(self, other: PaperSlices) -> None:
        """Add the subjects of others, after those that are here."""
        self._middle += other._middle
        self._largest += other._largest
        self._areas_mm2 += other._areas_mm2
        self._healthy_ssim += other._healthy_ssim
        for name, values in other._by_slice.items():
            self._by_slice[name] += values

    def compute(self) -> dict[str, Any]:
        """A dictionary for each protocol; None where its slices are none.

        mad_ad_s1: `max_dice`, all pixels of the middle slices (MAD-AD on ATLAS 2.0).
        mad_ad_s2: `max_dice`, mean over each patient's slice of the largest lesion at the best of 201 thresholds up to
            the highest value of all (MAD-AD on BraTS'21).
        auto_ddpm: `auprc`, `max_dice` at the best of 101 thresholds and `max_dice_exact`, all pixels of the middle
            slices with lesion; `max_dice_exact` of each size group; `healthy_ssim` of the other middle slices.
        masked_bernoulli: `dice`, `auprc`, `psnr` over all slices with lesion, `mean` and `std`; the median and the
            scaling of its "sum" branch applied to the given map.
        """
        with_lesion = [i for i, (_, truth) in enumerate(self._middle) if truth.sum() > 1]
        groups = {
            name: {"n_slices": len(found), "max_dice_exact": _max_dice([self._middle[i] for i in found])}
            for name, (low, high) in SIZES_MM2.items()
            for found in [[i for i in with_lesion if low < self._areas_mm2[i] <= high]]
        }
        chosen = _stacked([self._middle[i] for i in with_lesion])
        largest = _stacked(self._largest)
        return {
            "mad_ad_s1": {"n_slices": len(self._middle), "max_dice": _max_dice(self._middle)},
            "mad_ad_s2": {
                "n_slices": len(self._largest),
                "max_dice": largest and mad_ad_max_dice(largest[0] / (largest[0].max() or 1), largest[1]),
            },
            "auto_ddpm": {
                "n_slices": len(with_lesion),
                "auprc": chosen and float(average_precision(*exact_histograms(*(v.ravel() for v in chosen)))),
                "max_dice": chosen and auto_ddpm_max_dice(*chosen),
                "max_dice_exact": chosen and global_max_dice(*chosen),
                "healthy_ssim": float(np.mean(self._healthy_ssim)) if self._healthy_ssim else None,
                **groups,
            },
            "masked_bernoulli": {
                "n_slices": len(self._by_slice["dice"]),
                **{
                    name: {"mean": float(np.mean(v)), "std": float(np.std(v))} if v else None
                    for name, v in self._by_slice.items()
                },
            },
        }


def _ssim(image: NDArray[Any], reconstruction: NDArray[Any]) -> float:
    """Mean over (C, H, W) with a uniform window of 7, as AutoDDPM's; its covariance is the sample's, 2 % larger."""
    x, y = (torch.from_numpy(np.ascontiguousarray(v, dtype=np.float32))[:, None] for v in (reconstruction, image))
    similarity, _ = compute_ssim_and_cs(x, y, 2, (7, 7), (1.5, 1.5), data_range=1.0, kernel_type="uniform")
    return float(similarity.mean(dtype=torch.float64))


def _max_dice(slices: Sequence[Slice]) -> float | None:
    stacked = _stacked(slices) if any(truth.any() for _, truth in slices) else None
    return stacked and global_max_dice(*stacked)


def _stacked(slices: Sequence[Slice]) -> tuple[NDArray[np.float32], NDArray[np.bool_]] | None:
    """(N, H, W) each, zeros beyond the smaller ones; None of none."""
    if not slices:
        return None
    height, width = (max(truth.shape[axis] for _, truth in slices) for axis in (0, 1))

    def pad(array: NDArray[Any]) -> NDArray[Any]:
        return np.pad(array, ((0, height - array.shape[0]), (0, width - array.shape[1])))

    return np.stack([pad(scores) for scores, _ in slices]), np.stack([pad(truth) for _, truth in slices])
