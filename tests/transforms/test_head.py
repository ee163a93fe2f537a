import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Invertd

from common.errors import ImageIntensityError
from common.images.check import typed_errors
from common.transforms.head import HeadCTPreprocessing, HeadMRPreprocessing, head_mask


def head(size=64, depth=3, seed=0):
    """Discs of tissue with a skull and a sinus in noisy air, a thin head rest below; (size, size, depth) float32."""
    rows, columns = np.indices((size, size)) - size / 2 + 0.5
    distance = np.hypot(rows, columns) / size
    image = np.where(distance < 0.35, 90.0, 25.0)
    image[(distance > 0.3) & (distance < 0.35)] = 255
    image[np.hypot(rows + size / 8, columns) / size < 0.06] = 12
    image[:, int(0.93 * size)] = 120
    volume = np.repeat(image[..., None], depth, axis=2)
    air = volume == 25
    volume[air] += np.random.default_rng(seed).uniform(-15, 15, volume.shape)[air]
    return volume.astype(np.float32), np.repeat((distance < 0.35)[..., None], depth, axis=2)


def prepared(volume, affine=None, **settings):
    image = MetaTensor(
        torch.from_numpy(volume)[None], affine=np.diag([3.0, 3.0, 5.0, 1.0]) if affine is None else affine
    )
    return HeadCTPreprocessing(**settings)({"image": image})


def test_head_is_in_0_to_1_and_all_else_0():
    volume, expected = head()
    data = prepared(volume)
    image = data["image"].as_tensor()[0].numpy()
    assert image.shape == (64, 64, 3)
    mask = data["brain"].as_tensor()[0].numpy()
    assert (mask != expected).mean() < 0.01
    assert np.array_equal(image > 0, mask)
    np.testing.assert_allclose(image[mask], np.clip(volume[mask] / 255, 1 / 255, 1), rtol=1e-6)
    assert data["brain_source"] == "head"
    assert data["image"].meta["intensity_unit"] == [255.0]
    assert np.array_equal(data["input"].as_tensor()[0].numpy(), volume * mask)


def test_sinus_is_part_of_the_head_and_the_head_rest_is_not():
    volume, _ = head()
    mask = head_mask(volume, 45.0)
    assert mask[24, 32].all()
    assert not mask[:, 57:].any()


def test_air_and_bone_tell_a_ct_from_mr():
    volume, _ = head()
    data = prepared(volume)
    assert data["air_level"] == pytest.approx(25, abs=1)
    assert data["bone_share"] == pytest.approx((volume >= 240).sum() / (volume > 45).sum())
    assert 0.2 < data["bone_share"] < 0.4
    mr = np.where(volume > 45, np.minimum(volume, 160), volume / 10)
    data = prepared(mr.astype(np.float32))
    assert data["air_level"] < 5
    assert data["bone_share"] == 0


def test_air_is_unknown_where_the_head_fills_the_image():
    volume = np.random.default_rng(0).uniform(80, 100, (64, 64, 3)).astype(np.float32)
    assert np.isnan(prepared(volume)["air_level"])


def test_given_mask_is_where_to_look():
    volume, _ = head()
    affine = np.diag([3.0, 3.0, 5.0, 1.0])
    mask = np.zeros_like(volume)
    mask[20:40, 25:45, 1] = 1
    image, given = (MetaTensor(torch.from_numpy(v)[None], affine=affine) for v in (volume, mask))
    data = HeadCTPreprocessing()({"image": image, "brain": given})
    assert data["brain_source"] == "given"
    assert np.array_equal(data["image"].as_tensor()[0].numpy() > 0, mask > 0)


def test_something_bright_in_the_air_is_looked_at():
    volume, _ = head()
    volume[2:8, 2:8, 1] = 200
    mask = head_mask(volume, 45.0)
    assert mask[3:7, 3:7, 1].all()
    assert not mask[:10, :10, 0].any()


@pytest.mark.parametrize("axial", [0, 1, 2])
def test_slices_do_not_see_each_other(axial):
    volume, _ = head()
    stack = np.concatenate([volume[..., :1], np.full_like(volume[..., :2], 25.0), volume[..., :1]], axis=2)
    alone, together = head_mask(volume[..., :1], 45.0), head_mask(np.moveaxis(stack, 2, axial), 45.0, axial)
    together = np.moveaxis(together, axial, 2)
    assert np.array_equal(together[..., [0]], alone)
    assert np.array_equal(together[..., [3]], alone)
    assert not together[..., 1:3].any()


@pytest.mark.parametrize("size", [64, 96])
def test_map_returns_to_the_grid_of_the_input(size):
    """Also where the slices are neither of the network's size nor stored axially."""
    volume, expected = head(size)
    affine = nib.affines.from_matvec(np.array([[0, 0, -2.0], [2.0, 0, 0], [0, -5.0, 0]]), [10, 20, 30])
    image = MetaTensor(torch.from_numpy(np.moveaxis(volume, 2, 1).copy())[None], affine=affine)
    preprocessing = HeadCTPreprocessing()
    data = preprocessing({"image": image})
    assert data["image"].shape == (1, 64, 64, 3)
    data["pred"] = MetaTensor(data["image"].as_tensor())
    back = Invertd("pred", preprocessing, orig_keys="image", nearest_interp=False)(data)["pred"]
    assert back.shape == data["brain"].shape
    np.testing.assert_allclose(np.asarray(back.affine), affine, atol=1e-4)
    restored = np.moveaxis(back.as_tensor()[0].numpy(), 1, 2)
    np.testing.assert_allclose(
        restored[expected].mean(), volume[expected].mean() / 255, rtol=0.06
    )  # the rim is blurred
    centre = slice(size // 2 - 4, size // 2 + 4)
    np.testing.assert_allclose(restored[centre, centre], 90 / 255, atol=0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda v: v - 1000, "not windowed"), (lambda v: v * 10, "not windowed"), (lambda v: v * 0.1, "air")],
)
def test_what_is_not_windowed_is_refused(change, message):
    with pytest.raises(RuntimeError) as caught:
        prepared(change(head()[0]))
    cause = caught.value
    while not isinstance(cause, ImageIntensityError):
        cause = cause.__cause__
    assert message in str(cause)


def mr_head(size=64, depth=3, seed=0):
    """Head of `head` as two MR modalities of other scales: tissue, brighter fat below the skin, noise in the air."""
    rng = np.random.default_rng(seed)
    _, mask = head(size, depth)
    rows, columns = np.indices((size, size)) - size / 2 + 0.5
    fat = mask & (np.hypot(rows, columns) / size > 0.3)[..., None]
    first = np.where(mask, 300.0, 0) + np.where(fat, 300, 0) + rng.rayleigh(8, mask.shape)
    second = np.where(mask, 5.0, 0) + np.where(fat, 3, 0) + rng.rayleigh(0.1, mask.shape)
    return np.stack([first, second]).astype(np.float32), mask, fat


def prepared_mr(volume, affine=None, **settings):
    image = MetaTensor(torch.from_numpy(volume), affine=np.diag([2.0, 2.0, 5.0, 1.0]) if affine is None else affine)
    settings = {"size": 64, "percentile": 98.0, "upper": 0.8, "channels": len(volume)} | settings
    with typed_errors():
        return HeadMRPreprocessing(**settings)({"image": image})


def test_mr_head_is_found_in_all_modalities_and_air_is_0():
    volume, expected, fat = mr_head()
    data = prepared_mr(volume)
    mask = data["brain"].as_tensor()[0].numpy()
    assert (mask != expected).mean() < 0.01
    assert data["brain_source"] == "head"
    image = data["image"].as_tensor().numpy()
    assert image.shape == (2, 64, 64, 3)
    assert np.array_equal(image > 0, np.broadcast_to(mask, image.shape))
    assert image.max() <= 1
    inner = expected & ~fat
    levels = [np.percentile(channel[mask], 98) for channel in volume]
    for channel, level, before in zip(image, levels, volume, strict=True):
        np.testing.assert_allclose(channel[inner], 0.8 * before[inner] / level, rtol=1e-4)
    np.testing.assert_allclose(data["image"].meta["intensity_unit"], np.array(levels) / 0.8, rtol=1e-4)


def test_mr_head_does_not_depend_on_the_scale_of_a_modality():
    """One in other units weighs the same in where the head is; no negative value counts."""
    volume, _, _ = mr_head()
    scaled = volume * np.array([1, 1000], dtype=np.float32).reshape(2, 1, 1, 1)
    scaled[1, :4, :4] = -1e5
    whole, again = prepared_mr(volume), prepared_mr(scaled)
    assert np.array_equal(whole["brain"], again["brain"])
    np.testing.assert_allclose(again["image"].as_tensor(), whole["image"].as_tensor(), rtol=1e-5)


def test_mr_modalities_of_one_grid_are_the_channels_in_their_order(tmp_path, save_nifti):
    volume, _, _ = mr_head()
    files = [save_nifti(tmp_path / f"{i}.nii.gz", channel) for i, channel in enumerate(volume)]
    preprocessing = HeadMRPreprocessing(64, 98.0, 0.8, channels=2)
    data = preprocessing({"image": [str(file) for file in files]})
    np.testing.assert_allclose(data["image"].as_tensor(), prepared_mr(volume)["image"].as_tensor(), rtol=1e-5)
    swapped = preprocessing({"image": [str(file) for file in files[::-1]]})["image"].as_tensor()
    np.testing.assert_allclose(swapped, data["image"].as_tensor().flip(0), rtol=1e-5)


@pytest.mark.parametrize("channel", [0, 1])
def test_mr_empty_modality_is_refused(channel):
    volume, _, _ = mr_head()
    volume[channel] = 0
    with pytest.raises(ImageIntensityError, match="hardly a voxel is above 0; give a scan of a head"):
        prepared_mr(volume)


def test_mr_map_returns_to_the_grid_of_the_input():
    volume, expected, fat = mr_head(96)
    affine = nib.affines.from_matvec(np.array([[0, 0, -2.0], [2.0, 0, 0], [0, -5.0, 0]]), [10, 20, 30])
    stored = np.moveaxis(volume, 3, 2).copy()
    image = MetaTensor(torch.from_numpy(stored), affine=affine)
    preprocessing = HeadMRPreprocessing(64, 98.0, 0.8, channels=2)
    data = preprocessing({"image": image})
    assert data["image"].shape == (2, 64, 64, 3)
    data["pred"] = MetaTensor(data["image"].as_tensor())
    back = Invertd("pred", preprocessing, orig_keys="image", nearest_interp=False)(data)["pred"]
    assert back.shape == stored.shape
    np.testing.assert_allclose(np.asarray(back.affine), affine, atol=1e-4)
    unit = np.array(data["image"].meta["intensity_unit"]).reshape(2, 1, 1, 1)
    restored = np.moveaxis(back.as_tensor().numpy() * unit, 2, 3)
    centre = slice(40, 56)
    np.testing.assert_allclose(
        restored[:, centre, centre].mean((1, 2, 3)), volume[:, centre, centre].mean((1, 2, 3)), rtol=0.01
    )
    assert (restored[0][fat].mean() > 1.3 * restored[0][expected & ~fat].mean()).all()
