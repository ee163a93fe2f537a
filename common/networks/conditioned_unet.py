"""A diffusion U-Net guided by a code of the image, and the encoder that makes the code (Behrendt et al. 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

from monai.networks.blocks import Convolution
from monai.networks.nets.diffusion_model_unet import DiffusionUNetResnetBlock, zero_module
from torch import Tensor, nn

from ..recorded import Recorded
from .pixel_unshuffle_unet import PixelUnshuffleUNet


class ConditionedUNet(PixelUnshuffleUNet):
    """`PixelUnshuffleUNet` whose residual blocks read a code beside the time.

    Both are embedded, the code by two linear layers.

    Args:
        code_size: numbers of the code, c.
        conditioning: "added": the two embeddings are added, MONAI's place for the class of an image; the last layer of
            the code's starts at zero, so that a network that was trained without a code goes on as it was.
            "concatenated", as published: they stand side by side, and scale and shift the features of each block.
        settings: see `PixelUnshuffleUNet`.
    """

    def __init__(
        self, code_size: int, conditioning: Literal["added", "concatenated"] = "added", **settings: Any
    ) -> None:
        super().__init__(num_class_embeds=1, **settings)
        width = 4 * self.block_out_channels[0]  # of the embedding of the time
        layers: list[nn.Module] = [nn.Linear(code_size, width), nn.SiLU(), nn.Linear(width, width)]
        if conditioning == "added":
            zero_module(layers[-1])
        else:  # MONAI adds them: [time, 0] + [0, code] is [time, code]
            self.add_module("time_embed", nn.Sequential(*self.time_embed, nn.ZeroPad1d((0, width))))
            layers.append(nn.ZeroPad1d((width, 0)))
            for name, module in list(self.named_modules()):
                if isinstance(module, DiffusionUNetResnetBlock):
                    parent, _, own = name.rpartition(".")
                    self.get_submodule(parent).add_module(own, ScaleShiftBlock.like(module, 2 * width))
        self.add_module("class_embedding", nn.Sequential(*layers))

    def forward(self, x: Tensor, timesteps: Tensor, code: Tensor) -> Tensor:  # type: ignore[override]
        """x: (B, C, H, W); timesteps: (B,); code: (B, c). Returns (B, C, H, W)."""
        return super().forward(x, timesteps, class_labels=code)


class ScaleShiftBlock(DiffusionUNetResnetBlock):
    """MONAI's residual block, whose embedding scales and shifts the features after the second norm."""

    @classmethod
    def like(cls, block: DiffusionUNetResnetBlock, embedding: int) -> ScaleShiftBlock:
        """A new block in the place of one of MONAI's, for an embedding of so many numbers."""
        made = cls(
            block.spatial_dims,
            block.channels,
            embedding,
            block.out_channels,
            up=block.up,
            down=bool(block.down),
            norm_num_groups=block.norm1.num_groups,
            norm_eps=block.norm1.eps,
        )
        made.time_emb_proj = nn.Linear(embedding, 2 * made.out_channels)
        return made

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """(B, C, H, W) and (B, embedding) -> (B, C_out, H, W)."""
        h = self.nonlinearity(self.norm1(x))
        if (resample := self.upsample or self.downsample) is not None:
            x, h = resample(x), resample(h)
        h = self.nonlinearity(self.scaled_and_shifted(self.conv1(h), emb))
        return self.skip_connection(x) + self.conv2(h)

    def scaled_and_shifted(self, h: Tensor, emb: Tensor) -> Tensor:
        """norm(h) (1 + scale) + shift."""
        scale, shift = self.time_emb_proj(self.nonlinearity(emb))[:, :, None, None].chunk(2, dim=1)
        return self.norm2(h) * (1 + scale) + shift


class CodeEncoder(Recorded, nn.Module):
    """Strided convolutions, the mean over the image, and a linear layer: no map is left, so that no place is either.

    There is no norm. Batch norm, as published, keeps the statistics of the scanner of the training; group norm takes
    the brightness from an image, which is what the code is for.

    Args:
        code_size: numbers of the code, c; few, so that they cannot hold a lesion.
        in_channels: of the image.
        channels: width of each level; a level halves the resolution.
    """

    def __init__(self, code_size: int = 64, in_channels: int = 1, channels: Sequence[int] = (16, 32, 64, 128)) -> None:
        super().__init__()
        pairs = pairwise((in_channels, *channels))
        self.levels = nn.Sequential(*(Convolution(2, i, o, strides=2, act="SWISH", norm=None) for i, o in pairs))
        self.linear = nn.Linear(channels[-1], code_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, c)."""
        return self.linear(self.levels(x).mean(dim=(2, 3)))
