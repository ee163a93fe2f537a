"""First stage of the latent methods: a KL autoencoder trained on healthy slices (Rombach et al., CVPR 2022)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..detection.method import TrainingObjective
from ..networks.latent_space import LatentSpace


def random_gain(images: Tensor, max_gain: float) -> Tensor:
    """Images (B, C, H, W) times a random factor each in [1 - max_gain, 1 + max_gain], clamped to [0, 1]."""
    gain = 1 + max_gain * (2 * torch.rand(len(images), 1, 1, 1, device=images.device) - 1)
    return (images * gain).clamp(0, 1)


class AutoencoderObjective(TrainingObjective):
    """L1 + L2 reconstruction and a KL term, on images in [-1, 1].

    The published kl-f8 adds LPIPS and a patch discriminator; both need downloaded weights or a second network, and
    the map of the latent methods compares two decoder outputs, in which the autoencoder's blur cancels.

    Every term is a mean over the pixels of the image: the KL divergence is summed over the latent and divided by the
    number of pixels. The published code sums both terms instead, so that the same `kl_weight` means the same ratio.

    Args:
        latent_space: the `LatentSpace` whose autoencoder is trained here.
        kl_weight: 1e-6 as published.
        max_gain: images are multiplied by a random factor in [1 - max_gain, 1 + max_gain], so that intensities beyond
            the healthy ones, as lesions have them, are still encoded.
    """

    def __init__(self, latent_space: LatentSpace, kl_weight: float = 1e-6, max_gain: float = 0.2) -> None:
        super().__init__()
        self.autoencoder = latent_space.autoencoder.requires_grad_(True)
        self.kl_weight = kl_weight
        self.max_gain = max_gain

    def forward(self, images: Tensor, foreground: Tensor | None = None) -> dict[str, Tensor]:
        """Keys `loss`, `l1`, `l2` and `kl`; the random gain is on in training mode only."""
        target = (random_gain(images, self.max_gain) if self.training else images) * 2 - 1
        reconstruction, mean, std = self.autoencoder(target)
        difference = reconstruction - target
        kl = 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).sum() / target.numel()
        l1, l2 = difference.abs().mean(), difference.square().mean()
        return {"loss": l1 + 2 * l2 + self.kl_weight * kl, "l1": l1, "l2": l2, "kl": kl}
