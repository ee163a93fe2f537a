"""MAD-AD: masked diffusion for unsupervised brain anomaly detection (Beizaee et al., IPMI 2025, arXiv 2502.16943).

A diffusion model on latents whose forward process noises only a random part of the cells. It learns to say which
cells were noised and what they were. At test time an anomaly looks like a noised cell: where the mask head says so,
and only there, the latent is replaced step by step by its healthy version.

Where the paper and its code disagree, see the options of `MADAD` and the comments beside the formulas.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..detection.method import AnomalyDetector, image_difference, noise_like, smoothed
from ..diffusion.masked_ddim import MaskedDDIMScheduler
from ..networks.latent_space import LatentSpace
from ..networks.masked_unet import MaskedDiffusionUNet
from .latent_objective import LatentObjective

MapKind = Literal["image", "input", "latent", "mask"]
PATCH_SIZES, PATCH_PROBABILITIES = (1, 2, 4, 8), (0.2, 0.3, 0.3, 0.2)
MAX_RATIO = 0.4


class MADAD(AnomalyDetector):
    """The detector (section 3.3 of the paper).

    Args:
        num_inference_steps: DDIM steps, 10; 5 and 2 are the paper's ablation.
        map_kind: what the map compares. "image": two decoder outputs, |D(z_corrected) - D(z)| (published code; the
            autoencoder's own error cancels). "input": |D(z_corrected) - x| (eq. 8 as printed). "latent" and "mask" are
            the ablations: mean latent difference, mean predicted mask over the steps.
        gamma: clip of the image difference, in [0, 1] units; 0.125 is the published code's 0.25 on [-1, 1]. None, no
            clip, is one of the paper's ablations.
        sigma_px: Gaussian smoothing of the map; 5 in the code at 1 mm, so 2.5 at 2 mm; 0 for none.
    """

    networks = ("unet",)

    def __init__(
        self,
        latent_space: LatentSpace,
        unet: MaskedDiffusionUNet,
        scheduler: MaskedDDIMScheduler,
        num_inference_steps: int = 10,
        map_kind: MapKind = "image",
        gamma: float | None = 0.125,
        sigma_px: float = 5.0,
    ) -> None:
        super().__init__()
        self.latent_space = latent_space
        self.unet = unet
        self.scheduler = scheduler
        self.num_inference_steps = num_inference_steps
        self.map_kind = map_kind
        self.gamma = gamma
        self.sigma_px = sigma_px
        self.size_divisor = latent_space.downsampling * unet.size_divisor

    def _detect(self, image: Tensor, foreground: Tensor, generators: list[torch.Generator]) -> tuple[Tensor, Tensor]:
        z, _ = self.latent_space.posterior(image)
        corrected, mask_mean = self.correct(z, generators)
        reconstruction = self.latent_space.decode(corrected)
        if self.map_kind == "mask":
            anomaly_map = F.interpolate(mask_mean, image.shape[2:], mode="bilinear")
        elif self.map_kind == "latent":
            anomaly_map = F.interpolate((corrected - z).abs().mean(1, keepdim=True), image.shape[2:], mode="bilinear")
        else:
            reference = image if self.map_kind == "input" else self.latent_space.decode(z)
            anomaly_map = image_difference(reconstruction, reference, self.gamma)
        return self.smoothed(anomaly_map), reconstruction

    def smoothed(self, anomaly_map: Tensor) -> Tensor:
        """The map smoothed as published; (B, 1, H, W) -> same."""
        return smoothed(anomaly_map, self.sigma_px)

    def correct(self, z: Tensor, generators: list[torch.Generator]) -> tuple[Tensor, Tensor]:
        """The reverse process from the input's own latent, without forward noise (eq. 5 to 7).

        Returns the corrected latent and the mean over the steps of P(noised), (B, 1, h, w).
        """
        steps = self.scheduler.timesteps(self.num_inference_steps)
        z_t, mask_mean = z, torch.zeros_like(z[:, :1])
        for t, t_prev in zip(steps, [*steps[1:], -1], strict=True):
            z0, mask_logit = self.unet(z_t, torch.full((len(z),), t, device=z.device))
            mask = (mask_logit > 0).to(z.dtype)  # strict: P = 0.5 exactly is "not noised"
            noise = noise_like(z, generators)
            z_t = self.scheduler.step(z_t, z0, mask, t, t_prev, noise)
            mask_mean = mask_mean + mask_logit.sigmoid() / len(steps)
        return z_t, mask_mean


class MADADObjective(LatentObjective):
    """Mean squared error of z0 over all cells + mask_weight * loss of the mask head.

    The noised share of the patches is uniform in [0, 0.4] for each sample; the sides of the patches are drawn once per
    batch for each axis, 1, 2, 4 or 8 cells with the probabilities of the published code.

    Args:
        detector: the `MADAD` whose U-Net is trained; its latent space stays frozen.
        mask_loss: "mse" (the code, a Brier score) or "bce" (the paper).
        mask_weight: 0.001 in the code at its last version, 0.01 at its first; the paper gives none.
        brain_block: noise may only fall into blocks of this many cells a side ...
        min_brain_share: ... of which at least this share of pixels is foreground (2 and 0.9 in the code).
    """

    def __init__(
        self,
        detector: MADAD,
        mask_loss: Literal["mse", "bce"] = "mse",
        mask_weight: float = 0.001,
        brain_block: int = 2,
        min_brain_share: float = 0.9,
    ) -> None:
        super().__init__()
        self.detector = detector
        self.mask_loss = mask_loss
        self.mask_weight = mask_weight
        self.brain_block = brain_block
        self.min_brain_share = min_brain_share

    def losses_of(self, mean: Tensor, std: Tensor, foreground: Tensor | None) -> dict[str, Tensor]:
        """Keys `loss`, `z0_loss` and `mask_loss`."""
        if foreground is None:
            raise ValueError("give images, or a posterior with its foreground")
        z0 = mean + std * torch.randn_like(std)
        mask = self.random_mask(z0) * self.allowed_cells(foreground)
        t = torch.randint(self.detector.scheduler.num_train_timesteps, (len(z0),), device=z0.device)
        z_t = self.detector.scheduler.add_noise(z0, torch.randn_like(z0), mask, t)
        z0_pred, mask_logit = self.detector.unet(z_t, t)
        return self.losses(z0, z0_pred, mask, mask_logit)

    def losses(self, z0: Tensor, z0_pred: Tensor, mask: Tensor, mask_logit: Tensor) -> dict[str, Tensor]:
        """z0, z0_pred: (B, C_z, h, w);  mask, mask_logit: (B, 1, h, w)."""
        z0_loss = F.mse_loss(z0_pred, z0)
        if self.mask_loss == "bce":
            mask_loss = F.binary_cross_entropy_with_logits(mask_logit, mask)
        else:
            mask_loss = F.mse_loss(mask_logit.sigmoid(), mask)
        return {"loss": z0_loss + self.mask_weight * mask_loss, "z0_loss": z0_loss, "mask_loss": mask_loss}

    def random_mask(self, z: Tensor) -> Tensor:
        """Random patches, 1 = noised, (B, 1, h, w); n - floor(n (1 - r)) of the n patches of each sample."""
        batch, _, height, width = z.shape
        probabilities = torch.tensor(PATCH_PROBABILITIES)
        side_h, side_w = (PATCH_SIZES[i] for i in torch.multinomial(probabilities, 2, replacement=True).tolist())
        rows, columns = -(-height // side_h), -(-width // side_w)
        n = rows * columns
        ratio = torch.rand(batch, 1, device=z.device) * MAX_RATIO
        return expand_patches(random_subset(n, n - (n * (1 - ratio)).floor()), (rows, columns), (side_h, side_w))[
            ..., :height, :width
        ].to(z.dtype)

    def allowed_cells(self, foreground: Tensor) -> Tensor:
        """(B, 1, H, W) bool -> (B, 1, h, w) in {0, 1}: cells in blocks that are almost fully foreground."""
        block = self.brain_block * self.detector.latent_space.downsampling
        share = F.avg_pool2d(foreground.float(), block)
        return (
            (share >= self.min_brain_share)
            .float()
            .repeat_interleave(self.brain_block, 2)
            .repeat_interleave(self.brain_block, 3)
        )


def random_subset(n: int, counts: Tensor) -> Tensor:
    """(B, n) in {0, 1}: in row b a uniformly random subset of counts[b] ones. counts: (B, 1)."""
    shuffled = torch.rand(len(counts), n, device=counts.device).argsort(dim=1)
    return (shuffled < counts).float()


def expand_patches(patches: Tensor, grid: tuple[int, int], sides: tuple[int, int]) -> Tensor:
    """(B, rows * columns) -> (B, 1, rows * side_h, columns * side_w)."""
    patches = patches.view(len(patches), 1, *grid)
    return patches.repeat_interleave(sides[0], 2).repeat_interleave(sides[1], 3)
