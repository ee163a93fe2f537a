"""The contract that every method keeps: 2D slices in, a raw anomaly map and a reconstruction out, and maybe a score."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from monai.networks.layers import MedianFilter, gaussian_1d, separable_filtering
from torch import Tensor, nn

from ..errors import ImageIntensityError, ImageShapeError
from ..recorded import Recorded


@dataclass(frozen=True)
class Detection:
    """What a method says of a batch of slices.

    anomaly_map: (B, 1, H, W) float32 >= 0, raw, higher = more abnormal, exactly 0 outside the foreground.
    reconstruction: (B, C, H, W) in [0, 1], pseudo-healthy, exactly 0 outside the foreground.
    score: (B,) the method's own image-level score, higher = more abnormal, where it comes with the map; else None, see
        `AnomalyDetector.score`.
    """

    anomaly_map: Tensor
    reconstruction: Tensor
    score: Tensor | None = None


class AnomalyDetector(Recorded, nn.Module):
    """One published method: its networks, its schedule and its post-processing in one module.

    A subclass implements `_detect`, and `score` where its paper has an image-level score that takes passes through the
    network of its own. `size_divisor` is the multiple that H and W must have.

    `networks` names the submodules that take most of the time and that are called with tensors (B, ...) alone: what
    another engine may compute, see `use_engine`.
    """

    size_divisor: int = 1
    networks: ClassVar[tuple[str, ...]] = ()

    @torch.no_grad()
    def detect(self, image: Tensor, foreground: Tensor | None = None, seeds: Tensor | None = None) -> Detection:
        """Find what is abnormal in a batch of slices; every slice is treated as if it were alone. Call `eval()` first.

        image: (B, C, H, W) float, foreground in (0, 1], background exactly 0.
        foreground: (B, 1, H, W) bool, where anomalies are looked for; default: any channel > 0.
        seeds: (B,) int64, one per slice, the only source of randomness; default: all 0.
        Raises ImageShapeError or ImageIntensityError for such an image that is none, ValueError where the others do not
        fit it.
        """
        if image.ndim != 4 or any(size % self.size_divisor for size in image.shape[2:]):
            fact = f"{tuple(image.shape)} is not (B, C, H, W) with H and W multiples of {self.size_divisor}"
            raise ImageShapeError("image", fact, "pad it with zeros")
        if not (image.amin() >= 0 and image.amax() <= 1):
            raise ImageIntensityError(
                "image", "values outside of [0, 1]", "scale it as the bundle's preprocessing does"
            )
        if foreground is None:
            foreground = foreground_of(image)
        if foreground.shape != (len(image), 1, *image.shape[2:]):
            raise ValueError(f"foreground {tuple(foreground.shape)} does not fit image {tuple(image.shape)}")
        if seeds is not None and seeds.shape != (len(image),):
            raise ValueError(f"seeds {tuple(seeds.shape)} are not one per slice of {len(image)}")
        generators = seeded_generators([0] * len(image) if seeds is None else seeds)
        anomaly_map, reconstruction, *score = self._detect(image * foreground, foreground, generators)
        return Detection(
            anomaly_map=anomaly_map.float() * foreground,
            reconstruction=reconstruction.float().clamp(0, 1) * foreground,
            score=score[0] if score else None,
        )

    @abstractmethod
    def _detect(self, image: Tensor, foreground: Tensor, generators: list[torch.Generator]) -> tuple[Tensor, ...]:
        """Anomaly map (B, 1, H, W) >= 0 and reconstruction (B, C, H, W); `detect` masks and clamps both.

        A method whose own image-level score needs no further pass through the network returns that too, (B,).
        """

    def score(self, image: Tensor, foreground: Tensor, generators: list[torch.Generator]) -> Tensor | None:
        """The method's own image-level score (B,), higher = more abnormal, where it takes passes of its own.

        Arguments as those of `_detect`. None where `detect` gives the score, or where the method has none.
        """
        return None

    @property
    def has_separate_score(self) -> bool:
        """Whether `score` gives one."""
        return type(self).score is not AnomalyDetector.score


class TrainingObjective(nn.Module):
    """`forward(images, foreground)` returns a dict of losses; the key `loss` is what is minimised.

    images: (B, C, H, W) in [0, 1];  foreground: (B, 1, H, W) bool, default: any channel > 0.
    So one module trains under `SupervisedTrainer`, under DDP and in a plain loop alike.
    """

    @abstractmethod
    def forward(self, images: Tensor, foreground: Tensor | None = None) -> dict[str, Tensor]:
        """See the class."""


def foreground_of(image: Tensor) -> Tensor:
    """Where any channel is above 0: (B, C, ...) -> (B, 1, ...) bool."""
    return (image > 0).any(dim=1, keepdim=True)


def top_mean(values: Tensor, share: float = 0.01) -> Tensor:
    """Mean of the highest `share` of the values (at least one value); 0 where there is none.

    The mean over a whole brain hides a small lesion and the maximum follows a single voxel; this is between.
    """
    if values.numel() == 0:
        return values.new_zeros(())
    highest = values.flatten().topk(max(1, round(share * values.numel()))).values
    return highest.mean(dtype=torch.float64).to(values.dtype)


def noise_like(reference: Tensor, generators: list[torch.Generator]) -> Tensor:
    """Standard normal noise, one generator per slice, drawn on the CPU so that every device sees the same."""
    noise = torch.stack([torch.randn(reference.shape[1:], generator=g) for g in generators])
    return noise.to(reference)


def seeded_generators(seeds: Iterable[int] | Tensor) -> list[torch.Generator]:
    """One generator per seed."""
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]


def smoothed(x: Tensor, sigma_px: float) -> Tensor:
    """Gaussian filter as SciPy's: sampled kernel, mirrored border; 0 for none. (B, 1, H, W) -> same.

    MONAI's `GaussianFilter` pads with zeros and keeps sigma in the weights, where a config could not change it.
    """
    if sigma_px == 0:
        return x
    kernel = gaussian_1d(torch.tensor(sigma_px), truncated=4.0, approx="sampled", normalize=True)
    margin = len(kernel) // 2
    return separable_filtering(mirror(x, margin), [kernel.to(x)] * 2)[..., margin:-margin, margin:-margin]


def median(anomaly_map: Tensor, size: int) -> Tensor:
    """Median over a window of odd side, reflected at the border (MONAI's repeats its pixels); (B, 1, H, W) -> same."""
    pad = size // 2
    if pad == 0:
        return anomaly_map
    window = MedianFilter(pad, spatial_dims=2)
    return window(F.pad(anomaly_map, (pad,) * 4, mode="reflect"))[..., pad:-pad, pad:-pad]


def image_difference(a: Tensor, b: Tensor, gamma: float | None) -> Tensor:
    """min(max over channels |a - b|, gamma) / gamma, (B, 1, H, W) in [0, 1]; unclipped and unscaled without gamma."""
    difference = (a - b).abs().amax(dim=1, keepdim=True)
    return difference if gamma is None else difference.clamp(max=gamma) / gamma


def mirror(x: Tensor, margin: int) -> Tensor:
    """Pad H and W on both sides, d c b a | a b c d | d c b a: SciPy's "reflect", which PyTorch lacks; any margin."""
    for dim in (-2, -1):
        size = x.shape[dim]
        index = torch.arange(-margin, size + margin, device=x.device) % (2 * size)
        x = x.index_select(dim, torch.minimum(index, 2 * size - 1 - index))
    return x


def with_generators(batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, list[torch.Generator]]]:
    """Each batch (B, ...) with its generators: slice i of all has the seed i, however they are batched."""
    count = 0
    for batch in batches:
        yield batch, seeded_generators(range(count, count + len(batch)))
        count += len(batch)
