"""Metrics of the benchmark, the papers' own protocols, and the baselines that cost nothing."""

from .baselines import MeanHealthyImage, intensity_threshold
from .detection import DetectionMetrics
from .histograms import auroc, average_precision, max_dice
from .masked_bernoulli import masked_bernoulli_metrics
from .protocols import (
    auto_ddpm_max_dice,
    global_max_dice,
    iter_mask2_max_dice,
    latent_ddpm_sprites,
    mad_ad_max_dice,
)
from .reconstruction import psnr_outside_lesions, ssim_outside_lesions

__all__ = [
    "DetectionMetrics",
    "MeanHealthyImage",
    "auroc",
    "auto_ddpm_max_dice",
    "average_precision",
    "global_max_dice",
    "intensity_threshold",
    "iter_mask2_max_dice",
    "latent_ddpm_sprites",
    "mad_ad_max_dice",
    "masked_bernoulli_metrics",
    "max_dice",
    "psnr_outside_lesions",
    "ssim_outside_lesions",
]
