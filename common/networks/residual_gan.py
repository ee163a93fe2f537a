"""Networks of f-AnoGAN, residual as those of WGAN-GP (Gulrajani et al. 2017, Schlegl et al. 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..recorded import Recorded

Norm = Literal["batch", "layer"]


def norm_of(kind: Norm, channels: int) -> nn.Module:
    """Batch norm as TensorFlow's; or layer norm: over channels and pixels of a sample, with a scale per channel."""
    if kind == "batch":
        return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)
    return nn.GroupNorm(1, channels, eps=1e-5)


class ResidualBlock(nn.Module):
    """Twice norm, ReLU and convolution of 3 x 3, beside a convolution of 1 x 1; the resolution is doubled or halved.

    Up: nearest neighbours before the first convolution. Down: means of 2 x 2 after the second, before the shortcut.
    """

    def __init__(self, in_channels: int, out_channels: int, resample: Literal["up", "down"], norm: Norm) -> None:
        super().__init__()
        self.resample = resample
        middle = out_channels if resample == "up" else in_channels
        self.norm1, self.norm2 = norm_of(norm, in_channels), norm_of(norm, middle)
        self.conv1 = nn.Conv2d(in_channels, middle, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(middle, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1)
        for convolution in (self.conv1, self.conv2):
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C_out, 2 H, 2 W) or (B, C_out, H / 2, W / 2)."""
        h = F.relu(self.norm1(x))
        if self.resample == "up":
            x, h = (F.interpolate(value, scale_factor=2.0, mode="nearest") for value in (x, h))
            return self.shortcut(x) + self.conv2(F.relu(self.norm2(self.conv1(h))))
        h = F.avg_pool2d(self.conv2(F.relu(self.norm2(self.conv1(h)))), 2)
        return self.shortcut(F.avg_pool2d(x, 2)) + h


class Generator(Recorded, nn.Module):
    """From a code to an image in [-1, 1].

    With the defaults the published one, 8,539,329 parameters.

    Args:
        code_size: numbers of the code.
        channels: width of each level from the coarsest on; a level doubles the resolution.
        size: side of the images in pixels, a multiple of 2 ** (len(channels) - 1).
        image_channels: of the images.
    """

    def __init__(
        self,
        code_size: int = 128,
        channels: Sequence[int] = (512, 512, 256, 128, 64),
        size: int = 64,
        image_channels: int = 1,
    ) -> None:
        super().__init__()
        self.code_size = code_size
        self.start = (channels[0], *(size // 2 ** (len(channels) - 1),) * 2)
        self.linear = nn.Linear(code_size, self.start[0] * self.start[1] * self.start[2])
        pairs = pairwise(channels)
        self.blocks = nn.Sequential(*(ResidualBlock(i, o, "up", "batch") for i, o in pairs))
        self.norm = norm_of("batch", channels[-1])
        self.out = nn.Conv2d(channels[-1], image_channels, 3, padding=1)

    def forward(self, code: Tensor) -> Tensor:
        """(B, code_size) -> (B, C, size, size)."""
        h = self.blocks(self.linear(code).view(-1, *self.start))
        return torch.tanh(self.out(F.relu(self.norm(h))))


class ResidualEncoder(Recorded, nn.Module):
    """From an image to numbers: the critic (layer norm, one number) and the encoder (batch norm, a code).

    With the defaults the published critic, 7,490,689 parameters; with batch norm and 128 outputs the published encoder,
    8,531,200.

    Args:
        outputs: numbers for each image.
        norm: "layer" for a critic, whose gradient must be that of one sample; "batch" as published for an encoder.
        channels: width of each level from the finest on; each but the first halves the resolution.
        size: side of the images in pixels, a multiple of 2 ** (len(channels) - 1).
        image_channels: of the images.
    """

    def __init__(
        self,
        outputs: int = 1,
        norm: Norm = "layer",
        channels: Sequence[int] = (64, 128, 256, 512, 512),
        size: int = 64,
        image_channels: int = 1,
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(image_channels, channels[0], 3, padding=1)
        pairs = pairwise(channels)
        self.blocks = nn.Sequential(*(ResidualBlock(i, o, "down", norm) for i, o in pairs))
        self.linear = nn.Linear(channels[-1] * (size // 2 ** (len(channels) - 1)) ** 2, outputs)

    def features(self, x: Tensor) -> Tensor:
        """What the last layer sees, without an activation: (B, C, size, size) -> (B, F)."""
        return self.blocks(self.stem(x)).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, size, size) -> (B, outputs)."""
        return self.linear(self.features(x))
