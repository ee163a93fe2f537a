"""How well normal anatomy is reconstructed: PSNR and SSIM in the foreground, without the lesions.

Inside a lesion a good method reconstructs something else than the image, so lesions must not count.
Shapes: image, reconstruction (N, C, H, W) float32 in [0, 1]; lesion, foreground (N, H, W) bool; NaN if nothing is left.
"""

from __future__ import annotations

import torch
from monai.metrics import PSNRMetric
from monai.metrics.regression import compute_ssim_and_cs
from torch import Tensor
from torch.nn import functional as F

_WINDOW = 11  # with sigma 1.5 the window of Wang et al., IEEE TIP 2004, and the default of MONAI's SSIMMetric
_SIGMA = 1.5


def psnr_outside_lesions(image: Tensor, reconstruction: Tensor, lesion: Tensor, foreground: Tensor) -> float:
    """PSNR in dB over all foreground voxels outside lesions, data range 1 (MONAI `PSNRMetric`); inf when identical."""
    keep = (foreground & ~lesion).unsqueeze(1).expand_as(image)
    if not keep.any():
        return float("nan")
    return float(torch.as_tensor(PSNRMetric(max_val=1)(reconstruction[keep].unsqueeze(0), image[keep].unsqueeze(0))))


def ssim_outside_lesions(image: Tensor, reconstruction: Tensor, lesion: Tensor, foreground: Tensor) -> float:
    """Mean 2D SSIM over the foreground pixels whose window holds no lesion, data range 1.

    MONAI's `SSIMMetric` averages over whole images, black background included; its map is used here instead.
    """
    half = _WINDOW // 2
    total, count = 0.0, 0
    for x, y, abnormal, inside in zip(image, reconstruction, lesion, foreground, strict=True):
        near_lesion = F.max_pool2d(abnormal.float().unsqueeze(0), _WINDOW, stride=1, padding=half)[0] > 0
        keep = inside & ~near_lesion
        if not keep.any():
            continue
        padded = F.pad(torch.stack([x, y]), [half] * 4, mode="replicate")  # so that the map has the size of the image
        similarity, _ = compute_ssim_and_cs(
            padded[1:], padded[:1], spatial_dims=2, kernel_size=(_WINDOW, _WINDOW), kernel_sigma=(_SIGMA, _SIGMA)
        )
        total += float(similarity[0].mean(0)[keep].sum(dtype=torch.float64))
        count += int(keep.sum())
    return total / count if count else float("nan")
