"""The U-Net of the denoising autoencoder: weight-standardised convolutions, group norm, Swish, reflect padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..recorded import Recorded


class WeightStandardisedConv2d(nn.Conv2d):
    """Convolution whose filters are brought to mean 0 and standard deviation 1 (Qiao et al. 2019)."""

    kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Convolve with the standardised filters."""
        return self._conv_forward(x, self.standardised() if self.kept is None else self.kept, self.bias)

    def standardised(self) -> Tensor:
        """The filters, of the shape of the weight; outside of training on a CPU in the order that is quickest there."""
        std, mean = torch.std_mean(self.weight, dim=(1, 2, 3), keepdim=True)
        filters = (self.weight - mean) / (std + 1e-5)
        if self.training or filters.device.type != "cpu":
            return filters
        return filters.contiguous(memory_format=torch.channels_last)  # the results of all layers follow it


@contextmanager
def filters_kept(network: nn.Module) -> Iterator[None]:
    """Within, the filters of a network whose weights stay as they are are standardised once, not at each call."""
    convolutions = [part for part in network.modules() if isinstance(part, WeightStandardisedConv2d)]
    for convolution in convolutions:
        convolution.kept = convolution.standardised()
    try:
        yield
    finally:
        for convolution in convolutions:
            vars(convolution).pop("kept", None)  # as it was: what a module holds describes it


def _block(in_channels: int, out_channels: int, groups: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (in_channels, out_channels):
        layers += [
            WeightStandardisedConv2d(channels, out_channels, 3, padding=1, padding_mode="reflect"),
            nn.GroupNorm(groups, out_channels),
            nn.SiLU(),
        ]
    return nn.Sequential(*layers)


class WeightStandardisedUNet(Recorded, nn.Module):
    """U-Net of Kascenas et al. (MIDL 2022): average pooling down, transposed convolutions up, concatenated skips.

    With the published width, 7,703,748 parameters for 4 channels and 7,701,825 for 1.

    Args:
        channels: width of each level.
        groups: groups of the group norm of each level.
        out_channels: of the output, by default those of the input.
    """

    def __init__(
        self,
        in_channels: int = 1,
        channels: Sequence[int] = (64, 128, 256, 512),
        groups: Sequence[int] = (8, 16, 16, 32),
        out_channels: int | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = in_channels if out_channels is None else out_channels
        inputs = [in_channels, *channels[:-1]]
        self.size_divisor = 2 ** (len(channels) - 1)
        self.down = nn.ModuleList(_block(i, o, g) for i, o, g in zip(inputs, channels, groups, strict=True))
        levels = range(len(channels) - 2, -1, -1)
        self.up = nn.ModuleList(nn.ConvTranspose2d(channels[k + 1], channels[k], 2, stride=2) for k in levels)
        self.merge = nn.ModuleList(_block(2 * channels[k], channels[k], groups[k]) for k in levels)
        self.out = nn.Conv2d(channels[0], self.out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C_out, H, W); H and W multiples of `size_divisor`, at least twice as large."""
        skips = []
        for level, block in enumerate(self.down):
            x = block(x if level == 0 else F.avg_pool2d(x, 2))
            skips.append(x)
        for up, merge, skip in zip(self.up, self.merge, reversed(skips[:-1]), strict=True):
            x = merge(torch.cat([up(x), skip], dim=1))
        return self.out(x)
