"""IterMask2: iterative mask refinement (Liang, Guo, Noble and Kamnitsas, MICCAI 2024, arXiv 2406.02422).

A first network rebuilds the slice from its high frequencies alone. Where that fails most, the slice is covered with
noise, and a second network rebuilds it from what is not covered and the high frequencies. Covered pixels that it
rebuilds as well as healthy ones leave the mask, until hardly any does. The map is the squared error of the last
rebuilt slice in the whole brain. Both networks see v = 6 x - 3, so the background is -3.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ..detection.method import AnomalyDetector, TrainingObjective, foreground_of, noise_like, with_generators
from ..errors import BundleError, SettingError
from ..networks.weight_standardised_unet import WeightStandardisedUNet

SQUARES = ((2, 5, 10), (4, 3, 10))  # side in small squares, and the range of their number
VARIANCES = (0.3, 10.0)  # of the positions of the squares, in square units
UNITS = (2.5, 2.5, 0.625)  # one is drawn, in sides of the small squares
SMALL_SQUARES = ((100, 200), (100, 200), (5, 20))  # range of their number, times the spread, of each unit


@dataclass(frozen=True)
class Refined:
    """What the refinement of one slice ends with: `prediction` (1, C, H, W) of v, and the mask of each round.

    masks: (1, 1, H, W) bool, each inside the one before; the first is the foreground, the last belongs to the result.
    """

    prediction: Tensor
    masks: list[Tensor]


class IterMask2(AnomalyDetector):
    """The detector; 1 call of the first network and one of the second in each round.

    Slices are refined one by one: a round that one of them needs costs the others nothing, and as the masks come from
    hard thresholds, the rounding of a calculation that depends on the batch could change them.

    Args:
        first: high frequencies to slice, C channels to C.
        network: slice that noise covers in part, and high frequencies, to slice, 2 C channels to C.
        radius: the amplitudes of fewer cycles per `canvas` pixels are set to `low_amplitude`; 15 for a canvas of
            240 mm, as published. 0 for none.
        canvas: side of the slices in training; larger ones are cut at the same wavelength.
        low_amplitude: 1 as published, which leaves the phases of the low frequencies to be read; 0 removes them.
        square_px: side of the smallest squares of the random masks in training, 4 mm; the others scale with it.
        first_share: of the foreground, that the first mask covers.
        min_shrink: the mask of a slice that would lose less than this share is its last.
        tau_percentile: of the errors of healthy pixels under random masks, above which a pixel stays in the mask:
            80 as published for tumours, 70 for strokes on T1. `fit_threshold` sets this `threshold`.
        max_rounds: calls of the second network, at most; 0 for the prediction of the first network alone.

    Raises SettingError where a number is out of its range.
    """

    networks = ("first", "network")

    threshold: Tensor

    def __init__(
        self,
        first: WeightStandardisedUNet,
        network: WeightStandardisedUNet,
        radius: float = 12.0,
        canvas: int = 96,
        low_amplitude: float = 1.0,
        square_px: int = 2,
        first_share: float = 0.6,
        min_shrink: float = 0.01,
        tau_percentile: float = 80.0,
        max_rounds: int = 30,
    ) -> None:
        super().__init__()
        _check(0 <= radius <= canvas / 2, f"radius = {radius}", f"choose one from 0 to {canvas / 2}, half the canvas")
        _check(low_amplitude >= 0, f"low_amplitude = {low_amplitude}", "choose 0 or more")
        _check(square_px >= 1, f"square_px = {square_px}", "choose 1 or more")
        _check(0 < first_share < 1, f"first_share = {first_share}", "choose one between 0 and 1")
        _check(0 < min_shrink < 1, f"min_shrink = {min_shrink}", "choose one between 0 and 1")
        _check(0 < tau_percentile < 100, f"tau_percentile = {tau_percentile}", "choose one between 0 and 100")
        _check(max_rounds >= 0, f"max_rounds = {max_rounds}", "choose 0 or more")
        self.first = first
        self.network = network
        self.radius = radius
        self.canvas = canvas
        self.low_amplitude = low_amplitude
        self.square_px = square_px
        self.first_share = first_share
        self.min_shrink = min_shrink
        self.tau_percentile = tau_percentile
        self.max_rounds = max_rounds
        # until it is fitted no pixel leaves the first mask
        self.register_buffer("threshold", torch.zeros((), dtype=torch.float64))
        # twice: reflect padding needs two pixels at the coarsest level
        self.size_divisor = 2 * math.lcm(first.size_divisor, network.size_divisor)

    def _detect(self, image: Tensor, foreground: Tensor, generators: list[Generator]) -> tuple[Tensor, Tensor]:
        v = to_network(image)
        pairs = zip(v.split(1), foreground.split(1), generators, strict=True)
        prediction = torch.cat([self.refine(one, inside, generator).prediction for one, inside, generator in pairs])
        return squared_error(v, prediction), (prediction + 3) / 6

    def refine(self, v: Tensor, foreground: Tensor, generator: Generator) -> Refined:
        """Shrink the mask of one slice until it stays: v (1, C, H, W), foreground (1, 1, H, W) bool.

        Where the first mask is the whole foreground, of two pixels or none, the first network's prediction remains.
        """
        condition = self.condition(v)
        prediction = self.first(condition)
        error = squared_error(v, prediction) * foreground
        threshold = exceeded_by_share(error, foreground, self.first_share)
        masks = [foreground]
        for _ in range(self.max_rounds):
            mask = (error > threshold) & foreground
            size = masks[-1].sum()
            if size == 0 or (size - mask.sum()) / size < self.min_shrink:
                break
            masks.append(mask)
            prediction = self.rebuild(v, mask, condition, [generator])
            error = squared_error(v, prediction) * mask  # only the mask is rebuilt, so it can only shrink
            threshold = self.threshold.to(error)
        return Refined(prediction, masks)

    def condition(self, v: Tensor) -> Tensor:
        """v, also where noise covers it, with its low frequencies at `low_amplitude`; (B, C, H, W) -> same."""
        steps = [self.canvas / size for size in v.shape[2:]]
        return high_frequencies(v, low_frequencies(v.shape[2:], self.radius, steps).to(v.device), self.low_amplitude)

    def rebuild(self, v: Tensor, mask: Tensor, condition: Tensor, generators: list[Generator]) -> Tensor:
        """The second network's prediction of v (B, C, H, W), covered with fresh noise in the mask (B, 1, H, W) bool."""
        covered = torch.where(mask, noise_like(v, generators), v)
        return self.network(torch.cat([covered, condition], dim=1))

    def random_masks(self, foreground: Tensor, generators: list[Generator]) -> Tensor:
        """What training covers of the foreground (B, 1, H, W) bool -> same; drawn on the CPU."""
        pairs = zip(foreground[:, 0].cpu(), generators, strict=True)
        masks = torch.stack([random_mask(inside, self.square_px, generator) for inside, generator in pairs])
        return masks[:, None].to(foreground.device)

    @torch.no_grad()
    def fit_threshold(self, batches: Iterable[Tensor]) -> None:
        """Set the threshold from the second network's errors in healthy slices under random masks. Call `eval()` first.

        batches: slices (B, C, H, W); slice i has the seed i, so the result does not depend on the batches.
        Raises BundleError where no slice has a foreground.
        """
        errors = [torch.empty(0)]
        for image, generators in with_generators(batches):
            v = to_network(image)
            mask = self.random_masks(foreground_of(image), generators)
            error = squared_error(v, self.rebuild(v, mask, self.condition(v), generators))
            errors.append(error[mask].float().cpu())
        values = torch.cat(errors)
        if not len(values):
            raise BundleError("fit_threshold", "the slices are empty", "calibrate on images of healthy brains")
        self.threshold.fill_(healthy_threshold(values, self.tau_percentile))


class IterMask2Objective(TrainingObjective):
    """Mean squared error of v over all pixels, also those of the background and those not covered, of both networks.

    The networks share nothing, so the sum trains each as if it were alone; clip the gradients of each by itself.

    Args:
        detector: the `IterMask2` whose networks are trained.

    Raises SettingError where the channels of the networks do not fit each other.
    """

    def __init__(self, detector: IterMask2) -> None:
        super().__init__()
        channels = detector.first.out_channels
        found = (detector.first.in_channels, detector.network.in_channels, detector.network.out_channels)
        wanted = (channels, 2 * channels, channels)
        names = "in_channels of `first`, in_channels and out_channels of `network`"
        _check(found == wanted, f"{names} are {found}", f"choose {wanted}")
        self.detector = detector

    def forward(self, images: Tensor, foreground: Tensor | None = None) -> dict[str, Tensor]:
        """Keys `loss`, `first` and `masked`, the sum and its parts; masks and noise are of the global generator."""
        detector, generators = self.detector, [torch.default_generator] * len(images)
        v = to_network(images)
        condition = detector.condition(v)
        mask = detector.random_masks(foreground_of(images) if foreground is None else foreground, generators)
        first = F.mse_loss(detector.first(condition).float(), v)
        masked = F.mse_loss(detector.rebuild(v, mask, condition, generators).float(), v)
        return {"loss": first + masked, "first": first.detach(), "masked": masked.detach()}


def _check(fits: bool, fact: str, advice: str) -> None:
    if not fits:
        raise SettingError("IterMask2", fact, advice)


def to_network(image: Tensor) -> Tensor:
    """v = 6 x - 3 for x in [0, 1]: -3 is the background."""
    return image * 6 - 3


def squared_error(v: Tensor, prediction: Tensor) -> Tensor:
    """Mean over channels, (B, C, H, W) twice -> (B, 1, H, W)."""
    return (v - prediction).square().mean(dim=1, keepdim=True)


# --- frequencies ---


def low_frequencies(size: Sequence[int], radius: float, steps: Sequence[float] = (1.0, 1.0)) -> Tensor:
    """Where the shifted spectrum of an image of `size` (H, W) is nearer than `radius` to its centre; (H, W) bool.

    steps: distance of two neighbours along each axis.
    """
    rows, columns = (
        (torch.arange(n, dtype=torch.float64) - n // 2) * step for n, step in zip(size, steps, strict=True)
    )
    return torch.hypot(rows[:, None], columns) < radius


def high_frequencies(v: Tensor, low: Tensor, low_amplitude: float = 1.0) -> Tensor:
    """v (..., H, W) with the amplitudes of its low frequencies (H, W) bool, shifted, replaced, and their phases kept.

    The amplitude is in units of a Fourier transform without normalisation, so 1 is invisible in an image.
    """
    spectrum = torch.fft.fft2(v)
    flat = torch.polar(torch.full_like(v, low_amplitude), spectrum.angle())
    return torch.fft.ifft2(torch.where(torch.fft.ifftshift(low), flat, spectrum)).real


# --- thresholds ---


def exceeded_by_share(error: Tensor, foreground: Tensor, share: float) -> Tensor:
    """The value that ceil(share n) of the n pixels of the foreground exceed (without ties), one for each slice.

    error: (B, 1, H, W) >= 0 and 0 outside of the foreground, which is (B, 1, H, W) bool. Returns (B, 1, 1, 1). It is
    taken of the whole slice, but more background changes nothing.
    """
    values = error.flatten(1).sort(dim=1).values
    rank = (values.shape[1] - share * foreground.flatten(1).sum(dim=1).double()).floor().long()
    return values.gather(1, rank[:, None].clamp(min=1) - 1)[:, :, None, None]


def healthy_threshold(errors: Tensor, percentile: float) -> float:
    """The value that ceil((1 - percentile / 100) n) of n > 0 errors (n,) >= 0 exceed, without ties; 0 for all of them.

    The published one: a rank in all pixels of the healthy slices, where those that are not covered count as 0.
    """
    exceeding = math.ceil((100 - percentile) * len(errors) / 100)
    return float(errors.sort(descending=True).values[exceeding]) if exceeding < len(errors) else 0.0


# --- random masks ---


def random_mask(inside: Tensor, square_px: int, generator: Generator) -> Tensor:
    """Squares of three sizes about a random pixel of the foreground (H, W) bool -> (H, W) bool, within it.

    In two of three masks they lie wide and are many, in the third they are dense and few. As in the published program
    the row of a square and its column are those of two independent draws, so the correlation that it draws too has no
    effect.
    """
    pixels = inside.nonzero()
    if not len(pixels):
        return torch.zeros_like(inside)
    kind = _integer(0, len(UNITS), generator)
    centre = pixels[_integer(0, len(pixels), generator)]
    variance = torch.empty(2).uniform_(*VARIANCES, generator=generator)
    std_px = variance.sqrt() * UNITS[kind] * square_px
    along = [
        torch.exp(-((torch.arange(n) - middle) ** 2) / (2 * std**2))
        for n, middle, std in zip(inside.shape, centre, std_px, strict=True)
    ]
    density = along[0][:, None] * along[1] * inside
    spread = float(variance.prod().sqrt())
    lowest, highest = (int(number * spread) for number in SMALL_SQUARES[kind])
    mask = torch.zeros_like(inside)
    for side, low, high in ((1, lowest, highest), *SQUARES):
        count = _integer(low, high, generator)
        rows, columns = (
            torch.multinomial(density.sum(dim=other), count, replacement=True, generator=generator) for other in (1, 0)
        )
        mask |= squares(inside.shape, rows, columns, side * square_px)
    return mask & inside


def squares(size: Sequence[int], rows: Tensor, columns: Tensor, side: int) -> Tensor:
    """Where squares of a side are whose first row and column are given, (n,) each; (H, W) bool, cut at the border."""
    corners = torch.zeros(1, size[0] + side - 1, size[1] + side - 1)
    corners[0, rows + side - 1, columns + side - 1] = 1
    return F.max_pool2d(corners, side, stride=1)[0] > 0


def _integer(low: int, high: int, generator: Generator) -> int:
    return int(torch.randint(low, high, (), generator=generator))
