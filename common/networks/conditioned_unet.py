"""A diffusion U-Net guided by a code of the image, and the encoder that makes the code (Behrendt et al. 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from monai.networks.blocks import Convolution
from monai.networks.nets.diffusion_model_unet import zero_module
from torch import Tensor, nn

from ..recorded import Recorded
from .pixel_unshuffle_unet import PixelUnshuffleUNet


class ConditionedUNet(PixelUnshuffleUNet):
    """`PixelUnshuffleUNet` whose residual blocks read a code beside the time.

    The code, through two linear layers, is added to the embedding of the time: MONAI's place for the class of an image.
    The published network concatenates the two and has them scale and shift the features. The last of the two layers
    starts at zero, so that a network that was trained without a code goes on as it was.

    Args:
        code_size: numbers of the code, c.
        settings: see `PixelUnshuffleUNet`.
    """

    def __init__(self, code_size: int, **settings: Any) -> None:
        super().__init__(num_class_embeds=1, **settings)
        width = 4 * self.block_out_channels[0]  # of the embedding of the time
        last = zero_module(nn.Linear(width, width))
        self.add_module("class_embedding", nn.Sequential(nn.Linear(code_size, width), nn.SiLU(), last))

    def forward(self, x: Tensor, timesteps: Tensor, code: Tensor) -> Tensor:  # type: ignore[override]
        """x: (B, C, H, W); timesteps: (B,); code: (B, c). Returns (B, C, H, W)."""
        return super().forward(x, timesteps, class_labels=code)


class CodeEncoder(Recorded, nn.Module):
    """Strided convolutions, the mean over the image, and a linear layer: no map is left, so that no place is either.

    Group norm, whose statistics are those of the image: batch norm would keep those of the scanner of the training.

    Args:
        code_size: numbers of the code, c; few, so that they cannot hold a lesion.
        in_channels: of the image.
        channels: width of each level; a level halves the resolution.
        norm_num_groups: of the group norm; a divisor of every width.
    """

    def __init__(
        self,
        code_size: int = 64,
        in_channels: int = 1,
        channels: Sequence[int] = (16, 32, 64, 128),
        norm_num_groups: int = 8,
    ) -> None:
        super().__init__()
        norm = ("GROUP", {"num_groups": norm_num_groups})
        pairs = zip((in_channels, *channels[:-1]), channels, strict=True)
        self.levels = nn.Sequential(*(Convolution(2, i, o, strides=2, act="SWISH", norm=norm) for i, o in pairs))
        self.linear = nn.Linear(channels[-1], code_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, c)."""
        return self.linear(self.levels(x).mean(dim=(2, 3)))
