"""The noise schedule of masked diffusion, with explicit (t, t_prev) steps (Beizaee et al., IPMI 2025)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import SettingError
from ..recorded import Recorded


def cosine_alpha_bar(num_train_timesteps: int, s: float = 0.008, max_beta: float = 0.999) -> Tensor:
    """Cumulative products of 1 - beta for the cosine schedule (Nichol & Dhariwal 2021, eq. 17), (T,) float64.

    MONAI's own "cosine" schedule returns the products shifted by one step and clips at 0.9999, so it is not used.
    """
    t = torch.arange(num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
    f = torch.cos((t + s) / (1 + s) * torch.pi / 2) ** 2
    beta = (1 - f[1:] / f[:-1]).clamp(max=max_beta)
    return torch.cumprod(1 - beta, dim=0)


class MaskedDDIMScheduler(Recorded, nn.Module):
    """Masked forward process (eq. 1, 2) and masked DDIM step (eq. 6, 7) of MAD-AD (arXiv 2502.16943).

    Polarity as in the paper: mask = 1 where a cell is noised, and so where the reverse step may change it.
    The printed eq. 6 and 7 do not follow from the forward process; the coded formulas, which do, are used:
    eps = (z_t - sqrt(alpha_bar_t) z0) / sqrt(1 - alpha_bar_t), direction sqrt(1 - alpha_bar_prev - sigma^2).
    T is 10 as in the paper; index i = 0 .. 9 stands for the paper's t = i + 1.

    Args:
        eta: stochasticity; sigma = eta * (DDPM standard deviation). The paper's "sigma_t = 0.5" is eta = 0.5: a
            constant sigma of 0.5 would make the radicand of the direction negative at small t.
    """

    alpha_bar: Tensor
    num_train_timesteps = 10

    def __init__(self, eta: float = 0.5) -> None:
        super().__init__()
        self.eta = eta
        self.register_buffer("alpha_bar", cosine_alpha_bar(self.num_train_timesteps), persistent=False)

    def timesteps(self, num_inference_steps: int) -> list[int]:
        """Descending indices 0, k, 2k, ... of an integer stride k, for example 5 steps of 10: [8, 6, 4, 2, 0].

        Raises SettingError where no stride gives exactly that many steps (of 10: 1, 2, 3, 4, 5 and 10 exist).
        """
        for stride in range(1, self.num_train_timesteps + 1):
            steps = range(0, self.num_train_timesteps, stride)
            if len(steps) == num_inference_steps:
                return list(reversed(steps))
        fact = f"no integer stride over {self.num_train_timesteps} steps gives {num_inference_steps} of them"
        raise SettingError("num_inference_steps", fact, "choose a divisor")

    def add_noise(self, z0: Tensor, noise: Tensor, mask: Tensor, t: Tensor) -> Tensor:
        """z_t = mask * (sqrt(alpha_bar_t) z0 + sqrt(1 - alpha_bar_t) noise) + (1 - mask) * z0, eq. 2.

        z0, noise: (B, C_z, h, w);  mask: (B, 1, h, w) in {0, 1};  t: (B,) int64 in [0, T).
        """
        alpha_bar = self.alpha_bar[t].to(z0.dtype).view(-1, 1, 1, 1)
        noised = alpha_bar.sqrt() * z0 + (1 - alpha_bar).sqrt() * noise
        return mask * noised + (1 - mask) * z0

    def sigma(self, t: int, t_prev: int) -> Tensor:
        """Standard deviation of the noise added on the way from t to t_prev; 0 at the last step (t_prev < 0)."""
        alpha_bar, previous = self._alpha_bars(t, t_prev)
        return self.eta * ((1 - previous) / (1 - alpha_bar) * (1 - alpha_bar / previous)).sqrt()

    def step(self, z_t: Tensor, z0_pred: Tensor, mask: Tensor, t: int, t_prev: int, noise: Tensor) -> Tensor:
        """One DDIM step from t to t_prev (-1: the clean end) where mask is 1; elsewhere z_t is kept (eq. 5 to 7).

        z_t, z0_pred, noise: (B, C_z, h, w);  mask: (B, 1, h, w) in {0, 1}.
        """
        alpha_bar, previous = (a.to(z_t.dtype) for a in self._alpha_bars(t, t_prev))
        sigma = self.sigma(t, t_prev).to(z_t.dtype)
        eps = (z_t - alpha_bar.sqrt() * z0_pred) / (1 - alpha_bar).sqrt()
        direction = (1 - previous - sigma**2).clamp(min=0).sqrt()  # rounding may leave -1e-9 at the last step
        candidate = previous.sqrt() * z0_pred + direction * eps + sigma * noise
        return mask * candidate + (1 - mask) * z_t

    def _alpha_bars(self, t: int, t_prev: int) -> tuple[Tensor, Tensor]:
        one = torch.ones((), dtype=self.alpha_bar.dtype, device=self.alpha_bar.device)
        return self.alpha_bar[t], self.alpha_bar[t_prev] if t_prev >= 0 else one
