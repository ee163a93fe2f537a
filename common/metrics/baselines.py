"""The two baselines that cost nothing: an intensity threshold, and the mean healthy image in the same space.

A method that does not beat them has learnt nothing about anatomy (Meissen et al., BrainLes 2021, for the first one).
Both are callables `(image, foreground) -> map` on volumes, image (C, H, W, D) float32 in [0, 1] with background 0 and
foreground (1, H, W, D) bool; the map (1, H, W, D) float32 >= 0 is 0 outside the foreground, higher = more abnormal.
With several modalities the map is the mean over them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import torch
from monai.transforms import generate_spatial_bounding_box
from torch import Tensor
from torch.nn import functional as F

Direction = Literal["bright", "dark"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
_TINY = 1e-6  # keeps 0 / 0 at 0 where no brain is


def intensity_threshold(image: Tensor, foreground: Tensor, direction: Direction = "bright") -> Tensor:
    """The intensity itself as anomaly map: x where bright tissue is abnormal (T2, FLAIR), 1 - x where dark is (T1).

    Shapes and ranges as in this module's docstring. Raises ValueError for another direction.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"direction is 'bright' or 'dark', not {direction!r}")
    abnormality = image if direction == "bright" else 1 - image
    return abnormality.clamp(min=0).mean(0, keepdim=True) * foreground


class MeanHealthyImage:
    """|image - mean of the healthy images|, brains aligned by their bounding boxes only.

    Every foreground's bounding box is resampled (trilinear) to one common box; at each place the mean and the standard
    deviation are taken over the subjects whose foreground covers it, and there the volumes are never held together.

    Args:
        box: voxels of the common box; the default is about the extent of an adult brain in mm, so that images of 1 mm
            are hardly resampled.

    Attributes (after `fit`):
        mean_, std_: (C, *box) float32; 0 where no healthy foreground was seen.
        n_subjects_: how many volumes they come from.
    """

    def __init__(self, box: Sequence[int] = (144, 176, 144)) -> None:
        self.box = tuple(box)

    def fit(self, volumes: Iterable[tuple[Tensor, Tensor]]) -> MeanHealthyImage:
        """Accumulate (image, foreground) pairs of healthy subjects, one at a time; forgets an earlier fit.

        Raises ValueError without any volume or for an empty foreground.
        """
        self.n_subjects_ = 0
        weight = total = squares = torch.zeros(())
        for image, foreground in volumes:
            where = (slice(None), *_bounding_box(foreground))
            inside = foreground[where].to(image.dtype)
            # float64: the variance is the small difference of two large sums
            w = _resample(inside, self.box).double()
            wx = _resample(image[where] * inside, self.box).double()
            weight, total = weight + w, total + wx
            squares = squares + wx**2 / w.clamp(min=_TINY)  # w x^2: x = wx / w has no background mixed in at the rim
            self.n_subjects_ += 1
        if not self.n_subjects_:
            raise ValueError("MeanHealthyImage.fit got no volume: it needs at least one healthy subject")
        mean = total / weight.clamp(min=_TINY)
        self.mean_ = mean.float()
        self.std_ = (squares / weight.clamp(min=_TINY) - mean**2).clamp(min=0).sqrt().float()
        return self

    def __call__(self, image: Tensor, foreground: Tensor) -> Tensor:
        """The map, (1, H, W, D), shapes and ranges as in this module's docstring. Raises ValueError before `fit`."""
        if not hasattr(self, "mean_"):
            raise ValueError("MeanHealthyImage has seen no healthy image yet: call fit() first")
        where = (slice(None), *_bounding_box(foreground))
        x = image[where]
        mean = _resample(self.mean_.to(x), x.shape[1:])
        anomaly_map = torch.zeros_like(image[:1])
        anomaly_map[where] = (x - mean).abs().mean(0, keepdim=True) * foreground[where]
        return anomaly_map


def _bounding_box(foreground: Tensor) -> tuple[slice, ...]:
    if not foreground.any():
        raise ValueError("the foreground is empty: there is no brain to compare")
    start, end = generate_spatial_bounding_box(foreground, allow_smaller=True)
    return tuple(slice(int(a), int(b)) for a, b in zip(start, end, strict=True))


def _resample(volume: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(volume.unsqueeze(0), size=tuple(size), mode="trilinear", align_corners=False)[0]
