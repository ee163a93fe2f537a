"""The latent space of the two-stage methods: a frozen autoencoder and the scale of its latents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..recorded import Recorded


class LatentSpace(Recorded, nn.Module):
    """A frozen autoencoder and the scale of its latents. Images are in [0, 1] outside and in [-1, 1] inside.

    Args:
        autoencoder: has `encode(x) -> (mean, std)` and `decode(z)`, as MONAI's `AutoencoderKL`.
        downsampling: pixels per latent cell, f.
    """

    autoencoder: Any  # a module with `encode` and `decode`
    scale: Tensor

    def __init__(self, autoencoder: nn.Module, downsampling: int) -> None:
        super().__init__()
        self.autoencoder = autoencoder.requires_grad_(False)
        self.downsampling = downsampling
        # 1 / std of the training latents: the 0.18215 of the published code is the constant of natural images
        self.register_buffer("scale", torch.ones(()))

    def posterior(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled mean and standard deviation, each (B, C_z, H / f, W / f)."""
        mean, std = self.autoencoder.encode(image * 2 - 1)
        return mean * self.scale, std * self.scale

    def decode(self, z: Tensor) -> Tensor:
        """Scaled latent to image, (B, C, H, W), about [0, 1]."""
        return (self.autoencoder.decode(z / self.scale) + 1) / 2

    @torch.no_grad()
    def fit_scale(self, mean: Tensor) -> None:
        """Set the scale from unscaled posterior means of training images (any shape)."""
        self.scale.copy_(1 / mean.std())


def posterior_of(
    space: LatentSpace, images: Tensor | None, posterior: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Scaled mean and standard deviation, each (B, C_z, h, w), without gradient: of images, or the cached ones."""
    if posterior is not None:
        return posterior
    if images is None:
        raise ValueError("give images, or a posterior")
    with torch.no_grad():
        return space.posterior(images)
