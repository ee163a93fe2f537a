"""Gaussian diffusion that predicts the noise, with explicit (t, t_prev) steps and without clipping."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import SettingError
from ..recorded import Recorded


def evenly_spaced(start: int, stop: int, count: int) -> list[int]:
    """`count` ascending integers in [start, stop), the first is `start`: 50 of 400 ... 600 are 400, 404, ..., 596.

    Raises SettingError where there are not that many.
    """
    if not 1 <= count <= stop - start:
        fact = f"there are not {count} different ones in [{start}, {stop})"
        raise SettingError("timesteps", fact, f"choose 1 to {stop - start}")
    return [start + i * (stop - start) // count for i in range(count)]


class GaussianScheduler(Recorded, nn.Module):
    """Forward process and KL terms of Ho et al. (NeurIPS 2020), reverse step of Song et al. (DDIM, ICLR 2021).

    MONAI's schedulers are not used for four reasons: by default they clip the predicted z0 to [-1, 1], where latents
    are not; `DDPMScheduler.step` always goes to t - 1; the grid of `DDIMScheduler.set_timesteps` is not the one that
    its `step` takes (MONAI 1.6.1); and `add_noise` leaves the schedule in the precision of the last sample.

    Args:
        num_train_timesteps: T; t = 0 .. T - 1 stands for the paper's t + 1.
        beta_start, beta_end: of a linear schedule; 1e-4 and 0.02 as in Ho et al., whom Pinaya et al. follow. The
            comparator of Wolleb et al. has 0.0015 and 0.0195.
    """

    beta: Tensor
    alpha_bar: Tensor

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 2e-2,
    ) -> None:
        super().__init__()
        self.num_train_timesteps = num_train_timesteps
        beta = torch.linspace(beta_start, beta_end, num_train_timesteps).double()  # in float32 first, as MONAI's
        self.register_buffer("beta", beta, persistent=False)
        self.register_buffer("alpha_bar", torch.cumprod(1 - beta, dim=0), persistent=False)

    def add_noise(self, z0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """z_t = sqrt(alpha_bar_t) z0 + sqrt(1 - alpha_bar_t) eps.  z0, eps: (B, C_z, h, w);  t: (B,) in [0, T)."""
        alpha_bar = _per_sample(self.alpha_bar[t], z0)
        return alpha_bar.sqrt() * z0 + (1 - alpha_bar).sqrt() * eps

    def step(
        self, z_t: Tensor, eps: Tensor, t: int, t_prev: int, noise: Tensor | None = None, eta: float = 0.0
    ) -> Tensor:
        """From t to t_prev (-1: the clean end) with the predicted noise `eps`; z_t, eps, noise: (B, C_z, h, w).

        eta = 0 is DDIM; eta = 1, which needs `noise`, with t_prev = t - 1 is the DDPM step with the posterior variance.
        """
        alpha_bar, previous = self.alpha_bar[t], self._alpha_bar(t_prev)
        variance = eta**2 * (1 - previous) / (1 - alpha_bar) * (1 - alpha_bar / previous)
        z0 = (z_t - _like(1 - alpha_bar, z_t).sqrt() * eps) / _like(alpha_bar, z_t).sqrt()
        direction = (1 - previous - variance).clamp(min=0)  # rounding may leave -1e-17 at the last step
        z_prev = _like(previous, z_t).sqrt() * z0 + _like(direction, z_t).sqrt() * eps
        return z_prev if noise is None else z_prev + _like(variance, z_t).sqrt() * noise

    def kl(
        self, eps: Tensor, eps_pred: Tensor, t: Tensor, variance: Literal["posterior", "beta"] = "posterior"
    ) -> Tensor:
        """KL(q(z_{t-1} | z_t, z0) || p(z_{t-1} | z_t)) per element, L_{t-1} of Ho et al.; t: (B,) in [1, T).

        variance: of the model. "posterior" (MONAI's "fixed_small"): w_t (eps - eps_pred)^2. "beta": plus a constant.
        At t = 0 the posterior has no variance; that term of the bound is another one.
        """
        beta, alpha_bar, previous = self.beta[t], self.alpha_bar[t], self.alpha_bar[t - 1]
        posterior = beta * (1 - previous) / (1 - alpha_bar)
        model = posterior if variance == "posterior" else beta
        ratio = posterior / model
        weight = beta**2 / (2 * model * (1 - beta) * (1 - alpha_bar))
        return _per_sample(weight, eps) * (eps - eps_pred) ** 2 + _per_sample((ratio - 1 - ratio.log()) / 2, eps)

    def _alpha_bar(self, t: int) -> Tensor:
        return self.alpha_bar[t] if t >= 0 else torch.ones_like(self.alpha_bar[0])


def _like(value: Tensor, reference: Tensor) -> Tensor:
    return value.to(reference.dtype)


def _per_sample(values: Tensor, reference: Tensor) -> Tensor:
    return _like(values, reference).view(-1, *[1] * (reference.ndim - 1))
