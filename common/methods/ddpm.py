"""DDPM: partial diffusion to a level and back, the common base of the pixel-space methods (Ho et al. 2020).

A network learns to remove noise from healthy slices. At test time a slice is noised to level L, so that a lesion drowns
and the anatomy survives, and is denoised again; where the result differs from the slice is the anomaly map. A higher
level removes more of a lesion and more of the healthy detail.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Protocol

import torch
import torch.nn.functional as F
from monai.networks.nets import DiffusionModelUNet
from monai.networks.schedulers import DDPMScheduler
from torch import Generator, Tensor

from ..detection.method import AnomalyDetector, TrainingObjective, median, noise_like
from ..errors import SettingError
from ..networks.pixel_unshuffle_unet import size_divisor


class Noise(Protocol):
    """What is added to an image: like x (B, C, H, W), at indices t (B,), from one generator a sample or the global."""

    def __call__(self, x: Tensor, t: Tensor, generators: list[Generator] | None = None) -> Tensor:
        """Noise of the shape, dtype and device of x."""


def gaussian_noise(x: Tensor, t: Tensor, generators: list[Generator] | None = None) -> Tensor:
    """Standard normal noise, the same at every index."""
    return torch.randn_like(x) if generators is None else noise_like(x, generators)


class DDPM(AnomalyDetector):
    """x_L = sqrt(alpha_bar_L) x + sqrt(1 - alpha_bar_L) noise, denoised step by step; the map is |x - x_hat|.

    Args:
        unet: `unet(x_t, t)` predicts what the scheduler's `prediction_type` says.
        scheduler: holds schedule, variance of the steps and range that the prediction of x0 is clipped to; default:
            MONAI's (1000 indices, linear, "fixed_small", [-1, 1]).
        level: L, 1 ... 1000. More removes larger lesions; AutoDDPM's tables go from 50 to 300.
        num_inference_steps: function evaluations of DDIM sampling with even strides; None for ancestral sampling, over
            every index.
        eta: stochasticity of DDIM sampling; 0 draws no noise, 1 the posterior's.
        forward_noise, reverse_noise: Gaussian by default; a method may bring its own, as AnoDDPM does.
        residual: "absolute" or "squared", the mean over channels, of images in [0, 1].
        symmetric: the network sees [-1, 1]; False: [0, 1] (AutoDDPM's code), so that the dark side is not clipped.
        median_size: side of a median window over the map, odd; 1, as published, for none.

    The 0-based index that a level stands for is a method's own, `first_index`: "L" (AutoDDPM, THOR: L + 1 calls of the
    network) or "L-1" (AnoDDPM: L calls).
    """

    networks = ("unet",)

    first_index: ClassVar[Literal["L", "L-1"]] = "L"

    def __init__(
        self,
        unet: DiffusionModelUNet,
        scheduler: DDPMScheduler | None = None,
        level: int = 200,
        num_inference_steps: int | None = None,
        eta: float = 0.0,
        forward_noise: Noise = gaussian_noise,
        reverse_noise: Noise = gaussian_noise,
        residual: Literal["absolute", "squared"] = "absolute",
        symmetric: bool = True,
        median_size: int = 1,
    ) -> None:
        super().__init__()
        self.unet = unet
        self.scheduler = scheduler or DDPMScheduler()
        self.start = self.index(level if self.first_index == "L" else level - 1)
        self.num_inference_steps = num_inference_steps
        self.eta = eta
        self.forward_noise = forward_noise
        self.reverse_noise = reverse_noise
        self.residual = residual
        self.symmetric = symmetric
        self.median_size = median_size
        self.size_divisor = size_divisor(unet)
        self.steps = sampling_steps(self.start, -1, num_inference_steps)

    def _detect(self, image: Tensor, foreground: Tensor, generators: list[Generator]) -> tuple[Tensor, ...]:
        reconstruction = self.to_image(self.reconstruct(self.to_network(image), generators)).clamp(0, 1)
        return median(self.difference(image, reconstruction), self.median_size), reconstruction

    def reconstruct(self, x0: Tensor, generators: list[Generator]) -> Tensor:
        """x_hat: noise to the first index, then all steps; (B, C, H, W) in the network's range, twice."""
        x_t = self.noised(x0, self.start, generators)
        for t, t_prev in self.steps:
            x_t = self.step(x_t, t, t_prev, generators, ddim=self.num_inference_steps is not None)
        return x_t

    def difference(self, image: Tensor, reconstruction: Tensor) -> Tensor:
        """|x - x_hat| or (x - x_hat)^2, mean over channels: (B, C, H, W) twice -> (B, 1, H, W)."""
        error = (image - reconstruction).abs()
        return (error.square() if self.residual == "squared" else error).mean(dim=1, keepdim=True)

    def to_network(self, image: Tensor) -> Tensor:
        """[0, 1] to the range that the network sees."""
        return image * 2 - 1 if self.symmetric else image

    def to_image(self, x: Tensor) -> Tensor:
        """The inverse of `to_network`."""
        return (x + 1) / 2 if self.symmetric else x

    def index(self, t: int) -> int:
        """t itself, or SettingError where the schedule has no such index."""
        last = self.scheduler.num_train_timesteps - 1
        if not 0 <= t <= last:
            raise SettingError("level", f"index {t} is outside the schedule, 0 ... {last}", "choose a level within")
        return t

    # --- the diffusion process ---

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) noise (eq. 4 of Ho et al.); t: (B,) int64."""
        alpha_bar = self.scheduler.alphas_cumprod.to(x0)[t].view(-1, 1, 1, 1)
        return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise

    def noised(self, x0: Tensor, t: int, generators: list[Generator]) -> Tensor:
        """x0 noised to index t with fresh noise."""
        times = torch.full((len(x0),), t, device=x0.device)
        return self.add_noise(x0, times, self.forward_noise(x0, times, generators))

    def step(self, x_t: Tensor, t: int, t_prev: int, generators: list[Generator], ddim: bool = False) -> Tensor:
        """x_t to x_{t_prev} with one call of the network; -1 is the clean end, where no noise is added.

        An ancestral step has t_prev = t - 1. MONAI's DDIM scheduler leaves its own grid, so both indices are given.
        """
        times = torch.full((len(x_t),), t, device=x_t.device)
        x0 = self.predict_x0(x_t, t, self.unet(x_t, times))
        mean, std = self.ddim(x0, x_t, t, t_prev) if ddim else self.posterior(x0, x_t, t)
        return mean if t_prev < 0 or std == 0 else mean + std * self.reverse_noise(x_t, times, generators)

    def predict_x0(self, x_t: Tensor, t: int, output: Tensor) -> Tensor:
        """The clean image that an output of the network means, clipped (eq. 15 of Ho et al. for epsilon)."""
        scheduler, alpha_bar = self.scheduler, self.scheduler.alphas_cumprod[t]
        if scheduler.prediction_type == "epsilon":
            output = (x_t - (1 - alpha_bar).sqrt() * output) / alpha_bar.sqrt()
        elif scheduler.prediction_type == "v_prediction":
            output = alpha_bar.sqrt() * x_t - (1 - alpha_bar).sqrt() * output
        return output.clamp(*scheduler.clip_sample_values) if scheduler.clip_sample else output

    def posterior(self, x0: Tensor, x_t: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of q(x_{t-1} | x_t, x0) (eq. 6 and 7 of Ho et al.), as MONAI has them."""
        scheduler, alpha_bar, previous = self.scheduler, *self._alpha_bars(t, t - 1)
        beta, alpha = scheduler.betas[t], scheduler.alphas[t]
        mean = previous.sqrt() * beta / (1 - alpha_bar) * x0 + alpha.sqrt() * (1 - previous) / (1 - alpha_bar) * x_t
        variance = beta if scheduler.variance_type == "fixed_large" else (1 - previous) / (1 - alpha_bar) * beta
        return mean, variance.sqrt()

    def ddim(self, x0: Tensor, x_t: Tensor, t: int, t_prev: int) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the DDIM step (eq. 12, 16 of Song et al. 2021), with the eps of clipped x0."""
        alpha_bar, previous = self._alpha_bars(t, t_prev)
        sigma = self.eta * ((1 - previous) / (1 - alpha_bar) * (1 - alpha_bar / previous)).sqrt()
        eps = (x_t - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()
        return previous.sqrt() * x0 + (1 - previous - sigma**2).clamp(min=0).sqrt() * eps, sigma

    def _alpha_bars(self, t: int, t_prev: int) -> tuple[Tensor, Tensor]:
        alpha_bar = self.scheduler.alphas_cumprod
        return alpha_bar[t], alpha_bar[t_prev] if t_prev >= 0 else self.scheduler.one


class DDPMObjective(TrainingObjective):
    """Mean squared error of what the network predicts (eq. 14 of Ho et al.), over the whole slice.

    Args:
        detector: whose U-Net is trained, with its forward noise.
        max_timestep: indices are drawn from 0 ... max_timestep - 1; default: all.
    """

    def __init__(self, detector: DDPM, max_timestep: int | None = None) -> None:
        super().__init__()
        self.detector = detector
        self.max_timestep = max_timestep or detector.scheduler.num_train_timesteps

    def forward(self, images: Tensor, foreground: Tensor | None = None) -> dict[str, Tensor]:
        """Key `loss`; indices and noise are drawn from the global generator, for each sample its own."""
        x0 = self.detector.to_network(images)
        t = torch.randint(self.max_timestep, (len(x0),), device=x0.device)
        return {"loss": self.noise_loss(x0, t, self.detector.forward_noise(x0, t))}

    def noise_loss(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The loss of given noise; x0 in the network's range."""
        output = self.detector.unet(self.detector.add_noise(x0, t, noise), t)
        kind = self.detector.scheduler.prediction_type
        if kind == "v_prediction":
            alpha_bar = self.detector.scheduler.alphas_cumprod.to(x0)[t].view(-1, 1, 1, 1)
            return F.mse_loss(output, alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x0)
        return F.mse_loss(output, noise if kind == "epsilon" else x0)


def sampling_steps(start: int, end: int, num_steps: int | None) -> list[tuple[int, int]]:
    """Pairs (t, t_prev) from `start` down to `end`: every index, or `num_steps` of even stride that end at end + 1.

    For example 200 to -1 in 5: (200, 150), (150, 100), (100, 50), (50, 0), (0, -1). Raises SettingError.
    """
    count = start - end if num_steps is None else num_steps
    if not 1 <= count <= start - end:
        fact = f"{num_steps} steps do not fit the indices {start} to {end + 1}"
        raise SettingError("num_inference_steps", fact, f"choose 1 to {start - end}")
    indices = [round(start - i * (start - end - 1) / max(count - 1, 1)) for i in range(count)]
    return list(zip(indices, [*indices[1:], end], strict=True))
