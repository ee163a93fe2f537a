"""Lesion-wise detection: connected components of the annotation against those of the segmentation.

Two rules, both reported, because the first forgives a prediction that covers half the brain and the second a lesion
that is found but badly outlined:

* any overlap: a lesion is found if the segmentation holds a voxel of it, a predicted component is true if it touches a
  lesion;
* IoU: lesions and predicted components are paired one to one, as many as possible with an IoU above 0.1, the level of
  nnDetection (Baumgartner et al., MICCAI 2021), below which a pair has little in common even for small structures.

Components are 26-connected, as in `lesions.csv`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

MIN_IOU = 0.1
# Bounds of the groups of lesions by volume, in ml. Balls of these volumes are 6, 12 and 27 mm wide: three voxels of the
# 2 mm grid that the bundles work on, the usual multiple sclerosis lesion, and what shows on a preview.
SIZE_BOUNDS_ML = (0.1, 1.0, 10.0)
N_SIZES = len(SIZE_BOUNDS_ML) + 1


@dataclass(frozen=True)
class LesionRecord:
    """The lesions of one subject by size, (N_SIZES,) each, and the components of the segmentation."""

    lesions: NDArray[np.int64]
    found: NDArray[np.int64]  # lesions that the segmentation touches
    voxels: NDArray[np.int64]
    voxels_found: NDArray[np.int64]
    paired: int  # lesions with a predicted component of their own, IoU above MIN_IOU
    predicted: int  # components of the segmentation
    predicted_true: int  # of them, those that touch a lesion
    largest_ml: float  # volume of the largest component of the segmentation, 0 without any


def compare_lesions(lesion: NDArray[np.bool_], predicted: NDArray[np.bool_], voxel_ml: float) -> LesionRecord:
    """Compare two masks (D, H, W) of one grid; `voxel_ml` is the volume of a voxel."""
    cube = np.ones((3, 3, 3))
    truth, n_lesions = ndimage.label(lesion, structure=cube)
    found, n_predicted = ndimage.label(predicted, structure=cube)
    both = lesion & predicted
    pairs, common = np.unique(np.stack([truth[both], found[both]]) - 1, axis=1, return_counts=True)
    sizes = np.bincount(truth[lesion] - 1, minlength=n_lesions)
    covered = np.bincount(pairs[0], common, minlength=n_lesions)
    group = np.searchsorted(SIZE_BOUNDS_ML, sizes * voxel_ml)
    predicted_sizes = np.bincount(found[predicted] - 1, minlength=n_predicted)

    def by_size(weights: NDArray[np.float64] | NDArray[np.int64]) -> NDArray[np.int64]:
        return np.bincount(group, weights, minlength=N_SIZES).astype(np.int64)

    return LesionRecord(
        lesions=np.bincount(group, minlength=N_SIZES),
        found=by_size((covered > 0).astype(float)),
        voxels=by_size(sizes),
        voxels_found=by_size(covered),
        paired=_count_pairs(pairs, common, sizes, predicted_sizes),
        predicted=n_predicted,
        predicted_true=len(np.unique(pairs[1])),
        largest_ml=float(predicted_sizes.max(initial=0) * voxel_ml),
    )


def _count_pairs(
    pairs: NDArray[np.int64], common: NDArray[np.int64], sizes: NDArray[np.int64], predicted_sizes: NDArray[np.int64]
) -> int:
    """The largest number of one-to-one pairs with an IoU above MIN_IOU."""
    iou = common / (sizes[pairs[0]] + predicted_sizes[pairs[1]] - common)
    rows, columns = (np.unique(index, return_inverse=True)[1] for index in pairs[:, iou > MIN_IOU])
    if not len(rows):
        return 0
    allowed = np.zeros((rows.max() + 1, columns.max() + 1))
    allowed[rows, columns] = 1
    return int(allowed[linear_sum_assignment(allowed, maximize=True)].sum())
