"""The latent space of the two-stage methods: a frozen autoencoder and the standardisation of its latents."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..recorded import Recorded


class LatentSpace(Recorded, nn.Module):
    """A frozen autoencoder and the scale of its latents. Images are in [0, 1] outside and in [-1, 1] inside.

    Args:
        autoencoder: has `encode(x) -> (mean, std)` and `decode(z)`, as MONAI's `AutoencoderKL`.
        downsampling: pixels per latent cell, f.
        standardised_channels: C_z, where each channel of the latent is brought to mean 0 and standard deviation 1;
            0 where one scale serves all channels, as in Rombach et al.
    """

    autoencoder: Any  # a module with `encode` and `decode`
    scale: Tensor
    shift: Tensor

    def __init__(self, autoencoder: nn.Module, downsampling: int, standardised_channels: int = 0) -> None:
        super().__init__()
        self.autoencoder = autoencoder.requires_grad_(False)
        self.downsampling = downsampling
        # fitted on the training latents: the 0.18215 of the published code is the constant of natural images
        shape = (standardised_channels, 1, 1) if standardised_channels else ()
        self.register_buffer("scale", torch.ones(shape))
        self.register_buffer("shift", torch.zeros(shape), persistent=bool(standardised_channels))

    def posterior(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled mean and standard deviation, each (B, C_z, H / f, W / f)."""
        mean, std = self.autoencoder.encode(image * 2 - 1)
        return (mean - self.shift) * self.scale, std * self.scale

    def decode(self, z: Tensor) -> Tensor:
        """Scaled latent to image, (B, C, H, W), about [0, 1]."""
        return (self.autoencoder.decode(z / self.scale + self.shift) + 1) / 2

    @torch.no_grad()
    def fit_scale(self, mean: Tensor, foreground: Tensor) -> None:
        """Set the scale, and the shift where channels are standardised, from the cells that hold foreground.

        mean: unscaled posterior means of training images, (B, C_z, h, w);  foreground: (B, 1, H, W) bool.
        """
        inside = F.adaptive_max_pool2d(foreground.float(), mean.shape[2:])[:, 0].bool()
        values = mean.movedim(1, 0)[:, inside]  # (C_z, cells)
        if self.scale.ndim == 0:
            self.scale.copy_(1 / values.std())
        else:
            self.scale.copy_(1 / values.std(dim=1)[:, None, None])
            self.shift.copy_(values.mean(dim=1)[:, None, None])


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
