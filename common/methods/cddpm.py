"""cDDPM: diffusion guided by a code of the image (Behrendt et al., Computers in Biology and Medicine 186, 2025).

The whole slice is noised, and a network predicts it clean in one call, told by a short code of the clean slice what its
contrast is. The code is too short to hold a lesion. Done at three levels of noise, whose mean is the pseudo-healthy
slice. arXiv 2312.04215.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ..detection.method import AnomalyDetector, TrainingObjective, median
from ..diffusion.masked_ddim import cosine_alpha_bar
from ..diffusion.simplex import SimplexNoise
from ..errors import SettingError
from ..networks.conditioned_unet import ConditionedUNet
from ..networks.pixel_unshuffle_unet import size_divisor
from .pddpm import NUM_TRAIN_TIMESTEPS, eroded


class CDDPM(AnomalyDetector):
    """|x - x_hat|, where x_hat is the mean of one-step reconstructions of x noised to several indices.

    Args:
        unet: `unet(x_t, t, code)` predicts x0 of a cosine schedule; its images are in [-1, 1].
        encoder: the code (B, c) of a clean slice in [0, 1], such as `CodeEncoder`; trained with the U-Net.
        indices: 0-based, one call of the U-Net each, every one with its own noise. (499,) is the published program
            without `noise_ensemble`.
        erosion: pixels that are peeled off the foreground before the median; 3 at 96 px in the code.
        median_size: side of the median window, odd; the code's is 5 in three dimensions, this one stays in the slice.

    Raises SettingError for indices that the schedule does not have.
    """

    networks = ("unet", "encoder")

    alpha_bar: Tensor

    def __init__(
        self,
        unet: ConditionedUNet,
        encoder: nn.Module,
        indices: Sequence[int] = (249, 499, 749),
        erosion: int = 3,
        median_size: int = 5,
    ) -> None:
        super().__init__()
        if not indices or not all(0 <= index < NUM_TRAIN_TIMESTEPS for index in indices):
            fact = f"{list(indices)} are not indices of the schedule, 0 ... {NUM_TRAIN_TIMESTEPS - 1}"
            raise SettingError("indices", fact, "choose one or more within")
        self.unet = unet
        self.encoder = encoder
        self.indices = indices
        self.noise = SimplexNoise(mode="2d")
        self.erosion = erosion
        self.median_size = median_size
        self.size_divisor = size_divisor(unet)
        self.register_buffer("alpha_bar", cosine_alpha_bar(NUM_TRAIN_TIMESTEPS), persistent=False)

    def _detect(self, image: Tensor, foreground: Tensor, generators: list[Generator]) -> tuple[Tensor, Tensor]:
        x0 = image * 2 - 1
        times = torch.zeros(len(x0), dtype=torch.int64, device=x0.device)
        noises = [self.noise(x0, times + index, generators) for index in self.indices]
        reconstruction = self.reconstruct(image, noises)
        error = (image - reconstruction).abs().mean(dim=1, keepdim=True)
        return median(error * eroded(foreground, self.erosion), self.median_size), reconstruction

    def reconstruct(self, image: Tensor, noises: Sequence[Tensor]) -> Tensor:
        """x_hat in about [0, 1]: the mean over the indices, with a noise for each; all (B, C, H, W)."""
        x0, code, total = image * 2 - 1, self.encoder(image), torch.zeros_like(image)
        for index, noise in zip(self.indices, noises, strict=True):
            t = torch.full((len(x0),), index, device=x0.device)
            total = total + self.predict(x0, noise, t, code)
        return (total / len(self.indices) + 1) / 2

    def predict(self, x0: Tensor, noise: Tensor, t: Tensor, code: Tensor) -> Tensor:
        """The network's x0 of images in [-1, 1] that are noised to t, (B,), told the codes (B, c)."""
        alpha_bar = self.alpha_bar[t].to(x0.dtype).view(-1, 1, 1, 1)
        x_t = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise
        return self.unet(x_t, t, code)


class CDDPMObjective(TrainingObjective):
    """Mean over all pixels of |x_hat - x|, the whole slice noised to a random index; encoder and U-Net learn together.

    Args:
        detector: the `CDDPM` whose networks are trained.
        max_timestep: indices are drawn from 0 ... max_timestep - 1; default: all, as published.
    """

    def __init__(self, detector: CDDPM, max_timestep: int | None = None) -> None:
        super().__init__()
        self.detector = detector
        self.max_timestep = max_timestep or len(detector.alpha_bar)

    def forward(self, images: Tensor, foreground: Tensor | None = None) -> dict[str, Tensor]:
        """Key `loss`; indices and noise are drawn from the global generator, for each sample its own."""
        t = torch.randint(self.max_timestep, (len(images),), device=images.device)
        return {"loss": self.reconstruction_loss(images, self.detector.noise(images, t), t)}

    def reconstruction_loss(self, images: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The loss of given noise, in the network's range [-1, 1]."""
        x0 = images * 2 - 1
        return F.l1_loss(self.detector.predict(x0, noise, t, self.detector.encoder(images)), x0)
