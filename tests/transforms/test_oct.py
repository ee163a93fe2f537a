import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Invertd

from common.errors import SkullStripError
from common.images.check import typed_errors
from common.transforms.oct import OCTPreprocessing


def scans(height=40, width=56, depth=3):
    """Smooth layers, each B-scan with another range of grey values; (height, width, depth) float32."""
    layers = np.sin(np.arange(width) / 9)[None, :, None] + 0.3 * np.cos(np.arange(height) / 11)[:, None, None]
    return (40 + layers * np.array([8.0, 20.0, 30.0])[:depth] + np.arange(depth)).astype(np.float32)


def stretched(volume):
    low, high = volume.min((0, 1), keepdims=True), volume.max((0, 1), keepdims=True)
    return (volume - low) / (high - low)


def image_of(volume, affine=None):
    return MetaTensor(torch.from_numpy(volume)[None], affine=np.eye(4) if affine is None else affine)


def test_each_scan_fills_0_to_1_and_all_of_it_is_looked_at():
    volume = scans(32, 32)
    data = OCTPreprocessing(32)({"image": image_of(volume)})
    assert bool(data["brain"].all())
    assert data["brain_source"] == "all"
    image = data["image"].as_tensor()[0].numpy()
    np.testing.assert_allclose(image, stretched(volume).clip(1 / 255, 1), atol=1e-5)
    np.testing.assert_allclose(data["input"].as_tensor()[0] / 255, stretched(volume), atol=1e-5)


@pytest.mark.parametrize("axial", [0, 2])
def test_scans_do_not_see_each_other_however_they_are_stored(axial):
    volume = scans()
    affine = np.eye(4) if axial == 2 else nib.affines.from_matvec(np.eye(3)[:, [2, 0, 1]])
    together = OCTPreprocessing(32)({"image": image_of(np.moveaxis(volume, 2, axial).copy(), affine)})["image"]
    changed = volume.copy()
    changed[..., 2] *= 5
    alone = OCTPreprocessing(32)({"image": image_of(changed)})["image"]
    assert together.shape == (1, 32, 32, 3)
    np.testing.assert_allclose(together.as_tensor()[..., :2], alone.as_tensor()[..., :2], atol=1e-5)


def test_scan_of_one_grey_value_is_finite():
    volume = scans()
    volume[..., 1] = 7
    image = OCTPreprocessing(32)({"image": image_of(volume)})["image"].as_tensor()
    assert bool(torch.isfinite(image).all())
    assert torch.unique(image[..., 1]).tolist() == pytest.approx([1 / 255])


def test_given_mask_is_where_to_look_and_must_fit():
    volume = scans(32, 32)
    mask = np.zeros_like(volume)
    mask[8:20, 5:25] = 1
    data = OCTPreprocessing(32)({"image": image_of(volume), "brain": image_of(mask)})
    assert data["brain_source"] == "given"
    assert np.array_equal(data["image"].as_tensor()[0].numpy() > 0, mask > 0)
    with pytest.raises(SkullStripError, match="another grid"), typed_errors():
        OCTPreprocessing(32)({"image": image_of(volume), "brain": image_of(mask[:-1])})


def test_map_returns_to_the_grid_of_the_input():
    volume = scans()
    preprocessing = OCTPreprocessing(64)
    data = preprocessing({"image": image_of(volume, np.diag([-1.0, -1.0, 1.0, 1.0]))})
    assert data["image"].shape == (1, 64, 64, 3)
    data["pred"] = MetaTensor(data["image"].as_tensor())
    back = Invertd("pred", preprocessing, orig_keys="image", nearest_interp=False)(data)["pred"]
    assert back.shape == (1, 40, 56, 3)
    np.testing.assert_allclose(back.as_tensor()[0], stretched(volume), atol=0.05)
