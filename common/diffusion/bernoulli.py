"""Bernoulli diffusion of binary latents, with reverse steps of any length (Wolleb et al., MICCAI 2024)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import SettingError
from ..recorded import Recorded


class BernoulliScheduler(Recorded, nn.Module):
    """Forward process (eq. 1, 2) and posterior of masked Bernoulli diffusion (arXiv 2403.11667).

    Index t = 0 .. T - 1 stands for the paper's t + 1, and -1 for the clean end, where alpha_bar is 1. All randomness
    comes in as `u`, uniform in [0, 1). Probabilities are float64: (1 - alpha) / 2 loses 3 to 4 digits in float32.

    The schedule is the published one: T = 1000, linear from 1e-4 to 0.02.

    Args:
        soft_z0: what a prediction z0 in (0, 1) means in the posterior. "marginalised": q(z_s | z_t, z0) is averaged
            over z0 ~ B(prediction), which is the reverse process of a network that knows P(z0 | z_t). "inserted": the
            prediction takes the place of z0 in Bayes' formula, as in the paper and its code; what z_t says of z0 then
            counts twice, and noise remains. For a binary z0 both are the same.
        reference: "paper", z_t = z0 XOR B((1 - alpha_bar_t) / 2). "code" is what the published program does: it samples
            z_t ~ B(alpha_bar_t z0), while its reverse steps are symmetric, as they are here; and `BerDiff` then noises
            and ends as that program.
    """

    num_train_timesteps = 1000

    alphas: Tensor
    alpha_bar: Tensor

    def __init__(
        self,
        soft_z0: Literal["marginalised", "inserted"] = "marginalised",
        reference: Literal["paper", "code"] = "paper",
    ) -> None:
        super().__init__()
        self.soft_z0 = soft_z0
        self.reference = reference
        alphas = 1 - torch.linspace(1e-4, 0.02, self.num_train_timesteps, dtype=torch.float64)
        self.register_buffer("alphas", alphas, persistent=False)
        self.register_buffer("alpha_bar", alphas.cumprod(0), persistent=False)
        self.set_timesteps(self.num_train_timesteps)

    def set_timesteps(self, num_inference_steps: int, L: int | None = None) -> None:
        """Set `timesteps`: from index L - 1 (default: T - 1) down, in jumps as even as integers allow.

        The jump after the last one leads to -1: 4 steps of L = 200 are [199, 149, 99, 49].
        Raises SettingError unless 1 <= num_inference_steps <= L <= T.
        """
        L = self.num_train_timesteps if L is None else L
        if not 1 <= num_inference_steps <= L <= self.num_train_timesteps:
            fact = f"{num_inference_steps} steps, L = {L}, T = {self.num_train_timesteps}"
            raise SettingError("num_inference_steps", fact, "choose 1 <= num_inference_steps <= L <= T")
        self.timesteps = [L * k // num_inference_steps - 1 for k in range(num_inference_steps, 0, -1)]

    def probability(self, z0: Tensor, t: Tensor) -> Tensor:
        """P(z_t = 1 | z0), eq. 2: alpha_bar_t z0 + (1 - alpha_bar_t) / 2, float64; without the summand in the code.

        z0: (B, ...) in {0, 1};  t: (B,) int64 in [0, T).
        """
        alpha_bar = self.alpha_bar[t].view(-1, *[1] * (z0.ndim - 1))
        towards = (1 - alpha_bar) / 2 if self.reference == "paper" else 0
        return alpha_bar * z0 + towards

    def add_noise(self, z0: Tensor, u: Tensor, t: Tensor) -> Tensor:
        """z_t of the shape and dtype of z0, in {0, 1}. z0: (B, ...) in {0, 1};  u: like z0;  t: (B,) in [0, T)."""
        if self.reference == "paper":
            flips = u < self.probability(torch.zeros_like(z0), t)
            return (z0 - flips.to(z0.dtype)).abs()
        return (u < self.probability(z0, t)).to(z0.dtype)

    def posterior(self, z_t: Tensor, z0: Tensor, t: int, s: int) -> Tensor:
        """P(z_s = 1 | z_t, z0) for any -1 <= s < t, by Bayes, float64; the paper has s = t - 1.

        The formula printed in its supplement does not follow from eq. 1 and 2 (for z_t = 1 it is constant in z0).
        z_t: (B, ...) in {0, 1};  z0: like z_t, in [0, 1], see `soft_z0`. Raises ValueError for other s.
        """
        if not -1 <= s < t:
            raise ValueError(f"a reverse step leads from t = {t} to an earlier s >= -1, not to {s}")
        z_t, z0 = z_t.double(), z0.double()
        if self.soft_z0 == "inserted":
            return self._bayes(z_t, z0, t, s)
        ones = torch.ones_like(z0)
        return z0 * self._bayes(z_t, ones, t, s) + (1 - z0) * self._bayes(z_t, ones - 1, t, s)

    def _bayes(self, z_t: Tensor, z0: Tensor, t: int, s: int) -> Tensor:
        """q(z_t | z_s = 1) q(z_s = 1 | z0) over the sum of that for z_s = 1 and 0."""
        alpha = self.alphas[s + 1 : t + 1].prod()  # of the jump; the quotient of two alpha_bars would round
        alpha_bar = self.alpha_bar[s] if s >= 0 else torch.ones_like(alpha)
        on = (alpha * z_t + (1 - alpha) / 2) * (alpha_bar * z0 + (1 - alpha_bar) / 2)
        off = (alpha * (1 - z_t) + (1 - alpha) / 2) * (alpha_bar * (1 - z0) + (1 - alpha_bar) / 2)
        return on / (on + off)

    def step(self, z_t: Tensor, z0: Tensor, t: int, s: int, u: Tensor) -> Tensor:
        """z_s in {0, 1} of the dtype of z_t, drawn from `posterior` (Algorithm 1). u: like z_t."""
        return (u < self.posterior(z_t, z0, t, s)).to(z_t.dtype)
