import numpy as np
import pytest
import torch
from arrays import GOLDEN
from torchmetrics.functional.classification import binary_auroc, binary_average_precision

from common.metrics import (
    auroc,
    auto_ddpm_max_dice,
    average_precision,
    global_max_dice,
    iter_mask2_max_dice,
    latent_ddpm_sprites,
    mad_ad_max_dice,
)
from common.metrics.histograms import exact_histograms


def test_mad_ad_protocols_match_the_reference_program():
    golden = np.load(GOLDEN / "mad_ad" / "anomaly_map.npz")
    maps, masks = golden["maps"], golden["gt"]
    assert mad_ad_max_dice(maps, masks) == pytest.approx(golden["max_dice_mean_over_slices_201_thresholds"], abs=1e-9)
    assert global_max_dice(maps, masks) == pytest.approx(golden["global_max_dice_pr_curve"], abs=1e-9)
    histograms = exact_histograms(maps.ravel(), masks.ravel())
    assert average_precision(*histograms) == pytest.approx(golden["average_precision"], abs=1e-9)
    assert auroc(*histograms) == pytest.approx(golden["auroc"], abs=1e-9)


def test_auto_ddpm_protocol_matches_the_reference_program():
    golden = np.load(GOLDEN / "auto_ddpm" / "metrics.npz")
    maps, masks = golden["pred"], golden["label"]
    assert auto_ddpm_max_dice(maps, masks) == pytest.approx(golden["global_max_dice"], abs=1e-6)
    assert global_max_dice(maps, masks) == pytest.approx(golden["exact_global_max_dice_all_cuts"], abs=1e-9)
    histograms = exact_histograms(maps.ravel(), masks.ravel())
    assert average_precision(*histograms) == pytest.approx(golden["average_precision_sklearn"], abs=1e-9)


def test_iter_mask2_protocol_matches_the_reference_program():
    golden = np.load(GOLDEN / "iter_mask2" / "metric.npz")
    assert iter_mask2_max_dice(golden["error"], golden["seg"]) == pytest.approx(golden["best_dice"], abs=1e-9)
    error = (golden["true"] - golden["reconstruction"]) ** 2
    error = (error - error.min()) / (error.max() - error.min()) * golden["brain"]  # with the background's
    assert iter_mask2_max_dice(error, golden["seg"]) == pytest.approx(golden["best_dice"], abs=1e-9)


def test_iter_mask2_protocol_is_of_slices_with_a_lesion():
    masks = np.zeros((3, 4, 4), dtype=bool)
    masks[0, 1, 1] = True
    with pytest.raises(ValueError, match="2 of 3 images have no lesion"):
        iter_mask2_max_dice(np.zeros((3, 4, 4)), masks)


def test_mad_ad_image_without_lesion_counts_only_when_nothing_is_predicted():
    maps, masks = np.zeros((2, 4, 4)), np.zeros((2, 4, 4), dtype=bool)
    maps[0, 0, 0], masks[0, 0, 0], maps[1, 0, 0] = 0.9, True, 0.5
    assert mad_ad_max_dice(maps, masks) == pytest.approx(1, abs=1e-6)  # thresholds between 0.5 and 0.9
    maps[1, 0, 0] = 0.95
    assert mad_ad_max_dice(maps, masks) == pytest.approx(0.5, abs=1e-6)


def test_global_max_dice_takes_any_scale_and_is_undefined_without_a_lesion():
    rng = np.random.default_rng(0)
    maps, masks = rng.random((2, 8, 8)), rng.random((2, 8, 8)) < 0.2
    assert global_max_dice(1e3 * maps, masks) == pytest.approx(global_max_dice(maps, masks))
    assert np.isnan(global_max_dice(maps, np.zeros_like(masks)))


@pytest.mark.parametrize("protocol", [mad_ad_max_dice, iter_mask2_max_dice, auto_ddpm_max_dice, global_max_dice])
def test_shapes_that_differ_are_refused(protocol):
    with pytest.raises(ValueError, match="same shape"):
        protocol(np.zeros((2, 4, 4)), np.zeros((2, 4, 5)))


def test_sprites_by_hand():
    """Two contaminated images of four pixels and two clean ones, whose pixels do not count."""
    maps = np.array([[4, 1, 0, 0], [3, 2, 0, 0], [9, 9, 9, 9], [9, 9, 9, 9]]).reshape(4, 2, 2)
    masks = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]).reshape(4, 2, 2)
    result = latent_ddpm_sprites(maps, masks, np.array([0.9, 0.4, 0.5, -1.0]))
    # pixels in falling order: sprite, other, sprite, other: Dice of the first three 2 * 2 / (3 + 2)
    assert result["max_dice"] == pytest.approx(4 / 5)
    assert result["auprc"] == pytest.approx((1 + 2 / 3) / 2)
    assert result["image_auroc"] == pytest.approx(3 / 4)
    assert result["image_auprc"] == pytest.approx((1 + 2 / 3) / 2)


def test_sprites_agree_with_torchmetrics():
    rng = np.random.default_rng(0)
    masks = rng.random((12, 8, 8)) < 0.1
    masks[5:] = False
    maps, scores = rng.random(masks.shape) + 0.5 * masks, rng.normal(size=12)
    result = latent_ddpm_sprites(maps, masks, scores)
    pixels = torch.from_numpy(maps[:5]).flatten(), torch.from_numpy(masks[:5]).flatten().int()
    images = torch.from_numpy(scores).sigmoid(), torch.arange(12).lt(5).int()
    assert result["auprc"] == pytest.approx(float(binary_average_precision(pixels[0] / 2, pixels[1])), abs=1e-6)
    assert result["image_auroc"] == pytest.approx(float(binary_auroc(*images)), abs=1e-6)
    assert result["image_auprc"] == pytest.approx(float(binary_average_precision(*images)), abs=1e-6)
    assert result["max_dice"] == pytest.approx(global_max_dice(maps[:5], masks[:5]))


def test_sprites_need_both_kinds_of_images_and_a_score_each():
    masks = np.zeros((2, 4, 4), dtype=bool)
    with pytest.raises(ValueError, match="0 of 2 images have a sprite"):
        latent_ddpm_sprites(np.zeros(masks.shape), masks, np.zeros(2))
    with pytest.raises(ValueError, match="2 of 2 images have a sprite"):
        latent_ddpm_sprites(np.zeros(masks.shape), ~masks, np.zeros(2))
    with pytest.raises(ValueError, match="one for each of 2 images"):
        latent_ddpm_sprites(np.zeros(masks.shape), masks, np.zeros(3))
