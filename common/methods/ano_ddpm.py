"""AnoDDPM: partial diffusion with simplex noise (Wyatt et al., CVPR Workshops 2022).

White noise at a low level hides small structures only, and a tumour outlives it. Simplex noise has structure at all
scales up to 64 pixels, so a network that removes it also removes large lesions. All else is `ddpm`.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from monai.networks.nets import DiffusionModelUNet
from monai.networks.schedulers import DDPMScheduler

from ..diffusion.simplex import SimplexNoise
from .ddpm import DDPM, DDPMObjective, Noise


class AnoDDPM(DDPM):
    """Noise with simplex fields to level 250, denoise with new ones, (x - x_hat)^2.

    The published segmentation is (x - x_hat)^2 > 0.5 for images in [-1, 1], which is 0.125 of this map.

    Args:
        unet, scheduler: see `DDPM`; by default the steps' variance is beta_t ("fixed_large").
        level: lambda; level 250 starts at index 249.
        forward_noise: of training and of the forward process; simplex by default, `gaussian_noise` is the paper's
            comparison.
        reverse_noise: of the steps down; simplex in the published evaluation, `gaussian_noise` in its code's default.
        settings: the other arguments of `DDPM`.
    """

    first_index: ClassVar[Literal["L", "L-1"]] = "L-1"

    def __init__(
        self,
        unet: DiffusionModelUNet,
        scheduler: DDPMScheduler | None = None,
        level: int = 250,
        forward_noise: Noise | None = None,
        reverse_noise: Noise | None = None,
        residual: Literal["absolute", "squared"] = "squared",
        **settings: Any,
    ) -> None:
        super().__init__(
            unet,
            scheduler or DDPMScheduler(variance_type="fixed_large"),
            level=level,
            forward_noise=forward_noise or SimplexNoise(),
            reverse_noise=reverse_noise or SimplexNoise(),
            residual=residual,
            **settings,
        )


class AnoDDPMObjective(DDPMObjective):
    """The loss of `DDPM`, of simplex noise, and for indices 0 ... 799 only: the levels above are never trained."""

    def __init__(self, detector: AnoDDPM, max_timestep: int = 800) -> None:
        super().__init__(detector, max_timestep)
