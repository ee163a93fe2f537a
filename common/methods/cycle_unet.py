"""Cycl.UNet and MMCCD: from one modality to another and back (Liang et al., MMMI at MICCAI 2023, arXiv 2308.16150).

Two networks learn to translate healthy slices of modality A to B and of B to A, each by plain regression: the cycle
exists at test time only. Tissue of a kind that they never saw is translated wrongly and does not come back. Training
needs pairs on one grid; detection needs A alone. In MMCCD a diffusion model goes there, told A but for a strip.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from monai.networks.nets import DiffusionModelUNet
from torch import Generator, Tensor

from ..detection.method import AnomalyDetector, TrainingObjective, foreground_of, noise_like
from ..diffusion.gaussian import GaussianScheduler
from ..errors import ImageShapeError, SettingError
from ..networks.pixel_unshuffle_unet import size_divisor
from ..networks.weight_standardised_unet import WeightStandardisedUNet

RANGE = 6.0  # images in [0, 1] are [-3, 3] for the networks, as published


class CycleUNet(AnomalyDetector):
    """(x - G_BA(G_AB(x)))^2, of images in [-3, 3], raw; two calls a slice, nothing is drawn.

    Args:
        there: G_AB, from modality A to B.
        back: G_BA.
    """

    networks = ("there", "back")

    def __init__(self, there: WeightStandardisedUNet, back: WeightStandardisedUNet) -> None:
        super().__init__()
        self.there = there
        self.back = back
        # twice: reflect padding needs two pixels at the coarsest level
        self.size_divisor = 2 * max(network.size_divisor for network in (there, back))

    def _detect(self, image: Tensor, foreground: Tensor, generators: list[Generator]) -> tuple[Tensor, Tensor]:
        x = to_network(image)
        cycled = self.back(self.there(x))
        return (x - cycled).square().mean(dim=1, keepdim=True), to_image(cycled)


class CycleUNetObjective(TrainingObjective):
    """Mean squared error of the translation there, plus that of the way back; neither sees what the other makes.

    The networks share nothing, so that this is the same as two trainings, as long as the gradients are not clipped
    together.

    Args:
        detector: the `CycleUNet` whose networks are trained.
        foreground_only: the mean is over the foreground; published: over all pixels.
    """

    def __init__(self, detector: CycleUNet, foreground_only: bool = False) -> None:
        super().__init__()
        self.detector = detector
        self.foreground_only = foreground_only

    def forward(self, images: Tensor, foreground: Tensor | None = None) -> dict[str, Tensor]:
        """Keys `loss`, `there` and `back`; the images are pairs (B, 2, H, W) of A and B."""
        a, b = pair(images)
        foreground = foreground_of(images) if foreground is None else foreground
        where = foreground if self.foreground_only else torch.ones_like(foreground)
        there, back = error(self.detector.there(a), b, where), error(self.detector.back(b), a, where)
        return {"loss": there + back, "there": there, "back": back}


class MMCCD(AnomalyDetector):
    """The cycle with a masked, conditional diffusion model on the way there: what is in a strip is foretold.

    For each strip of columns, then of rows, B is sampled by DDIM without new noise, told A with noise in the strip,
    and translated back. The map is the squared error inside the strips, the mean over those that hold a pixel.

    Args:
        there: `there([x_t, condition], t)` predicts B; of 2 channels, and 1.
        back: G_BA.
        width: of a strip in pixels.
        stride: between strips; `width` for strips that do not overlap. Published are strips of 16 every 2 pixels of 128
            and 100 steps, 12,928 calls a slice; the default is 16 strips at 128 pixels and 10 steps, 176 calls, which
            found as much where it was measured (the card of `cycle_unet_glioma`).
        num_inference_steps: of the DDIM sampling, from an even stride of the 1,000 indices: a divisor of them.

    Raises SettingError for numbers that do not fit.
    """

    networks = ("there", "back")

    def __init__(
        self,
        there: DiffusionModelUNet,
        back: WeightStandardisedUNet,
        width: int = 16,
        stride: int = 16,
        num_inference_steps: int = 10,
    ) -> None:
        super().__init__()
        self.scheduler = GaussianScheduler()
        total = self.scheduler.num_train_timesteps
        if not 1 <= stride <= width:
            raise SettingError("MMCCD", f"stride = {stride}, width = {width}", "choose a stride from 1 to the width")
        if num_inference_steps < 1 or total % num_inference_steps:
            fact = f"{num_inference_steps} steps have no even stride over {total} indices"
            raise SettingError("num_inference_steps", fact, "choose a divisor, such as 10 or 100")
        self.there = there
        self.back = back
        self.width = width
        self.stride = stride
        self.steps = list(range(total - total // num_inference_steps, -1, -(total // num_inference_steps)))
        self.size_divisor = max(2 * back.size_divisor, size_divisor(there))

    def _detect(self, image: Tensor, foreground: Tensor, generators: list[Generator]) -> tuple[Tensor, Tensor]:
        x, start = to_network(image), noise_like(image, generators)
        errors, cycled, count = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(x)
        for strip in strips(x, self.width, self.stride):
            noises = (noise_like(x, generators) for _ in self.steps)
            back = self.back(self.translate(x, strip, start, noises))
            errors, cycled, count = errors + strip * (x - back).square(), cycled + strip * back, count + strip
        return errors / count, to_image(cycled / count)

    def translate(self, x: Tensor, strip: Tensor, start: Tensor, noises: Iterator[Tensor]) -> Tensor:
        """B of a slice, told what is outside of the strip; start: noise, and `noises` for the strip, one a step."""
        b = start
        for t, t_prev in zip(self.steps, [*self.steps[1:], -1], strict=True):
            condition = strip * next(noises) + (1 - strip) * x
            times = torch.full((len(x),), t, device=x.device)
            b_0 = self.there(torch.cat([b, condition], dim=1), times)
            alpha_bar = self.scheduler.alpha_bar[t].to(x.dtype)
            eps = (b - alpha_bar.sqrt() * b_0) / (1 - alpha_bar).sqrt()
            b = self.scheduler.step(b, eps, t, t_prev)
        return b


class MMCCDObjective(TrainingObjective):
    """Mean squared error of B foretold from noised B and A without a strip, plus that of the way back, over all pixels.

    Args:
        detector: the `MMCCD` whose networks are trained.
        stride: of the first columns and rows of the strips, of which each batch draws one, as published.
    """

    def __init__(self, detector: MMCCD, stride: int = 2) -> None:
        super().__init__()
        self.detector = detector
        self.stride = stride

    def forward(self, images: Tensor, foreground: Tensor | None = None) -> dict[str, Tensor]:
        """Keys `loss`, `there` and `back`; the images are pairs (B, 2, H, W) of A and B."""
        a, b = pair(images)
        detector = self.detector
        places = strips(a, detector.width, self.stride)
        strip = places[int(torch.randint(len(places), ()))]
        t = torch.randint(detector.scheduler.num_train_timesteps, (len(a),), device=a.device)
        noised = detector.scheduler.add_noise(b, torch.randn_like(b), t)
        condition = strip * torch.randn_like(a) + (1 - strip) * a
        there = F.mse_loss(detector.there(torch.cat([noised, condition], dim=1), t), b)
        back = F.mse_loss(detector.back(b), a)
        return {"loss": there + back, "there": there, "back": back}


def strips(x: Tensor, width: int, stride: int) -> list[Tensor]:
    """Masks (1, 1, H, W), 1 in a strip of an image (B, 1, H, W), cut at the border: of columns, then of rows."""
    found = []
    for axis in (3, 2):
        places = torch.arange(x.shape[axis], device=x.device)
        for first in range(0, x.shape[axis], stride):
            inside = ((places >= first) & (places < first + width)).to(x.dtype)
            found.append(inside.view(1, 1, *((-1, 1) if axis == 2 else (1, -1))).expand(1, 1, *x.shape[2:]))
    return found


def to_network(image: Tensor) -> Tensor:
    """[0, 1] to [-3, 3]."""
    return RANGE * (image - 0.5)


def to_image(x: Tensor) -> Tensor:
    """The inverse of `to_network`."""
    return x / RANGE + 0.5


def pair(images: Tensor) -> tuple[Tensor, Tensor]:
    """A and B, (B, 1, H, W) in [-3, 3], of pairs (B, 2, H, W) in [0, 1]. Raises ImageShapeError."""
    if images.shape[1] != 2:
        fact = f"{images.shape[1]} modalities"
        raise ImageShapeError("images", fact, "train on pairs: the modality that is looked at, and another one")
    a, b = to_network(images).chunk(2, dim=1)
    return a, b


def error(prediction: Tensor, target: Tensor, where: Tensor) -> Tensor:
    """Mean squared error of (B, 1, H, W) where it is asked for, (B, 1, H, W) bool."""
    return F.mse_loss(prediction[where], target[where])
