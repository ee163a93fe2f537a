"""The baselines that cost nothing: an intensity threshold, the mean healthy image, and what exceeds a healthy atlas.

A method that does not beat them has learnt nothing about anatomy (Meissen et al., BrainLes 2021, for the first one).
All are callables `(image, foreground) -> map` on volumes, image (C, H, W, D) float32 in [0, 1] with background 0 and
foreground (1, H, W, D) bool; the map (1, H, W, D) float32 >= 0 is 0 outside the foreground, higher = more abnormal.
With several modalities the map is the mean over them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from ..detection.alignment import by_registration, from_atlas, mirrored, to_atlas
from ..detection.normalisation import MIN_COUNT, mean_of
from ..detection.volume import smoothed_within
from ..images.background import Box, box_of
from ..images.mni import GRID_MM

Direction = Literal["bright", "dark"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
SIGMA_VOX = 1.5  # of the smoothing of maps
RIM_VOX = 2
ATLAS_SUBJECTS = 30  # 16 give what 60 give
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
            where = box_of_channels(foreground)
            inside = foreground[where].to(image.dtype)
            # float64: the variance is the small difference of two large sums
            w = resized(inside, self.box).double()
            wx = resized(image[where] * inside, self.box).double()
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
        where = box_of_channels(foreground)
        x = image[where]
        mean = resized(self.mean_.to(x), x.shape[1:])
        anomaly_map = torch.zeros_like(image[:1])
        anomaly_map[where] = (x - mean).abs().mean(0, keepdim=True) * foreground[where]
        return anomaly_map


def darkness(image: Tensor, foreground: Tensor) -> Tensor:
    """1 - x, (1, H, W, D), smoothed within the brain but its rim: what is dark."""
    return smoothed(1 - image.mean(0, keepdim=True), without_rim(foreground))


def brightness(image: Tensor, foreground: Tensor) -> Tensor:
    """x, (1, H, W, D), smoothed within the brain but its rim: what is bright."""
    return smoothed(image.mean(0, keepdim=True), without_rim(foreground))


def darker_than_mirrored(image: Tensor, foreground: Tensor) -> Tensor:
    """By how much a place is darker than all within one voxel of the same place on the other side, (1, H, W, D).

    Smoothed before and after. The same place is found by the registration of the brain to MNI152.
    """
    to_mni = by_registration(foreground[0].numpy())
    dark = smoothed(1 - image.mean(0, keepdim=True), foreground)
    there, inside = (torch.from_numpy(mirrored(x[0].float().numpy(), to_mni))[None] for x in (dark, foreground))
    both = foreground & (inside >= 0.5)
    return smoothed((dark - F.max_pool3d(there, 3, 1, 1)).clamp(min=0) * both, foreground)


Quantity = Callable[[Tensor, Tensor], Tensor]
QUANTITIES: dict[str, Quantity] = {
    "darkness_minus_atlas": darkness,
    "brightness_minus_atlas": brightness,
    "mirrored_minus_atlas": darker_than_mirrored,
}


class AboveHealthyAtlas:
    """By how much a quantity of a place exceeds its mean at this place of healthy brains; 0 in the rim of the brain.

    Places are matched by the registration of the brains to MNI152. The rim is left out because it is where tissue,
    fluid and what the skull stripping left meet: everything differs there.

    Args:
        quantity: `(image, foreground) -> (1, H, W, D)`.

    Attributes (after `fit`):
        atlas_: (1, 91, 109, 91), the mean; where hardly any healthy brain was seen the highest mean, so that nothing
            exceeds it by chance.
    """

    def __init__(self, quantity: Quantity) -> None:
        self.quantity = quantity

    def fit(self, volumes: Iterable[tuple[Tensor, Tensor]]) -> AboveHealthyAtlas:
        """From (image, foreground) pairs of healthy subjects. Raises ValueError without any."""
        pairs = list(volumes)
        if not pairs:
            raise ValueError("AboveHealthyAtlas.fit got no volume: it needs at least one healthy subject")
        sums = torch.zeros(())
        for image, foreground in pairs:
            inside = without_rim(foreground)
            parts = torch.cat([self.quantity(image, foreground) * inside, inside]).float()
            sums = sums + to_atlas(parts.numpy(), by_registration(foreground[0].numpy()), GRID_MM)
        total, count = sums.split(1)
        mean = mean_of(total, count)
        self.atlas_ = torch.where(count > MIN_COUNT, mean, mean.max())
        return self

    def __call__(self, image: Tensor, foreground: Tensor) -> Tensor:
        """The map, (1, H, W, D), shapes and ranges as in this module's docstring."""
        to_mni = by_registration(foreground[0].numpy())
        expected = from_atlas(self.atlas_, to_mni, foreground.shape[1:], GRID_MM)
        exceeding = self.quantity(image, foreground) - torch.from_numpy(expected)
        return exceeding.clamp(min=0) * without_rim(foreground)


@dataclass(frozen=True)
class HealthyBaselines:
    """The baselines that have seen healthy brains: the mean image, and what exceeds an atlas on the network's grid."""

    mean_image: MeanHealthyImage
    atlases: dict[str, AboveHealthyAtlas]

    @classmethod
    def fit(cls, volumes: Iterable[tuple[Tensor, Tensor]], count: int) -> HealthyBaselines:
        """From `count` (image, foreground) pairs of healthy subjects; the atlases from every n-th of them, 30 at most.

        Raises ValueError without any.
        """
        kept: list[tuple[Tensor, Tensor]] = []
        every = max(math.ceil(count / ATLAS_SUBJECTS), 1)

        def passed() -> Iterator[tuple[Tensor, Tensor]]:
            for index, pair in enumerate(volumes):
                if index % every == 0:
                    kept.append(pair)
                yield pair

        mean_image = MeanHealthyImage().fit(passed())
        return cls(mean_image, {name: AboveHealthyAtlas(quantity).fit(kept) for name, quantity in QUANTITIES.items()})


def box_of_channels(foreground: Tensor) -> Box:
    """The box around a foreground (1, H, W, D), in volumes of any channels (C, H, W, D)."""
    return (slice(None), *box_of(foreground[0].cpu().numpy()))


def resized(volume: Tensor, shape: Sequence[int]) -> Tensor:
    """(C, H, W, D) -> (C, *shape), each axis stretched by itself, linearly."""
    return F.interpolate(volume[None], tuple(shape), mode="trilinear")[0]


def smoothed(volume: Tensor, foreground: Tensor) -> Tensor:
    """As the maps of the methods are: the Gaussian mean of the foreground's voxels, 0 outside; (1, H, W, D)."""
    return smoothed_within(volume[None], foreground[None], SIGMA_VOX)[0]


def without_rim(foreground: Tensor) -> Tensor:
    """The foreground but its outer `RIM_VOX` voxels, (1, H, W, D) bool; beyond the volume there is none."""
    outside = F.pad((~foreground).float(), [RIM_VOX] * 6, value=1.0)
    return F.max_pool3d(outside, 2 * RIM_VOX + 1, 1) == 0
