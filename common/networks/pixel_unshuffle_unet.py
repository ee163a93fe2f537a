"""MONAI's diffusion U-Net on blocks of pixels: for slices, where the full resolution costs most and says least."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from monai.networks.blocks.selfattention import SABlock
from monai.networks.nets import DiffusionModelUNet
from torch import Tensor

from ..recorded import Recorded


class PixelUnshuffleUNet(Recorded, DiffusionModelUNet):
    """The image as (H / f, W / f) cells of f x f pixels that the U-Net takes and gives as channels.

    Patches of 2 to 4 pixels cost little quality in pixel-space diffusion (Hoogeboom et al., Simple Diffusion, 2023,
    section 3.3) and make a step several times cheaper.

    Args:
        in_channels: of the image.
        factor: f, side of a cell in pixels.
        out_channels: of the output; those of the image if not given.
        settings: the other arguments of MONAI's `DiffusionModelUNet`, in two dimensions. `use_flash_attention` holds in
            evaluation only: on a CPU the fused kernel makes a call a quarter faster, its gradient twice as slow.
    """

    def __init__(self, in_channels: int = 1, factor: int = 2, out_channels: int | None = None, **settings: Any) -> None:
        cell = factor * factor
        out_channels = in_channels if out_channels is None else out_channels
        super().__init__(spatial_dims=2, in_channels=in_channels * cell, out_channels=out_channels * cell, **settings)
        self.factor = factor
        self.use_flash_attention = bool(settings.get("use_flash_attention"))
        self.train(self.training)

    def train(self, mode: bool = True) -> PixelUnshuffleUNet:
        """As in PyTorch, and choose how attention is computed."""
        for module in self.modules():
            if isinstance(module, SABlock):
                module.use_flash_attention = self.use_flash_attention and not mode
        return super().train(mode)

    def forward(self, x: Tensor, timesteps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x: (B, C, H, W), H and W multiples of `size_divisor(self)`; timesteps: (B,). Returns the same size."""
        cells = super().forward(F.pixel_unshuffle(x, self.factor), timesteps, *args, **kwargs)
        return F.pixel_shuffle(cells, self.factor)


def size_divisor(unet: DiffusionModelUNet) -> int:
    """The multiple that H and W of a U-Net's images must have."""
    return getattr(unet, "factor", 1) * 2 ** (len(unet.block_out_channels) - 1)
