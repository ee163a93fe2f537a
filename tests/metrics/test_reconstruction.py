"""PSNR and SSIM of what is healthy: lesions and background do not count."""

from __future__ import annotations

import math

import pytest
import torch
from monai.metrics import SSIMMetric

from common.metrics.reconstruction import psnr_outside_lesions, ssim_outside_lesions


@pytest.fixture
def images():
    """Image and reconstruction (2, 1, 40, 40), lesion and foreground (2, 40, 40)."""
    image = torch.rand(2, 1, 40, 40, generator=torch.Generator().manual_seed(0))
    foreground = torch.zeros(2, 40, 40, dtype=torch.bool)
    foreground[:, 2:38, 2:38] = True
    lesion = torch.zeros_like(foreground)
    lesion[0, 10:14, 10:14] = True
    return image, image.clone(), lesion, foreground


def test_psnr_is_that_of_the_healthy_foreground(images):
    _, reconstruction, lesion, foreground = images
    assert psnr_outside_lesions(*images) == math.inf
    reconstruction[lesion[:, None] | ~foreground[:, None]] = 0
    assert psnr_outside_lesions(*images) == math.inf
    reconstruction[(foreground & ~lesion)[:, None]] += 0.1
    assert psnr_outside_lesions(*images) == pytest.approx(20, abs=1e-4)


def test_ssim_skips_windows_with_lesion(images):
    _, reconstruction, lesion, _ = images
    reconstruction[lesion[:, None]] = 0
    assert ssim_outside_lesions(*images) == pytest.approx(1, abs=1e-6)
    reconstruction[1, 0, 20:30] = 0
    assert ssim_outside_lesions(*images) < 0.9


def test_ssim_of_a_whole_image_is_near_monais(images):
    """MONAI's map ends where its window does: 30 x 30 pixels of 40 x 40, the same that are foreground here."""
    image, reconstruction, lesion, foreground = images
    foreground[:] = False
    foreground[:, 5:35, 5:35] = True
    noisy = (reconstruction + 0.2 * torch.rand(image.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    expected = SSIMMetric(spatial_dims=2, data_range=1.0)(noisy, image).mean()
    found = ssim_outside_lesions(image, noisy, torch.zeros_like(lesion), foreground)
    assert found == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("metric", [psnr_outside_lesions, ssim_outside_lesions])
def test_nothing_healthy_is_undefined(metric, images):
    image, reconstruction, _, foreground = images
    assert math.isnan(metric(image, reconstruction, foreground.clone(), foreground))
