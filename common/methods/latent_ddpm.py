"""Fast unsupervised brain anomaly detection with diffusion models (Pinaya et al., MICCAI 2022, arXiv 2206.03461).

A diffusion model on the latents of a VQ-VAE. Where one reverse step is unlikely, by the KL terms of the bound, the
latent is healed: replaced by what the reverse process makes of it, given the rest. The residual counts only there.

The authors published no code. What the paper leaves open is an argument here, with the default of its group's other
code. Formulas that are misprinted in the paper (alpha for alpha_bar, mu) are those of Ho et al.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from monai.networks.nets import DiffusionModelUNet
from torch import Tensor

from ..detection.method import (
    AnomalyDetector,
    TrainingObjective,
    foreground_of,
    image_difference,
    noise_like,
    smoothed,
    with_generators,
)
from ..diffusion.gaussian import GaussianScheduler, evenly_spaced
from ..errors import BundleError, SettingError
from ..networks.latent_space import LatentSpace
from ..networks.pixel_unshuffle_unet import size_divisor
from ..networks.vq_autoencoder import codebook_use
from .autoencoder import random_gain
from .latent_objective import LatentObjective

Variant = Literal["a", "b", "c", "d"]
PERCENTILE = 97.5  # of the healthy KL values at a location, from which on it is unlikely


class LatentDDPM(AnomalyDetector):
    """The detector (section 3 of the paper), in the four variants of its Table 1 and 3.

    (a) noise the latent to `healing_start`, denoise it, residual; (b) the residual of (a) within the mask of unlikely
    locations; (c) only these are healed, too; (d) is (c) with fewer t and DDIM.

    Args:
        latent_size: h and w, for the threshold of each location.
        variant: "a" to "d"; (c) is the paper's method, (d) its fast form.
        num_kl_timesteps: t of the KL map, evenly spaced in `kl_range`; default: all, in (d) 50.
        num_healing_steps: steps of the reverse process, default: all below `healing_start` (DDPM), in (d) 50 (DDIM).
        kl_range: 400 <= t < 600 in the paper; t of large noise are about anatomy, small ones about texture.
        kl_noise: "shared": one noise per slice for all t, as in the group's code. "fresh": another for each t, which
            tells anomalies better (an AUROC higher by 0.02 to 0.03 on head CT with sprites).
        healing_start: t from which the reverse process starts, 500 in the paper; other chains need another.
        threshold_over: the healthy KL values at a location of which the 97.5th percentile is its threshold: "all", as
            the paper reads, or those in the "foreground" (image > 0). With all, the rim of a brain that is larger than
            most is unlikely, because there the others are empty.
        map_kind: "residual" (paper): |x - x'| within the mask. "kl": the KL value of each location in units of its
            threshold, upsampled; the reconstruction is found as before.
        sigma_px: smoothing of the upsampled mask; the paper gives none, half a cell at f = 4. 0 for none.
        num_score_timesteps: t of the image-level score, spread over the whole chain, each a pass for it alone through
            the network; T - 1 is all of it, as in the paper.
        max_batch: latents in one pass through the network; what does not fit is done in parts.
    """

    networks = ("unet",)

    threshold: Tensor
    unrecorded = frozenset({"max_batch"})

    def __init__(
        self,
        latent_space: LatentSpace,
        unet: DiffusionModelUNet,
        scheduler: GaussianScheduler,
        latent_size: Sequence[int],
        variant: Variant = "c",
        num_kl_timesteps: int | None = None,
        num_healing_steps: int | None = None,
        kl_range: tuple[int, int] = (400, 600),
        kl_noise: Literal["shared", "fresh"] = "shared",
        healing_start: int = 500,
        threshold_over: Literal["all", "foreground"] = "all",
        map_kind: Literal["residual", "kl"] = "residual",
        sigma_px: float = 2.0,
        num_score_timesteps: int = 50,
        max_batch: int = 256,
    ) -> None:
        super().__init__()
        first, last = kl_range
        steps = scheduler.num_train_timesteps
        if not (1 <= first < last <= steps and 1 <= healing_start <= steps):
            fact = f"kl_range {kl_range} or healing_start {healing_start} is outside of the schedule, [1, {steps}]"
            raise SettingError("LatentDDPM", fact, "choose steps within")
        self.latent_space = latent_space
        self.unet = unet
        self.scheduler = scheduler
        self.variant = variant
        is_fast = variant == "d"
        self.kl_timesteps = evenly_spaced(first, last, num_kl_timesteps or (50 if is_fast else last - first))
        num_healing_steps = num_healing_steps or (50 if is_fast else healing_start)
        self.healing_timesteps = evenly_spaced(0, healing_start, num_healing_steps)[::-1]
        self.kl_noise = kl_noise
        self.eta = 0.0 if is_fast else 1.0
        self.threshold_over = threshold_over
        self.map_kind = map_kind
        self.sigma_px = sigma_px
        middle = (steps - 1) // max(1, num_score_timesteps) // 2  # of the part of the chain that a t stands for
        self.score_timesteps = [t + middle for t in evenly_spaced(1, steps, num_score_timesteps)]
        self.max_batch = max_batch
        self.size_divisor = latent_space.downsampling * size_divisor(unet)
        # KL values are above 0: before it is fitted every location is unlikely
        self.register_buffer("threshold", torch.zeros(tuple(latent_size), dtype=torch.float64))

    def _detect(self, image: Tensor, foreground: Tensor, generators: list[torch.Generator]) -> tuple[Tensor, Tensor]:
        z0, _ = self.latent_space.posterior(image)
        everywhere = torch.ones_like(z0[:, :1])
        if self.variant == "a" and self.map_kind == "residual":
            mask = everywhere
        else:
            kl = self.kl_map(z0, generators, self.kl_timesteps)
            mask = self.unlikely(kl)
        z = self.heal(z0, everywhere if self.variant in ("a", "b") else mask, generators)
        reconstruction = self.latent_space.decode(z)
        if self.map_kind == "kl":
            return F.interpolate(self.over_threshold(kl), image.shape[2:], mode="bilinear"), reconstruction
        return masked_residual(image, reconstruction, mask, self.sigma_px), reconstruction

    def kl_map(self, z0: Tensor, generators: list[torch.Generator], timesteps: Sequence[int]) -> Tensor:
        """v, the mean over t and channels of L_{t-1} (section 3): (B, C_z, h, w) -> (B, h, w)."""
        shared = noise_like(z0, generators) if self.kl_noise == "shared" else None
        total = torch.zeros_like(z0[:, 0])
        for part in torch.tensor(timesteps, device=z0.device).split(max(1, self.max_batch // len(z0))):
            t = part.repeat_interleave(len(z0))
            eps_t = torch.cat([noise_like(z0, generators) if shared is None else shared for _ in part])
            z0_t = z0.repeat(len(part), 1, 1, 1)
            eps_pred = self.unet(self.scheduler.add_noise(z0_t, eps_t, t), t)
            kl = self.scheduler.kl(eps_t, eps_pred, t).mean(dim=1)
            total = total + kl.unflatten(0, (len(part), len(z0))).sum(dim=0)
        return total / len(timesteps)

    def unlikely(self, v: Tensor) -> Tensor:
        """m = 1 where v reaches the threshold of its location: (B, h, w) -> (B, 1, h, w) in {0, 1}."""
        return (v >= self.threshold_for(v)).to(v.dtype)[:, None]

    def over_threshold(self, v: Tensor) -> Tensor:
        """v in units of the threshold of its location: (B, h, w) -> (B, 1, h, w) float32, 1 at the threshold."""
        return (v / self.threshold_for(v).clamp(min=torch.finfo(v.dtype).tiny)).float()[:, None]

    def threshold_for(self, v: Tensor) -> Tensor:
        """The threshold of each location of v (B, h, w), (h, w).

        Latents of another size are taken to have the same centre; beyond the rim its thresholds are repeated.
        """
        rows, columns = (
            (torch.arange(size, device=v.device) - (size - fitted) // 2).clamp(0, fitted - 1)
            for size, fitted in zip(v.shape[1:], self.threshold.shape, strict=True)
        )
        return self.threshold[rows][:, columns]

    def heal(self, z0: Tensor, mask: Tensor, generators: list[torch.Generator]) -> Tensor:
        """The reverse process where the mask is 1, from noise of level `healing_start`; elsewhere z0 stays.

        The network sees the clean z0 there, as in the paper. z0: (B, C_z, h, w);  mask: (B, 1, h, w) in {0, 1}.
        """
        steps = self.healing_timesteps
        z_t = self.noised(z0, noise_like(z0, generators), steps[0])
        for t, t_prev in zip(steps, [*steps[1:], -1], strict=True):
            z_in = mask * z_t + (1 - mask) * z0
            eps_pred = self.unet(z_in, torch.full((len(z0),), t, device=z0.device))
            noise = noise_like(z0, generators) if self.eta > 0 and t_prev >= 0 else None
            z_t = self.scheduler.step(z_in, eps_pred, t, t_prev, noise, self.eta)
        return mask * z_t + (1 - mask) * z0

    def noised(self, z0: Tensor, eps: Tensor, t: int) -> Tensor:
        """`add_noise` with one t for all."""
        return self.scheduler.add_noise(z0, eps, torch.full((len(z0),), t, device=z0.device))

    @torch.no_grad()
    def score(self, image: Tensor, foreground: Tensor, generators: list[torch.Generator]) -> Tensor:
        """Mean KL over the whole chain, t = 1 .. T - 1 or evenly spaced ones: (B, C, H, W) -> (B,)."""
        z0, _ = self.latent_space.posterior(image)
        return self.kl_map(z0, generators, self.score_timesteps).mean(dim=(1, 2))

    @torch.no_grad()
    def fit_threshold(self, batches: Iterable[Tensor]) -> None:
        """Set the threshold of each location from batches of healthy slices (B, C, H, W) (section 3).

        Raises BundleError where their latents have another size.
        """
        maps, insides = [], []
        for image, generators in with_generators(batches):
            z0, _ = self.latent_space.posterior(image)
            maps.append(self.kl_map(z0, generators, self.kl_timesteps).double().cpu())
            insides.append(F.adaptive_max_pool2d(foreground_of(image).float(), z0.shape[2:])[:, 0].bool().cpu())
        inside = torch.cat(insides) if self.threshold_over == "foreground" else None
        fitted = location_percentile(torch.cat(maps), PERCENTILE, inside)
        if fitted.shape != self.threshold.shape:
            fact = f"thresholds of {tuple(fitted.shape)} locations for latents of {tuple(self.threshold.shape)}"
            raise BundleError("fit_threshold", fact, "set `latent_size` to the slices' size over the downsampling")
        self.threshold.copy_(fitted)


def location_percentile(v: Tensor, percentile: float, inside: Tensor | None = None) -> Tensor:
    """The percentile of each location, linearly interpolated: (n, h, w) -> (h, w) float64.

    Where `inside` (n, h, w) bool is given, only these values count, and a location where too few are inside to exceed
    the percentile takes that of all locations.
    """
    values = v.double().numpy()  # torch.quantile takes 16 million values at most
    if inside is None:
        return torch.from_numpy(np.percentile(values, percentile, axis=0))
    values = np.where(inside.numpy(), values, np.nan)
    is_rare = inside.sum(dim=0).numpy() < 100 / (100 - percentile)
    fitted = np.empty(values.shape[1:])
    fitted[~is_rare] = np.nanpercentile(values[:, ~is_rare], percentile, axis=0)
    fitted[is_rare] = np.nanpercentile(values, percentile)
    return torch.from_numpy(fitted)


def masked_residual(image: Tensor, reconstruction: Tensor, mask: Tensor, sigma_px: float) -> Tensor:
    """|x - x'| G_sigma(upsampled mask), of the worst channel: (B, C, H, W) twice, (B, 1, h, w) -> (B, 1, H, W)."""
    upsampled = F.interpolate(mask, image.shape[2:], mode="nearest")
    return image_difference(image, reconstruction, None) * smoothed(upsampled, sigma_px)


class LatentDDPMObjective(LatentObjective):
    """L_simple: mean of (eps - eps_pred)^2, t uniform (the paper prints a norm that is not squared).

    Args:
        detector: the `LatentDDPM` whose U-Net is trained; its latent space stays frozen.
    """

    def __init__(self, detector: LatentDDPM) -> None:
        super().__init__()
        self.detector = detector

    def losses_of(self, mean: Tensor, std: Tensor, foreground: Tensor | None) -> dict[str, Tensor]:
        """Key `loss`."""
        z0 = mean
        t = torch.randint(self.detector.scheduler.num_train_timesteps, (len(z0),), device=z0.device)
        eps = torch.randn_like(z0)
        return {"loss": F.mse_loss(self.detector.unet(self.detector.scheduler.add_noise(z0, eps, t), t).float(), eps)}


class VQVAEObjective(TrainingObjective):
    """The first stage: L1 reconstruction and commitment, on images in [-1, 1]; the codebook follows by averages.

    The group's other code adds perceptual and adversarial terms, which need downloaded weights or a second network.

    Args:
        latent_space: the `LatentSpace` whose `VQAutoencoder` is trained here.
        max_gain: images are multiplied by a random factor in [1 - max_gain, 1 + max_gain], so that intensities beyond
            the healthy ones, as lesions have them, get codes; 0 for the paper's training, which has none.
    """

    def __init__(self, latent_space: LatentSpace, max_gain: float = 0.2) -> None:
        super().__init__()
        self.autoencoder = latent_space.autoencoder.requires_grad_(True)
        self.autoencoder.quantizer.embedding.requires_grad_(False)
        self.max_gain = max_gain

    def forward(self, images: Tensor, foreground: Tensor | None = None) -> dict[str, Tensor]:
        """Keys `loss`, `l1`, `commitment`, and of the codebook `codes_used` and `perplexity` in this batch."""
        target = (random_gain(images, self.max_gain) if self.training else images) * 2 - 1
        reconstruction, commitment, codes = self.autoencoder(target)
        l1 = (reconstruction - target).abs().mean()
        used, perplexity = codebook_use(codes, self.autoencoder.num_embeddings)
        return {
            "loss": l1 + commitment,
            "l1": l1,
            "commitment": commitment,
            "codes_used": used,
            "perplexity": perplexity,
        }
