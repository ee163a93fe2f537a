"""Autoencoders as detectors of what they cannot reconstruct (Baur et al., Medical Image Analysis 2021, "AE spatial").

The bottleneck is a small map, so that the network learns what healthy slices have in common rather than to copy.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from monai.networks.layers import MedianFilter
from monai.networks.nets import AutoEncoder
from torch import Tensor

from ..detection.method import AnomalyDetector, TrainingObjective


class AE(AnomalyDetector):
    """|x - x'|, mean over channels, after a median filter.

    Args:
        network: MONAI's; published results are without normalisation layers, whose default in MONAI (instance) would
            take the contrast from an image. H and W must be multiples of the product of its strides.
        residual: "absolute"; or "bright", max(x - x', 0), as published, which sees hyperintense lesions alone.
        median_size: side of the window, odd; 5 as published (there in three dimensions), 1 for none.
    """

    networks: ClassVar[tuple[str, ...]] = ("network",)

    network: Any  # has `encode` and `decode`

    def __init__(
        self, network: AutoEncoder, residual: Literal["absolute", "bright"] = "absolute", median_size: int = 5
    ) -> None:
        super().__init__()
        self.network = network
        self.residual = residual
        self.median = MedianFilter(median_size // 2, spatial_dims=2) if median_size > 1 else torch.nn.Identity()
        self.size_divisor = math.prod(network.strides)

    def _detect(self, image: Tensor, foreground: Tensor, generators: list[torch.Generator]) -> tuple[Tensor, Tensor]:
        reconstruction = self.reconstruct(image).clamp(0, 1) * foreground
        return self.anomaly_map(image, reconstruction), reconstruction

    def reconstruct(self, image: Tensor) -> Tensor:
        """(B, C, H, W) -> same, about [0, 1]."""
        return self.network(image)

    def anomaly_map(self, image: Tensor, reconstruction: Tensor) -> Tensor:
        """(B, C, H, W) twice -> (B, 1, H, W)."""
        difference = image - reconstruction
        difference = difference.abs() if self.residual == "absolute" else difference.clamp(min=0)
        return self.median(difference.mean(dim=1, keepdim=True))


class AEObjective(TrainingObjective):
    """Mean |x - x'| (the published sum over pixels, which Adam does not tell from the mean).

    Args:
        detector: the `AE` whose network is trained.
    """

    def __init__(self, detector: AE) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor, foreground: Tensor | None = None) -> dict[str, Tensor]:
        """Key `loss`."""
        return {"loss": (self.detector.reconstruct(images) - images).abs().mean()}
