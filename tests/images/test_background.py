"""What is around the tissue: its value, where it was filled in, and what no signal is."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from common.images.background import (
    background,
    box_of,
    field_of_view,
    filled_in,
    is_negative,
    joined_to_border,
    zero_of_tissue,
)


@pytest.fixture
def tissue():
    """(1, 40, 40, 40) with a ball of 100 to 200, and where it is, (40, 40, 40)."""
    radius = np.linalg.norm(np.indices((40, 40, 40)) - 19.5, axis=0)
    ball = radius < 14
    return np.where(ball, np.random.default_rng(0).uniform(100, 200, ball.shape), 0).astype(np.float32)[None], ball


@pytest.mark.parametrize("air", [0.0, -1000.0, 7.25])
def test_commonest_value_is_the_background(tissue, air):
    image, ball = tissue
    around = background(np.where(ball, image, np.float32(air)))
    assert around.shape == (1, 1, 1, 1)
    assert around.dtype == image.dtype
    assert around.item() == air


def test_middle_of_noise_is_the_background(tissue):
    image, ball = tissue
    noise = np.random.default_rng(1).normal(5, 0.01, image.shape).astype(np.float32)
    assert background(np.where(ball, image, noise)).item() == pytest.approx(5, abs=0.01)


def test_each_channel_has_its_own(tissue):
    image, ball = tissue
    both = np.concatenate([image, np.where(ball, image, np.float32(-3))])
    assert background(both).ravel().tolist() == [0, -3]


def test_filled_in_is_what_hangs_together_with_the_border(tissue):
    """A hole in the tissue has the value of the background too, and is no filling."""
    image, ball = tissue
    image[:, 18:22, 18:22, 18:22] = 0
    filled = filled_in(image, background(image))
    assert np.array_equal(filled, ~ball)


def test_filled_in_must_be_so_in_every_channel(tissue):
    image, ball = tissue
    other = image.copy()
    other[0, 0] = 50
    filled = filled_in(np.concatenate([image, other]), np.zeros((2, 1, 1, 1), np.float32))
    assert not filled[0].any()
    assert np.array_equal(filled[1:], ~ball[1:])


def test_field_of_view_is_a_box(tissue):
    image, ball = tissue
    box = field_of_view(image, background(image))
    seen = np.argwhere(ball)
    low, high = seen.min(axis=0), seen.max(axis=0)
    assert box.sum() == np.prod(high - low + 1)
    assert box[tuple(low)]
    assert box[tuple(high)]


def test_overshoot_at_the_rim_is_not_negative_tissue(tissue):
    image, ball = tissue
    volume = image[0]
    assert not is_negative(volume, ball)
    radius = np.linalg.norm(np.indices(ball.shape) - 19.5, axis=0)
    rim = volume - 300 * (ball & (radius > 12.5))
    assert (rim[ball] < 0).mean() > 0.05
    assert not is_negative(rim, ball)
    assert is_negative(volume - 150 * ball, ball)


def test_zero_is_where_the_mean_was_taken_away_from(tissue):
    """0 of an image as it was measured; the background of one that was shifted as a whole; a guess by the darkest
    tissue where only the tissue was shifted."""
    image, ball = tissue
    dark = np.where(ball, 24 + (image - 100) * 1.76, 0).astype(np.float32)  # 24 to 200: the darkest are 12 %
    assert zero_of_tissue(dark, ball, background(dark)).tolist() == [0]
    shifted = dark - 110
    zero = zero_of_tissue(shifted, ball, background(shifted))
    assert zero.dtype == image.dtype
    assert zero.tolist() == [-110]
    masked = np.where(ball, shifted, 0).astype(np.float32)
    assert zero_of_tissue(masked, ball, background(masked)).item() == pytest.approx(-110, abs=6)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_what_does_not_hang_together_with_the_border_are_the_holes(share):
    """By another way: SciPy's, which grows the outside step by step."""
    noise = ndimage.gaussian_filter(np.random.default_rng(3).normal(size=(20, 24, 16)), 1)
    solid = noise > np.quantile(noise, share)
    assert np.array_equal(~joined_to_border(~solid), ndimage.binary_fill_holes(solid))


def test_box_is_the_smallest():
    inside = np.zeros((6, 7, 8), dtype=bool)
    inside[1, 2, 3] = inside[4, 2, 7] = True
    assert box_of(inside) == (slice(1, 5), slice(2, 3), slice(3, 8))
