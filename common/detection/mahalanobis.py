"""The Mahalanobis distance of a slice to several reconstructions (Behrendt et al., MICCAI 2024, arXiv 2407.12474).

The error is measured by the covariance of the reconstructions: where a random method draws something else each time, it
counts less. A rule of scoring for any of these methods, without a training of its own.
"""

from __future__ import annotations

import math

import torch
from monai.utils import convert_to_tensor
from torch import Tensor


def mahalanobis_map(image: Tensor, reconstructions: Tensor, foreground: Tensor, regularisation: float) -> Tensor:
    """The root of what each pixel adds to the squared distance, 0 where it takes from it: (B, 1, H, W), of the image.

    The published map, but for its scaling to [0, 1] within a volume, which would make a healthy volume and a diseased
    one alike, and for the factor 1 - SSIM.

    Args:
        image: (B, C, H, W).
        reconstructions: (N, B, C, H, W), of N >= 2 draws.
        foreground: (B, 1, H, W) bool; other pixels do not count.
        regularisation: added to the variance of every pixel; 0.01 as published, for images in [0, 1].
    """
    image, reconstructions = (convert_to_tensor(x, track_meta=False) for x in (image, reconstructions))
    draws = (reconstructions * foreground).double()
    difference = (image * foreground).double() - draws.mean(dim=0)
    added = contributions(difference.flatten(1), (draws - draws.mean(dim=0)).flatten(2).transpose(0, 1), regularisation)
    return added.view_as(image).sum(dim=1, keepdim=True).clamp(min=0).sqrt().to(image)


def contributions(difference: Tensor, deviations: Tensor, regularisation: float) -> Tensor:
    """d (S^-1 d), whose sum is the squared distance; S is the sample covariance plus the regularisation times 1.

    S has a row for each pixel; its inverse follows from that of a matrix N x N (Woodbury).

    Args:
        difference: d, of each slice from the mean of its reconstructions, (B, P) float64.
        deviations: of N reconstructions from their mean, (B, N, P) float64.
    """
    draws = deviations.shape[1]
    scaled = deviations / math.sqrt((draws - 1) * regularisation)
    small = torch.eye(draws).to(scaled) + scaled @ scaled.transpose(1, 2)
    weights = torch.linalg.solve(small, scaled @ difference[..., None])
    explained = (scaled.transpose(1, 2) @ weights)[..., 0]
    return difference * (difference - explained) / regularisation
