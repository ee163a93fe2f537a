"""What the second stages of the latent methods share: they train on the posterior of a frozen latent space."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor

from ..detection.method import TrainingObjective, foreground_of
from ..networks.latent_space import posterior_of


class LatentObjective(TrainingObjective):
    """Minimises what a subclass says of the posterior of `detector.latent_space`, which stays frozen."""

    detector: Any

    def forward(
        self,
        images: Tensor | None = None,
        foreground: Tensor | None = None,
        posterior: tuple[Tensor, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Give images, or the cached `posterior` of the latent space with the foreground of the images."""
        mean, std = posterior_of(self.detector.latent_space, images, posterior)
        if foreground is None and images is not None:
            foreground = foreground_of(images)
        return self.losses_of(mean, std, foreground)

    @abstractmethod
    def losses_of(self, mean: Tensor, std: Tensor, foreground: Tensor | None) -> dict[str, Tensor]:
        """Losses, of which the key `loss` is minimised.

        mean, std: (B, C_z, h, w);  foreground: (B, 1, H, W) bool, None where a posterior was given without one.
        """
