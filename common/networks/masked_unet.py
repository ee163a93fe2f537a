"""The U-Net of MAD-AD: MONAI's diffusion U-Net with a second head that finds the noised cells."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.networks.blocks.selfattention import SABlock
from monai.networks.nets import DiffusionModelUNet
from monai.networks.nets.diffusion_model_unet import DiffusionUNetResnetBlock, zero_module
from torch import Tensor, nn

from ..recorded import Recorded


class _TwoHeads(nn.Module):
    """Both heads read the same feature map; the mask head has no activation before its convolution (as published)."""

    def __init__(self, z0_head: nn.Module, channels: int, num_groups: int, eps: float) -> None:
        super().__init__()
        self.z0 = z0_head
        # zero, so that training starts from P(noised) = 0.5: nothing is updated
        convolution = zero_module(nn.Conv2d(channels, 1, kernel_size=3, padding=1))
        self.mask = nn.Sequential(nn.GroupNorm(num_groups, channels, eps=eps), convolution)

    def forward(self, features: Tensor) -> Tensor:
        return torch.cat([self.z0(features), self.mask(features)], dim=1)


class MaskedDiffusionUNet(Recorded, nn.Module):
    """Predicts the clean latent z0 and, per cell, the logit of having been noised (MAD-AD, section 3.2).

    The trunk is `DiffusionModelUNet`; what MONAI lacks is added to it: dropout before the second convolution of
    every residual block, zero-initialised attention outputs, and the mask head.

    Args:
        latent_channels: of the autoencoder, C_z; 4 in the paper.
        channels: width of each level; the paper's XS / S / M / L are (b, 2b, 4b) with b = 64 / 128 / 192 / 256.
        num_heads: attention heads, the same on all levels (4 / 4 / 6 / 8 in the paper).
        attention_levels: the paper has attention on all levels.
        norm_num_groups: of the group norm; a divisor of every width, 32 in the paper.
        dropout: 0.4 in the published code.
    """

    def __init__(
        self,
        latent_channels: int = 4,
        channels: Sequence[int] = (64, 128, 256),
        num_res_blocks: int = 2,
        attention_levels: Sequence[bool] = (True, True, True),
        num_heads: int = 4,
        norm_num_groups: int = 32,
        dropout: float = 0.4,
    ) -> None:
        super().__init__()
        self.latent_channels = latent_channels
        self.size_divisor = 2 ** (len(channels) - 1)
        eps = 1e-5
        self.trunk = DiffusionModelUNet(
            spatial_dims=2,
            in_channels=latent_channels,
            out_channels=latent_channels,
            num_res_blocks=num_res_blocks,
            channels=channels,
            attention_levels=attention_levels,
            norm_num_groups=norm_num_groups,
            norm_eps=eps,
            num_head_channels=[c // num_heads for c in channels],
        )
        self.trunk.add_module("out", _TwoHeads(self.trunk.out, channels[0], norm_num_groups, eps))
        for module in list(self.trunk.modules()):
            if isinstance(module, DiffusionUNetResnetBlock):
                module.conv2 = nn.Sequential(nn.Dropout(dropout), module.conv2)
            elif isinstance(module, SABlock):
                zero_module(module.out_proj)

    def forward(self, z: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """z: (B, C_z, h, w); timesteps: (B,) int64. Returns z0 (B, C_z, h, w) and mask logits (B, 1, h, w)."""
        out = self.trunk(z, timesteps)
        return out[:, : self.latent_channels], out[:, self.latent_channels :]
