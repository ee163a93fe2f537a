"""Variational autoencoders with a dense bottleneck (Baur et al., Medical Image Analysis 2021; Zimmerer et al., 2019).

The baseline "VAE (dense)" of the latent DDPM's paper: the residual between a slice and its reconstruction from the
posterior's mean.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from monai.networks.nets import VarAutoEncoder
from torch import Tensor

from ..detection.method import TrainingObjective
from .ae import AE


class VAE(AE):
    """The residual of `AE`, with a network for slices of one size.

    Args:
        network: MONAI's, 128 latent values as published. At inference it would decode mean + standard deviation unless
            told otherwise; here the mean is decoded, whatever it was told.
        residual, median_size: see `AE`.
    """

    networks = ("network.encode", "network.decode")

    def __init__(
        self, network: VarAutoEncoder, residual: Literal["absolute", "bright"] = "absolute", median_size: int = 5
    ) -> None:
        super().__init__(network, residual, median_size)
        self.network: Any = network
        self.size_divisor = 1  # any size is brought to the network's

    def posterior(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, each (B, z), of images (B, C, H, W), padded or cropped to the network's size."""
        return self.network.encode_forward(centred(image, self.network.in_shape))

    def decode(self, z: Tensor, size: torch.Size) -> Tensor:
        """(B, z) -> (B, C, H, W) in [0, 1]; 0 where `size` goes beyond the network's."""
        return centred(self.network.decode_forward(z, self.network.use_sigmoid), size)

    def reconstruct(self, image: Tensor) -> Tensor:
        """From the mean of the posterior; where the image goes beyond the network's size it is left as it is."""
        inside = centred(centred(torch.ones_like(image[:1, :1]), self.network.in_shape), image.shape[2:])
        decoded = self.decode(self.posterior(image)[0], image.shape[2:])
        return decoded * inside + image * (1 - inside)


def centred(image: Tensor, size: Any) -> Tensor:
    """Pad with 0 or crop to H and W about the centre; to another size and back takes each pixel to its place."""
    margins = []
    for old, new in zip(image.shape[:1:-1], reversed(tuple(size)), strict=True):
        before = (max(old, new) - min(old, new)) // 2
        after = abs(new - old) - before
        margins += [before, after] if new >= old else [-before, -after]
    return F.pad(image, margins)


class VAEObjective(TrainingObjective):
    """Sum over pixels of |x - x'| + KL, per slice and pixel (the published loss over the pixels' number).

    Args:
        detector: the `VAE` whose network is trained.
    """

    def __init__(self, detector: VAE) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor, foreground: Tensor | None = None) -> dict[str, Tensor]:
        """Keys `loss`, `l1` (per pixel) and `kl` (per slice); the latent is sampled from the global generator."""
        mean, log_variance = (x.float() for x in self.detector.posterior(images))
        z = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        l1 = (self.detector.decode(z, images.shape[2:]) - images).abs().mean()
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(dim=1).mean()
        return {"loss": l1 + kl / images[0].numel(), "l1": l1, "kl": kl}
