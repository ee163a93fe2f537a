"""The brain of a skull-stripped image, and images that are not stripped."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from common.errors import SkullStripError
from common.transforms.brain import BrainMaskd, brain_mask, check_stripped


def make_image(volume, affine):
    volume = volume if volume.ndim == 4 else volume[None]
    return MetaTensor(torch.as_tensor(volume, dtype=torch.float32), affine=affine)


@pytest.fixture
def stripped(phantom):
    shape, affine = phantom.grid()
    volume, brain, _ = phantom.on_grid(shape, affine)
    return volume, brain, affine


def test_mask_is_the_brain(stripped):
    volume, brain, affine = stripped
    result = BrainMaskd("image")({"image": make_image(volume, affine)})
    assert result["brain"].shape == (1, *volume.shape)
    assert result["brain"].dtype == torch.bool
    assert np.array_equal(result["brain"][0], brain)
    assert np.array_equal(result["brain"].affine, affine)


def test_black_hole_belongs_to_the_brain(stripped):
    volume, brain, affine = stripped
    middle = np.array(volume.shape) // 2
    volume[tuple(slice(m - 4, m + 4) for m in middle)] = 0
    assert np.array_equal(brain_mask(make_image(volume, affine))[0], brain)


def test_specks_and_ringing_do_not(stripped):
    volume, brain, affine = stripped
    volume[1:3, 1:3, 1:3] = 500  # a speck of skull
    volume[~brain & (volume == 0)] = 0.001 * volume.max()  # what resampling leaves, below 1 % of the bright tissue
    assert np.array_equal(brain_mask(make_image(volume, affine))[0], brain)


def test_any_channel_counts(stripped):
    volume, brain, affine = stripped
    half = np.arange(volume.shape[0])[:, None, None] < volume.shape[0] // 2
    channels = np.stack([np.where(half, volume, 0), np.where(half, 0, volume)])
    assert np.array_equal(brain_mask(make_image(channels, affine))[0], brain)


def test_speck_of_skull_is_tolerated_and_noisy_air_is_not(stripped):
    volume, _, affine = stripped
    volume[1:3, 1:3, 1:3] = 500
    image = make_image(volume, affine)
    check_stripped(image, brain_mask(image))
    noise = np.random.default_rng(0).uniform(0, 20, volume.shape).astype(np.float32)
    noisy = make_image(np.maximum(volume, noise), affine)
    with pytest.raises(SkullStripError, match="around the brain"):
        check_stripped(noisy, brain_mask(noisy))


def test_head_is_too_large_for_a_brain(stripped):
    volume, _, affine = stripped
    image = make_image(volume, affine @ np.diag([2.5, 2.5, 2.5, 1]))
    with pytest.raises(SkullStripError, match="ml is no brain"):
        check_stripped(image, brain_mask(image))


def test_nothing_above_zero(stripped):
    volume, _, affine = stripped
    with pytest.raises(SkullStripError, match="brighter than the background"):
        brain_mask(make_image(-volume - 1, affine))


def test_given_mask_is_applied_and_the_image_need_not_be_stripped(stripped):
    volume, brain, affine = stripped
    head = make_image(volume + 5.0, affine)
    result = BrainMaskd("image")({"image": head, "brain": make_image(brain * 2.0, affine)})
    assert np.array_equal(result["brain"][0], brain)
    assert not result["image"][0][~torch.from_numpy(brain)].any()
    assert torch.equal(result["image"][0][torch.from_numpy(brain)], head[0][torch.from_numpy(brain)])


@pytest.mark.parametrize(("change", "fact"), [("grid", "another grid"), ("empty", "empty")])
def test_given_mask_that_cannot_be_used_is_refused(stripped, change, fact):
    volume, brain, affine = stripped
    mask = make_image(brain * (change != "empty"), affine + (change == "grid") * np.eye(4, k=3))
    with pytest.raises(SkullStripError, match=fact):
        BrainMaskd("image")({"image": make_image(volume, affine), "brain": mask})
