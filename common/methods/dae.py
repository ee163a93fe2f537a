"""DAE: denoising autoencoders for unsupervised anomaly detection in brain MRI (Kascenas et al., MIDL 2022).

A U-Net learns to remove coarse noise from healthy slices. At test time it sees the clean image, and what it removes
from that is the anomaly. One network, one stage, one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from monai.networks.layers import MedianFilter
from torch import Tensor

from ..detection.method import AnomalyDetector, TrainingObjective, foreground_of
from ..networks.weight_standardised_unet import WeightStandardisedUNet

MARGIN = 2  # of a window of 5 x 5


class DAE(AnomalyDetector):
    """|x - f(x)|, mean over channels, away from the foreground's rim, 5 x 5 median (section 2.3 of the paper).

    Args:
        network: image to image, with `size_divisor`.
    """

    networks = ("network",)

    def __init__(self, network: WeightStandardisedUNet) -> None:
        super().__init__()
        self.network = network
        # MONAI's median repeats the border pixels; the slice is padded by reflection first, as published
        self.median = MedianFilter(MARGIN, spatial_dims=2)
        self.size_divisor = 2 * network.size_divisor  # twice: reflect padding needs two pixels at the coarsest level

    def _detect(self, image: Tensor, foreground: Tensor, generators: list[torch.Generator]) -> tuple[Tensor, Tensor]:
        reconstruction = self.network(image)
        return self.anomaly_map(image, reconstruction, foreground), reconstruction

    def anomaly_map(self, image: Tensor, reconstruction: Tensor, foreground: Tensor) -> Tensor:
        """(B, C, H, W) twice and (B, 1, H, W) bool -> (B, 1, H, W)."""
        padded = F.pad(self.error(image, reconstruction, foreground), (MARGIN,) * 4, mode="reflect")
        return self.median(padded)[..., MARGIN:-MARGIN, MARGIN:-MARGIN]

    def error(self, image: Tensor, reconstruction: Tensor, foreground: Tensor) -> Tensor:
        """The map before the median: 0 where not more than 95 % of the 5 x 5 pixels around are foreground."""
        interior = F.avg_pool2d(foreground.float(), 2 * MARGIN + 1, stride=1, padding=MARGIN) > 0.95
        return (image - reconstruction).abs().mean(dim=1, keepdim=True) * interior


class DAEObjective(TrainingObjective):
    """Remove coarse noise from the foreground (section 2.2): mean of |f(x + noise) - x|^p over the foreground.

    Args:
        detector: the `DAE` whose network is trained.
        noise_resolutions: cells of noise along a side before upsampling, one is drawn per batch. The paper has 16 at
            128 px and finds it its main sensitivity: lesions of the size of a cell are removed best.
        noise_std: standard deviation before upsampling (bilinear upsampling lowers it to about two thirds).
        loss: "l2" as published, "l1" is less blurred.
    """

    def __init__(
        self,
        detector: DAE,
        noise_resolutions: Sequence[int] = (16,),
        noise_std: float = 0.2,
        loss: Literal["l1", "l2"] = "l2",
    ) -> None:
        super().__init__()
        self.detector = detector
        self.noise_resolutions = noise_resolutions
        self.noise_std = noise_std
        self.loss = F.l1_loss if loss == "l1" else F.mse_loss

    def forward(self, images: Tensor, foreground: Tensor | None = None) -> dict[str, Tensor]:
        """Key `loss`; the noise is drawn from the global generator."""
        foreground = foreground_of(images) if foreground is None else foreground
        side = self.noise_resolutions[int(torch.randint(len(self.noise_resolutions), ()))]
        noise = torch.randn(*images.shape[:2], side, side, device=images.device) * self.noise_std
        shift = torch.randint(images.shape[-1], (2,)).tolist()
        noisy = images + coarse_noise(noise, images.shape[2:], shift) * foreground
        return {"loss": self.reconstruction_loss(self.detector.network(noisy), images, foreground)}

    def reconstruction_loss(self, prediction: Tensor, images: Tensor, foreground: Tensor) -> Tensor:
        """Mean over all pixels of the loss inside the foreground."""
        return self.loss(prediction * foreground, images * foreground)


def coarse_noise(noise: Tensor, size: torch.Size, shift: list[int]) -> Tensor:
    """Upsample noise (B, C, r, r) bilinearly to (B, C, H, W) and roll it by (rows, columns), one shift per batch."""
    noise = F.interpolate(noise, size=tuple(size), mode="bilinear", align_corners=True)
    return noise.roll(shifts=shift, dims=(2, 3))
