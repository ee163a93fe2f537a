"""The tissues of a T1 brain brought to the intensities that the networks have learned."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform
from scipy import ndimage
from torch import Tensor

from .intensity import FOREGROUND_FLOOR

BINS = 256
START_QUANTILES = (0.07, 0.4, 0.8)  # where CSF, grey and white matter lie in an adult brain
ITERATIONS, CONVERGED = 200, 1e-5
LEAST_STD, MOST_STD = 0.01, np.array([0.2, 0.15, 0.06])  # of CSF, grey and white matter, which is even
LEAST_SHARE, LEAST_GAP = 0.05, 0.05  # a tissue that is rarer, or nearer to the next, has not been found
SLOPES = (0.5, 2.0)  # so that a lesion keeps its contrast
MIDDLING, BRIGHT = (0.25, 0.5), (0.75, 0.95)  # quantiles of a brain: grey matter, and white matter without vessels
VESSEL_LEVEL = 1.25  # times white matter


def tissue_modes(values: np.ndarray) -> np.ndarray:
    """Mean intensities of CSF, grey and white matter, (3,) ascending; NaN where there are no three tissues to be seen.

    The means of three normal distributions, fitted to the histogram by expectation maximisation.

    values: (n,) of a brain without its bias field, in (0, 1].
    """
    values = values.astype(np.float64)
    counts, edges = np.histogram(values, BINS, (0, 1))
    x, weight = (edges[1:] + edges[:-1]) / 2, counts / max(counts.sum(), 1)
    mean, std, share = np.quantile(values, START_QUANTILES), np.full(3, 0.07), np.full(3, 1 / 3)
    for _ in range(ITERATIONS):
        density = share / std * np.exp(-0.5 * ((x[:, None] - mean) / std) ** 2)
        part = weight[:, None] * density / np.maximum(density.sum(axis=1, keepdims=True), np.finfo(float).tiny)
        share = np.maximum(part.sum(axis=0), np.finfo(float).tiny)
        before, mean = mean, (part * x[:, None]).sum(axis=0) / share
        std = np.sqrt((part * (x[:, None] - mean) ** 2).sum(axis=0) / share).clip(LEAST_STD, MOST_STD)
        if np.abs(mean - before).max() < CONVERGED:
            break
    found = share.min() >= LEAST_SHARE and np.diff(mean).min() >= LEAST_GAP
    return mean if found else np.full(3, np.nan)


def contrast_order(image: np.ndarray, spacing_mm: Sequence[float]) -> float:
    """How much deeper below the surface the bright tissue lies than the middling one, in mean depths of the brain.

    White matter, the brightest in T1, lies within grey matter: 0.45 to 0.75 in T1 images of healthy adults. In T2 and
    FLAIR grey matter or CSF is brighter, and the number is near 0 or below.

    image: (H, W, D), a brain in (0, 1], else 0.
    """
    brain = image > 0
    depth = ndimage.distance_transform_edt(np.pad(brain, 1), sampling=spacing_mm)[1:-1, 1:-1, 1:-1][brain]
    values = image[brain].astype(np.float64)
    parts = [np.quantile(values, quantiles) for quantiles in (MIDDLING, BRIGHT)]
    middling, bright = (depth[(values > low) & (values <= high)] for low, high in parts)
    return float((bright.mean() - middling.mean()) / depth.mean()) if middling.size and bright.size else np.nan


def vessel_share(image: np.ndarray, white_matter: float) -> float:
    """Share of the brain that is much brighter than white matter and thin, as vessels with contrast agent are.

    What is bright in most of its 3 x 3 x 3 neighbours is no vessel; it may be a lesion.

    image: (H, W, D), a brain in (0, 1], else 0, at 2 mm. white_matter: its mode; NaN gives NaN.
    """
    bright = image > min(VESSEL_LEVEL * white_matter, np.nextafter(np.float32(1), np.float32(0)))
    compact = ndimage.uniform_filter(bright.astype(np.float32), 3) > 0.5
    share = (bright & ~compact).sum() / max((image > 0).sum(), 1)
    return np.nan if np.isnan(white_matter) else float(share)


class StandardiseTissued(MapTransform):
    """Bring the modes of CSF, grey and white matter to those of the training data, by a piecewise linear map.

    Scanners differ in the contrast between tissues, which no scaling of the whole image undoes. Where the modes are not
    found the image stays as it is. The knots of the map are kept in `meta["tissue_knots"]`, (2, 5): from, to; the
    identity where nothing was done. `destandardised` undoes it.

    Args:
        keys: one image of one channel, (1, H, W, D), scaled; background 0 stays 0.
        modes: of the training data, three intensities in ascending order.
        modes_key: where the modes that were found are put, (3,) float64, NaN where they were not found. Beside them are
            put `contrast_order` and `vessel_share` of the image as it came.
    """

    def __init__(self, keys: KeysCollection, modes: Sequence[float], modes_key: str = "tissue_modes") -> None:
        super().__init__(keys)
        self.modes = np.asarray(modes, dtype=float)
        self.modes_key = modes_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the data with the image and its modes."""
        result = dict(data)
        image = result[self.keys[0]]
        values = image.as_tensor()
        found = tissue_modes(values[values > 0].cpu().numpy())
        knots = self._knots(found)
        changed = piecewise_linear(values, knots[0], knots[1]).clamp(FOREGROUND_FLOOR, 1)
        result[self.keys[0]] = image.clone()
        result[self.keys[0]].as_tensor().copy_(torch.where(values > 0, changed, 0))
        result[self.keys[0]].meta["tissue_knots"] = knots
        volume, spacing_mm = values[0].cpu().numpy(), image.pixdim.tolist()
        measured = {
            "contrast_order": contrast_order(volume, spacing_mm),
            "vessel_share": vessel_share(volume, found[2]),
        }
        return result | {self.modes_key: found} | measured

    def _knots(self, found: np.ndarray) -> np.ndarray:
        if np.isnan(found).any():
            return np.tile(np.linspace(0, 1, 5), (2, 1))
        origin = np.array([0, *found, 1])
        slopes = (np.diff([0, *self.modes]) / np.diff(origin[:-1])).clip(*SLOPES)
        target = np.cumsum([0, *(slopes * np.diff(origin[:-1]))])
        return np.stack([origin, [*target, target[-1] + 1 - found[-1]]])


def destandardised(values: Tensor, knots: np.ndarray) -> Tensor:
    """What `StandardiseTissued` made these values of."""
    return piecewise_linear(values, knots[1], knots[0])


def piecewise_linear(values: Tensor, origin: np.ndarray, target: np.ndarray) -> Tensor:
    """NumPy's `interp` of a tensor."""
    result = np.interp(values.cpu().numpy(), origin, target)
    return torch.from_numpy(result).to(values)
