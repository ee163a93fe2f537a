"""A KL autoencoder that downsamples first: ten times cheaper than `AutoencoderKL` at the same latent size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from monai.networks.nets.vqvae import Decoder, Encoder
from torch import Tensor, nn

from ..recorded import Recorded


def strided_networks(
    in_channels: int,
    channels: Sequence[int],
    encoded_channels: int,
    latent_channels: int,
    num_res_layers: int,
) -> tuple[Encoder, Decoder]:
    """Encoder from images to `encoded_channels` and decoder from `latent_channels` to images, unbounded.

    The other arguments are those of `StridedAutoencoderKL`.
    """
    shared: dict[str, Any] = {
        "spatial_dims": 2,
        "channels": channels,
        "num_res_layers": num_res_layers,
        "num_res_channels": channels,
        "dropout": 0.0,
        "act": "RELU",
    }
    encoder = Encoder(
        in_channels=in_channels,
        out_channels=encoded_channels,
        downsample_parameters=((2, 4, 1, 1),) * len(channels),
        **shared,
    )
    decoder = Decoder(
        in_channels=latent_channels,
        out_channels=in_channels,
        upsample_parameters=((2, 4, 1, 1, 0),) * len(channels),
        output_act=None,
        **shared,
    )
    return encoder, decoder


class StridedAutoencoderKL(Recorded, nn.Module):
    """VQ-VAE encoder and decoder (van den Oord et al. 2017, as in MONAI) around a Gaussian bottleneck.

    Has the interface of `monai.networks.nets.AutoencoderKL` (`encode`, `decode`, `forward`), so that the two can be
    exchanged in a config. Each entry of `channels` halves the resolution.

    Args:
        channels: width of each level; `len(channels)` is log2 of the downsampling factor.
        latent_channels: channels of the latent, C_z.
        num_res_layers: residual units per level.
    """

    def __init__(
        self,
        in_channels: int = 1,
        channels: Sequence[int] = (64, 128),
        latent_channels: int = 4,
        num_res_layers: int = 2,
    ) -> None:
        super().__init__()
        self.encoder, self.decoder = strided_networks(
            in_channels, channels, 2 * latent_channels, latent_channels, num_res_layers
        )

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the posterior: (B, C, H, W) -> two of (B, C_z, H / f, W / f)."""
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        return mean, torch.exp(log_variance.clamp(-30.0, 20.0) / 2)

    def decode(self, z: Tensor) -> Tensor:
        """(B, C_z, H / f, W / f) -> (B, C, H, W)."""
        return self.decoder(z)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction from a posterior sample, and the posterior's mean and standard deviation."""
        mean, std = self.encode(x)
        return self.decode(mean + std * torch.randn_like(std)), mean, std
