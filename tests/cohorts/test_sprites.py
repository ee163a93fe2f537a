import numpy as np
import pytest
import torch
from scipy import ndimage

from common.cohorts.sprites import ORIENTATIONS, SCALES, SHAPES, DrawSprite, sprite

AREA = {"square": 1.6**2, "ellipse": 0.7 * np.pi, "heart": 3.66 / 1.2**2}  # of a radius of 1


def head(size=64):
    """A disc of tissue at 110 in air at 25, and the disc."""
    inside = np.hypot(*(np.indices((size, size)) - size / 2)) < 0.4 * size
    return np.where(inside, 110, 25).astype(np.uint8)[None], inside[None]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("angle", [0.0, 0.3, np.pi / 2, 4.0])
def test_area_and_reach_are_those_of_the_formula(shape, angle):
    mask = sprite(shape, (200, 200), (90.0, 110.0), 60.0, angle)
    assert mask.sum() == pytest.approx(AREA[shape] * 60**2, rel=0.025)
    assert ndimage.label(mask)[1] == 1
    rows, columns = np.nonzero(mask)
    assert np.hypot(rows - 90, columns - 110).max() <= 1.2 * 60


def test_heart_has_its_tip_below_and_two_lobes_above():
    mask = sprite("heart", (101, 101), (50.0, 50.0), 40.0, 0.0)
    assert np.array_equal(mask, mask[:, ::-1])
    rows = np.flatnonzero(mask.any(axis=1))
    assert mask[rows[-1]].sum() <= 3
    assert ndimage.label(mask[rows[0]])[1] == 2


def test_angle_turns_from_rows_to_columns():
    ellipse = sprite("ellipse", (101, 101), (50.0, 50.0), 40.0, 0.0)
    assert np.ptp(np.nonzero(ellipse)[1]) == 80  # long along a row
    turned = sprite("ellipse", (101, 101), (50.0, 50.0), 40.0, np.pi / 2)
    assert np.array_equal(turned, ellipse.T)
    diagonal = sprite("ellipse", (101, 101), (50.0, 50.0), 40.0, np.pi / 4)
    assert diagonal[50 - 20, 50 + 20] != diagonal[50 + 20, 50 + 20] or diagonal[50 - 26, 50 + 26]


def test_unknown_shape_is_refused():
    with pytest.raises(ValueError, match="square, ellipse, heart"):
        sprite("star", (8, 8), (4, 4), 2, 0)


def test_sprite_is_binary_of_one_grey_value_and_all_else_stays():
    image, _ = head()
    drawn, mask = DrawSprite(seed=3)(image, subject="a")
    assert (drawn.dtype, mask.dtype) == (np.uint8, np.uint8)
    assert drawn.shape == mask.shape == image.shape
    assert set(np.unique(mask)) == {0, 1}
    assert len(np.unique(drawn[mask > 0])) == 1
    assert np.array_equal(drawn[mask == 0], image[mask == 0])
    assert image.max() == 110  # what was given is not changed


def test_same_seed_and_subject_same_sprite_whatever_else_is_random():
    image, _ = head()
    first = DrawSprite(seed=1)(image, subject="a")
    np.random.seed(5)
    again, other, others = (DrawSprite(seed=s)(image, subject=n) for s, n in ((1, "a"), (2, "a"), (1, "b")))
    assert np.array_equal(first[0], again[0])
    assert not np.array_equal(first[1], other[1])
    assert not np.array_equal(first[1], others[1])


@pytest.mark.parametrize("onto", ["anywhere", "tissue"])
def test_place_size_and_grey_value_are_drawn_over_their_ranges(onto):
    image, tissue = head()
    pairs = [DrawSprite(seed, onto)(image, tissue) for seed in range(200)]
    masks = np.concatenate([mask for _, mask in pairs]) > 0
    outside = (masks & ~tissue).any(axis=(1, 2))
    assert outside.any() == (onto == "anywhere")
    areas = masks.sum(axis=(1, 2))
    radius = 8.0 * SCALES
    assert 0.85 * 2.1 * radius[0] ** 2 < areas.min() < 1.1 * 2.6 * radius[0] ** 2
    assert 0.9 * 2.1 * radius[-1] ** 2 < areas.max() < 1.1 * 2.6 * radius[-1] ** 2
    greys = np.array([drawn[mask > 0][0] for drawn, mask in pairs])
    assert greys.min() < 20
    assert greys.max() > 235
    changes = [abs(drawn[mask > 0].astype(float) - image[mask > 0]).mean() for drawn, mask in pairs]
    assert min(changes) >= 25.5
    centres = np.array([ndimage.center_of_mass(mask) for mask in masks])
    assert (centres.std(axis=0) > 7).all()


def test_tensors_come_back_as_tensors():
    image, tissue = head()
    drawn, mask = DrawSprite(0, "tissue")(torch.from_numpy(image).float(), torch.from_numpy(tissue))
    assert (drawn.dtype, mask.dtype) == (torch.float32, torch.uint8)
    expected = DrawSprite(0, "tissue")(image, tissue)
    assert np.array_equal(drawn.numpy(), expected[0])
    assert np.array_equal(mask.numpy(), expected[1])


def test_what_cannot_be_drawn_is_said():
    image, tissue = head()
    with pytest.raises(ValueError, match="fits or shows"):
        DrawSprite(onto="tissue")(image, np.zeros_like(tissue))
    with pytest.raises(ValueError, match="fits or shows"):
        DrawSprite(radius_px=60)(image)
    with pytest.raises(ValueError, match="fits or shows"):
        DrawSprite(grey=(100, 120))(np.full((1, 64, 64), 110.0))
    with pytest.raises(ValueError, match="needs the foreground"):
        DrawSprite(onto="tissue")(image)
    with pytest.raises(ValueError, match="anywhere"):
        DrawSprite(onto="skull")


def test_dsprites_factors():
    assert len(SCALES) == 6
    assert (SCALES[0], SCALES[-1]) == (0.5, 1)
    assert len(ORIENTATIONS) == 40
