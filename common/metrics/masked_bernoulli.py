"""The evaluation of masked Bernoulli diffusion, by slice (Wolleb et al., MICCAI 2024, and its published program).

Of each slice the squared differences are smoothed (median 5 x 5) and, in the program, clipped to their 1st and 99th
percentile and scaled to [0, 1]; the segmentation is what is above 0.5, without small components. So 0.5 is relative to
the slice, a healthy slice always has positives, and Dice, AUPRC and PSNR are over slices with a lesion only, with the
standard deviation over slices. `DetectionMetrics` is what this project reports.

The program has two branches. "sum" adds the channels after the median. "per-channel" first scales image and
reconstruction to [0, 1], each by itself, and joins the channels' segmentations; it has no single map, hence no AUPRC.

Arrays or tensors; image, reconstruction (N, C, H, W) in [0, 1], lesion (N, H, W) bool or {0, 1}. Maps are float32, as
in the program, whose arrays are matched to the last bit.
"""

from __future__ import annotations

from functools import reduce
from typing import Any, Literal

import numpy as np
from monai.config import NdarrayOrTensor
from monai.utils import convert_to_numpy
from numpy.typing import NDArray
from scipy import ndimage

from .histograms import average_precision, exact_histograms

Branch = Literal["sum", "per-channel"]
Rule = Literal["code", "paper"]
Summary = dict[str, dict[str, float]]

MEDIAN_SIZE = 5
PERCENTILES = (1, 99)
THRESHOLD = 0.5
MIN_AREA = 10  # pixels, "paper": smaller components are removed
MAX_FILLED_AREA = 15  # pixels, "code": components up to this, their holes counted, are removed
_TOUCHING = np.ones((3, 3), dtype=bool)  # neighbours, diagonal ones too


def masked_bernoulli_metrics(
    image: NdarrayOrTensor,
    reconstruction: NdarrayOrTensor,
    lesion: NdarrayOrTensor,
    branch: Branch = "sum",
    rule: Rule = "code",
) -> Summary:
    """`dice`, `auprc` ("sum" only) and `psnr` in dB, each as `mean` and `std` (population) over slices with a lesion.

    Raises ValueError where shapes differ or no slice has a lesion.
    """
    x, x_hat, masks = (convert_to_numpy(a) for a in (image, reconstruction, lesion))
    if x.shape != x_hat.shape:
        raise ValueError(f"image {x.shape} and reconstruction {x_hat.shape} must have the same shape (N, C, H, W)")
    result = map_metrics(squared_differences(x, x_hat, branch), masks, branch, rule)
    return result | {"psnr": _summary(psnr(x, x_hat)[_with_lesion(masks)])}


def map_metrics(maps: NdarrayOrTensor, lesion: NdarrayOrTensor, branch: Branch = "sum", rule: Rule = "code") -> Summary:
    """`dice` and `auprc` as `masked_bernoulli_metrics` has them, of any maps (N, C, H, W) >= 0, such as a baseline's.

    Raises ValueError where shapes differ or no slice has a lesion.
    """
    values, masks = convert_to_numpy(maps), convert_to_numpy(lesion) > 0
    if values.ndim != 4 or masks.shape != (len(values), *values.shape[2:]):
        raise ValueError(f"maps {values.shape} must be (N, C, H, W), and lesion {masks.shape} (N, H, W) of the same")
    used = _with_lesion(masks)
    scaled, masks = relative_maps(values[used], branch), masks[used]
    result = {"dice": _summary(dice(segment(scaled, rule), masks))}
    return result | ({"auprc": _summary(auprc(scaled[:, 0], masks))} if branch == "sum" else {})


def squared_differences(
    image: NDArray[Any], reconstruction: NDArray[Any], branch: Branch = "sum"
) -> NDArray[np.float32]:
    """(x - x_hat)^2 of each channel, (N, C, H, W); in "per-channel" after `min_max` of both."""
    x, x_hat = image.astype(np.float32), reconstruction.astype(np.float32)
    if branch == "per-channel":
        x, x_hat = min_max(x), min_max(x_hat)
    return (x - x_hat) ** 2


def relative_maps(maps: NDArray[Any], branch: Branch = "sum") -> NDArray[np.float32]:
    """Median, sum ("sum"), clip to percentiles, min-max over the slice: (N, C, H, W) -> (N, 1 or C, H, W) in [0, 1]."""
    smooth = ndimage.median_filter(maps.astype(np.float32), size=(1, 1, MEDIAN_SIZE, MEDIAN_SIZE))
    if branch == "sum":
        smooth = reduce(np.add, np.split(smooth, smooth.shape[1], axis=1))  # in this order, as the reference program
    low, high = np.percentile(smooth.astype(np.float64), PERCENTILES, axis=(2, 3), keepdims=True).astype(np.float32)
    return min_max(np.clip(smooth, low, high))


def min_max(slices: NDArray[np.float32]) -> NDArray[np.float32]:
    """To [0, 1], the channels of a slice jointly, (N, C, H, W) -> same; a constant slice becomes 0."""
    low, high = slices.min(axis=(1, 2, 3), keepdims=True), slices.max(axis=(1, 2, 3), keepdims=True)
    return np.divide(slices - low, high - low, out=np.zeros_like(slices), where=high > low)


def segment(relative: NDArray[np.float32], rule: Rule = "code") -> NDArray[np.bool_]:
    """Above 0.5 in any channel, without small components: (N, C, H, W) -> (N, H, W)."""
    above: NDArray[np.bool_] = np.any(relative > THRESHOLD, axis=1)
    return np.stack([remove_small(mask, rule) for mask in above])


def remove_small(mask: NDArray[np.bool_], rule: Rule = "code") -> NDArray[np.bool_]:
    """Without components (8 neighbours) below 10 pixels ("paper") or of at most 15, holes filled ("code"): (H, W)."""
    labels, _ = ndimage.label(mask, _TOUCHING)
    kept = np.zeros(mask.shape, dtype=bool)
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        component = labels[box] == label
        filled = ndimage.binary_fill_holes(component, _TOUCHING)
        if (component.sum() >= MIN_AREA) if rule == "paper" else (filled.sum() > MAX_FILLED_AREA):
            kept[box] |= component
    return kept


def dice(predicted: NDArray[np.bool_], lesion: NDArray[np.bool_]) -> NDArray[np.float64]:
    """2 |P and G| / (|P| + |G|) of each slice, (N,); no smoothing term."""
    both, size = (predicted & lesion).sum((1, 2)), predicted.sum((1, 2)) + lesion.sum((1, 2))
    return 2 * both / size


def auprc(maps: NDArray[np.float32], lesion: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Average precision over all pixels of each slice, (N, H, W) -> (N,)."""
    pairs = (exact_histograms(m.ravel(), g.ravel()) for m, g in zip(maps, lesion, strict=True))
    return np.array([float(average_precision(*pair)) for pair in pairs])


def psnr(image: NDArray[Any], reconstruction: NDArray[Any]) -> NDArray[np.float64]:
    """20 log10(max x / rmse) of each slice in dB, over all channels and pixels, (N,); inf where they are equal."""
    error = ((image.astype(np.float64) - reconstruction) ** 2).mean(axis=(1, 2, 3)) ** 0.5
    with np.errstate(divide="ignore"):
        return 20 * np.log10(image.max(axis=(1, 2, 3)) / error)


def _with_lesion(masks: NDArray[Any]) -> NDArray[np.bool_]:
    used: NDArray[np.bool_] = np.any(masks > 0, axis=(1, 2))
    if not used.any():
        raise ValueError("no slice has a lesion: this protocol is over slices with one")
    return used


def _summary(values: NDArray[np.float64]) -> dict[str, float]:
    return {"mean": float(values.mean()), "std": float(values.std())}
