"""Resampling of a brain and its mask: no dark rim, no aliasing, an exact background, and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import GaussianSmooth, Orientation, SpatialResample

from common.transforms.resample import LinearResample, ResampleForegroundd, smooth


def resample(volume, brain, affine, spacing_mm=2.0):
    transform = ResampleForegroundd("image", "foreground", (spacing_mm,) * 3)
    image = MetaTensor(torch.as_tensor(volume, dtype=torch.float32)[None], affine=affine)
    foreground = MetaTensor(torch.as_tensor(brain)[None], affine=affine)
    return transform, transform({"image": image, "foreground": foreground})


@pytest.mark.parametrize("spacing_mm", [(0.9, 0.9, 3.0), (1.0, 1.0, 1.0), (2.5, 2.0, 4.0)])
def test_rim_is_as_bright_as_the_middle(spacing_mm, phantom):
    shape, affine = phantom.grid(spacing_mm)
    _, brain, _ = phantom.on_grid(shape, affine)
    _, result = resample(70.0 * brain, brain, affine)
    values, inside = result["image"].as_tensor(), result["foreground"].as_tensor()
    assert inside.dtype == torch.bool
    torch.testing.assert_close(values[inside], torch.full_like(values[inside], 70.0), rtol=1e-4, atol=0)
    assert not values[~inside].any()
    assert float(inside.sum()) * 8 == pytest.approx(brain.sum() * np.prod(spacing_mm), rel=0.03)


def test_image_and_foreground_share_the_new_grid(phantom):
    shape, affine = phantom.grid((0.9, 1.4, 3.0))
    volume, brain, _ = phantom.on_grid(shape, affine)
    _, result = resample(volume, brain, affine)
    assert result["image"].shape == result["foreground"].shape
    assert np.allclose(result["image"].affine, result["foreground"].affine)
    assert np.allclose(result["image"].pixdim, 2)


def test_values_stay_at_their_place(phantom):
    shape, affine = phantom.grid((1.0, 1.0, 1.0))
    volume, brain, _ = phantom.on_grid(shape, affine)
    _, result = resample(volume, brain, affine)
    image = result["image"]
    expected, deep, _ = phantom.on_grid(image.shape[1:], np.asarray(image.affine))
    both = deep & result["foreground"][0].numpy()
    error = np.abs(image[0].numpy() - expected)[both] / expected.max()
    assert error.mean() < 0.01
    assert error.max() < 0.1


def test_same_spacing_changes_nothing(phantom):
    shape, affine = phantom.grid()
    volume, brain, _ = phantom.on_grid(shape, affine)
    _, result = resample(volume, brain, affine)
    torch.testing.assert_close(result["image"].as_tensor()[0], torch.from_numpy(volume), rtol=1e-5, atol=1e-3)
    assert np.array_equal(result["foreground"][0], brain)


def test_stripes_finer_than_the_target_become_grey(phantom):
    shape, affine = phantom.grid((0.5, 2.0, 2.0))
    _, brain, _ = phantom.on_grid(shape, affine)
    stripes = np.where(np.indices(shape)[0] % 2, 100.0, 0.0) * brain
    _, result = resample(stripes, brain, affine)
    inside = result["foreground"].as_tensor()
    assert float((result["image"].as_tensor()[inside] - 50).abs().mean()) < 5


def test_inverse_gives_the_grid_back(phantom):
    shape, affine = phantom.grid((0.9, 0.9, 3.0))
    volume, brain, _ = phantom.on_grid(shape, affine)
    transform, result = resample(volume, brain, affine)
    back = transform.inverse({"image": result["image"]})["image"]
    assert back.shape == (1, *shape)
    assert np.allclose(back.affine, affine)


@pytest.mark.parametrize("spacing_mm", [(0.5, 0.9, 1.9), (1.0, 1.0, 2.4), (0.2, 2.0, 2.0)])
def test_smoothing_is_that_of_monai(spacing_mm):
    """Within rounding, also where the kernel is wider than the image."""
    values = torch.rand(2, 12, 9, 7, generator=torch.Generator().manual_seed(0))
    image = MetaTensor(values, affine=np.diag([*spacing_mm, 1.0]))
    sigma = np.clip((2.0 / np.array(spacing_mm) - 1) / 2, 1e-3, None)
    expected = GaussianSmooth(sigma=sigma.tolist())(image)
    smoothed = smooth(image, (2.0,) * 3)
    torch.testing.assert_close(smoothed.as_tensor(), expected.as_tensor(), rtol=1e-6, atol=0)
    assert torch.equal(image.as_tensor(), values)


def test_smoothing_keeps_what_was_done_to_the_image():
    image = Orientation("LPS", labels=None)(MetaTensor(torch.rand(1, 6, 6, 6), affine=np.eye(4)))
    smoothed = smooth(image, (2.0,) * 3)
    assert len(smoothed.applied_operations) == 1
    assert smoothed.applied_operations == image.applied_operations
    assert torch.equal(smoothed.affine, image.affine)


OBLIQUE = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0] @ np.diag([1.5, 2.0, 1.0])


def grid(matrix, origin):
    return torch.from_numpy(np.block([[matrix, np.reshape(origin, (3, 1))], [0, 0, 0, 1]]).astype(np.float64))


@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize(
    "change",
    [np.diag([0.5, 0.7, 2.0]), np.diag([-1, 1, -0.4]), np.eye(3)[[2, 0, 1]] * 0.6, np.eye(3), np.linalg.qr(OBLIQUE)[0]],
    ids=["finer", "flipped", "swapped", "moved", "turned"],
)
def test_linear_resampling_is_that_of_monai(change, padding, monkeypatch):
    """Between grids that overlap in part; the fast way is taken where axes are parallel, and only there."""
    image = MetaTensor(torch.rand(2, 12, 9, 7), affine=grid(OBLIQUE, [3, -20, 8]))
    centre = np.asarray(image.affine) @ [5.5, 4, 3, 1]
    shape, matrix = (15, 11, 9), OBLIQUE @ change
    target = grid(matrix, centre[:3] - matrix @ [6, 5.3, 4])
    expected = SpatialResample("bilinear", padding)(image, target, shape)
    places = []
    with monkeypatch.context() as patch:
        patch.setattr(SpatialResample, "__call__", lambda self, img, *_, **__: places.append(self) or expected)
        result = LinearResample(padding)(image, target, shape)
    assert bool(places) == (abs(change[0, 1]) not in (0, 0.6))
    assert result.dtype == torch.float32 and result.is_contiguous()
    torch.testing.assert_close(result.as_tensor(), expected.as_tensor(), rtol=0, atol=1e-6)
    torch.testing.assert_close(result.affine, expected.affine)


@pytest.mark.parametrize("change", [np.diag([0.5, -0.7, 2.0]), np.linalg.qr(OBLIQUE)[0]], ids=["parallel", "turned"])
def test_inverse_of_linear_resampling_has_the_grid_and_the_history_of_before(change):
    image = MetaTensor(torch.rand(1, 12, 9, 7), affine=grid(OBLIQUE, [3, -20, 8]))
    image = Orientation("LPS", labels=None)(image)
    resample, before = LinearResample(), SpatialResample("bilinear", "zeros")
    target = grid(OBLIQUE @ change, [0, -20, 8]), (15, 11, 9)
    moved, expected = (transform(image, *target) for transform in (resample, before))
    back, expected = resample.inverse(moved), before.inverse(expected)
    torch.testing.assert_close(back.as_tensor(), expected.as_tensor(), rtol=0, atol=1e-6)
    torch.testing.assert_close(back.affine, image.affine)
    assert [operation["class"] for operation in back.applied_operations] == ["Orientation"]
