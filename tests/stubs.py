"""What stands for a network in the tests of several methods."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def toy(x: Tensor, t: Tensor) -> Tensor:
    """The model of the golden arrays of ddpm, ano_ddpm, auto_ddpm, pddpm and thor."""
    return torch.tanh(0.7 * x + 0.3) - 0.1 * t.view(-1, 1, 1, 1) / 1000


class Stub(nn.Module):
    """Stands for the U-Net: a function of (x_t, t), that of the golden arrays by default; remembers its calls."""

    block_out_channels = (1,)

    def __init__(self, predict: Callable[[Tensor, Tensor], Tensor] = toy) -> None:
        super().__init__()
        self.predict = predict
        self.calls: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls.append((x, t))
        return self.predict(x, t)
