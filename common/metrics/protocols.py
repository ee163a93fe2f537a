"""The evaluation protocols of the papers, by name, for comparison with published numbers.

They take all test images at once (maps, masks: (N, H, W)), count every pixel, background included, and are ORACLES:
the threshold is chosen on the test set with its labels. `DetectionMetrics` is what this project reports.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .histograms import auroc, average_precision, exact_histograms, max_dice

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


def iter_mask2_max_dice(maps: NDArray[Any], masks: NDArray[Any]) -> float:
    """Highest mean per-image Dice over the common thresholds 0, 0.0001 ... 0.0099 (IterMask2, Liang et al., 2024).

    maps: (N, ...) float in [0, 1], the errors of all images over their common range, background included, and 0
    outside of the brain; positive where map > threshold. masks: (N, ...) bool or {0, 1}.
    Raises ValueError where an image has no lesion: of each patient the slice of the largest is taken.
    """
    scores, lesions = _flat(maps, masks)
    truth = lesions.sum(1)
    if not truth.all():
        raise ValueError(f"{(truth == 0).sum()} of {len(truth)} images have no lesion: each must have one")
    best = 0.0
    for threshold in np.arange(100) / 10_000:
        predicted = scores > threshold
        dice = 2 * (predicted & lesions).sum(1) / (predicted.sum(1) + truth)
        best = max(best, float(dice.mean()))
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


def latent_ddpm_sprites(maps: NDArray[Any], masks: NDArray[Any], scores: NDArray[Any]) -> dict[str, float]:
    """The synthetic experiment (latent DDPM, Pinaya et al., MICCAI 2022, Table 1), by pixels and by images.

    `max_dice` (all thresholds, pooled) and `auprc` are over all pixels of the contaminated images, `image_auroc` and
    `image_auprc` over all images. The paper does not say how many clean images it has, on which its `image_auprc`
    depends: that of scores without information is the share of contaminated images.

    maps: (N, H, W) float of any scale; masks: (N, H, W) bool or {0, 1}, without a pixel where an image is clean;
    scores: (N,) of the images, of any scale, higher = more abnormal.
    Raises ValueError where shapes differ or not both clean and contaminated images are there.
    """
    values, sprites = _flat(maps, masks)
    if np.shape(scores) != (len(values),):
        raise ValueError(f"scores {np.shape(scores)} must be one for each of {len(values)} images")
    contaminated: NDArray[np.bool_] = np.any(sprites, axis=1)
    if contaminated.all() or not contaminated.any():
        raise ValueError(f"{contaminated.sum()} of {len(values)} images have a sprite: both kinds are needed")
    pixels = exact_histograms(values[contaminated].ravel(), sprites[contaminated].ravel())
    images = exact_histograms(np.asarray(scores), contaminated)
    metrics = {"max_dice": max_dice(*pixels), "auprc": average_precision(*pixels)}
    metrics |= {"image_auroc": auroc(*images), "image_auprc": average_precision(*images)}
    return {name: float(value) for name, value in metrics.items()}


def _flat(maps: NDArray[Any], masks: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    scores, lesions = np.asarray(maps), np.asarray(masks)
    if scores.shape != lesions.shape or scores.ndim < 2:
        raise ValueError(f"maps {scores.shape} and masks {lesions.shape} must have the same shape (N, ...)")
    return scores.reshape(len(scores), -1), lesions.reshape(len(lesions), -1) > 0
