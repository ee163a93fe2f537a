"""Autoencoders whose latents are bits: a Bernoulli bottleneck between MONAI's encoders and decoders.

Wang et al., Binary Latent Diffusion, CVPR 2023; in the sizes of Wolleb et al., MICCAI 2024, and smaller.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from monai.networks.nets.autoencoderkl import Decoder, Encoder
from torch import Tensor, nn

from ..recorded import Recorded
from .latent_space import LatentSpace
from .strided_autoencoder import strided_networks


def straight_through(p: Tensor, u: Tensor) -> Tensor:
    """z ~ B(p) for uniform u in [0, 1): exactly 0 or 1, with the gradient dz / dp = 1. Shapes are equal."""
    z = (u < p).to(p.dtype)
    return z + (p - p.detach())


class BernoulliAutoencoder(Recorded, nn.Module):
    """The bottleneck; a subclass gives `logits` and `decode`. The interface is that of MONAI's `AutoencoderKL`."""

    @abstractmethod
    def logits(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, H / f, W / f), N bits a cell."""

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """Bits, or probabilities of bits, (B, N, H / f, W / f) -> image (B, C, H, W), unbounded."""

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """p = P(z = 1) and the standard deviation of z ~ B(p), (p (1 - p))^0.5, each (B, N, H / f, W / f) float32."""
        p = self.logits(x).float().sigmoid()  # bfloat16 would make u < p coarse
        return p, (p * (1 - p)).sqrt()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction from sampled bits, and the bits' mean and standard deviation."""
        p, std = self.encode(x)
        return self.decode(straight_through(p, torch.rand_like(p))), p, std


class BinaryAutoencoder(BernoulliAutoencoder):
    """The published network; the defaults are its size for BRATS: 4 x 256 x 256 -> 128 bits on 32 x 32 cells.

    4,103,716 parameters; the published program counts 153,092 more, which it never uses.

    Args:
        channels: width of each level, one fewer of which halve the resolution.
        latent_channels: bits a cell, N.
        embedding_channels: a cell enters the decoder as the sum of the embeddings of its ones.
        num_res_blocks: residual blocks on each level.
        norm_num_groups: of the group norm; a divisor of every width.
    """

    def __init__(
        self,
        in_channels: int = 4,
        channels: Sequence[int] = (32, 64, 64, 128),
        latent_channels: int = 128,
        embedding_channels: int = 256,
        num_res_blocks: int = 2,
        norm_num_groups: int = 32,
    ) -> None:
        super().__init__()
        shared: dict[str, Any] = {
            "spatial_dims": 2,
            "channels": channels,
            "num_res_blocks": [num_res_blocks] * len(channels),
            "norm_num_groups": norm_num_groups,
            "norm_eps": 1e-6,
            "attention_levels": [False] * len(channels),  # beside that of the middle
        }
        self.encoder = Encoder(in_channels=in_channels, out_channels=embedding_channels, **shared)
        self.to_logits = nn.Conv2d(embedding_channels, latent_channels, kernel_size=1)
        self.embedding = nn.Parameter(torch.randn(latent_channels, embedding_channels))
        self.norm = nn.GroupNorm(norm_num_groups, embedding_channels, eps=1e-6)
        self.decoder = Decoder(in_channels=embedding_channels, out_channels=in_channels, **shared)

    def logits(self, x: Tensor) -> Tensor:
        """See the base."""
        return self.to_logits(self.encoder(x))

    def embed(self, z: Tensor) -> Tensor:
        """(B, N, h, w) -> (B, embedding_channels, h, w); soft bits are interpolated embeddings."""
        return torch.einsum("bn...,ne->be...", z, self.embedding)

    def decode(self, z: Tensor) -> Tensor:
        """See the base."""
        return self.decoder(self.norm(self.embed(z)))


class StridedBinaryAutoencoder(BernoulliAutoencoder):
    """The compact network, for slices of about 96 to 128 pixels: it downsamples first, as `StridedAutoencoderKL`.

    Logits come from the encoder's last convolution and bits go into the decoder's first one: a projection and an
    embedding beside them, both linear, would add nothing.

    Args:
        channels: width of each level, each of which halves the resolution.
        latent_channels: bits a cell, N. The fewer, the less noise erases a lesion: where bits are redundant, a flip is
            corrected from its neighbours. 16 on cells of 4 x 4 pixels are one bit a pixel; the paper has two.
        num_res_layers: residual units on each level.
    """

    def __init__(
        self,
        in_channels: int = 1,
        channels: Sequence[int] = (64, 128),
        latent_channels: int = 16,
        num_res_layers: int = 2,
    ) -> None:
        super().__init__()
        self.encoder, self.decoder = strided_networks(
            in_channels, channels, latent_channels, latent_channels, num_res_layers
        )

    def logits(self, x: Tensor) -> Tensor:
        """See the base."""
        return self.encoder(x)

    def decode(self, z: Tensor) -> Tensor:
        """See the base."""
        return self.decoder(z)


class BinaryLatentSpace(LatentSpace):
    """The latent space of a `BernoulliAutoencoder`: `posterior` gives P(z = 1) first, and bits are never scaled."""

    def fit_scale(self, mean: Tensor, foreground: Tensor) -> None:
        """Nothing: the scale stays 1."""
