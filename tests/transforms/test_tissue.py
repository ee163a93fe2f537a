import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from common.detection.reliability import MOST_VESSELS
from common.transforms.tissue import (
    SLOPES,
    StandardiseTissued,
    contrast_order,
    destandardised,
    piecewise_linear,
    tissue_modes,
    vessel_share,
)

MODES = (0.37, 0.62, 0.76)


def tissue(modes, shares=(0.24, 0.5, 0.26), seed=0, count=60_000):
    """Intensities (n,) of three tissues with partial volume between them."""
    draw = np.random.default_rng(seed)
    kind = draw.choice(3, size=count, p=shares)
    return np.clip(draw.normal(np.asarray(modes)[kind], np.array([0.1, 0.06, 0.03])[kind]), 1 / 255, 1)


def as_item(values):
    """An item with an image (1, 20, h, 10) of these values in the middle of background."""
    volume = np.zeros((20, len(values) // 160 + 4, 10), dtype=np.float32)
    volume[2:-2, 2:-2] = values[: 160 * (len(values) // 160)].reshape(16, -1, 10)
    return {"image": MetaTensor(torch.from_numpy(volume)[None])}


def standardised(values, modes=MODES):
    return StandardiseTissued("image", modes)(as_item(values))


@pytest.mark.parametrize("modes", [(0.37, 0.62, 0.76), (0.25, 0.52, 0.75), (0.3, 0.45, 0.8)])
def test_the_modes_of_three_tissues_are_found(modes):
    np.testing.assert_allclose(tissue_modes(tissue(modes)), modes, atol=0.03)


@pytest.mark.parametrize("share", [0.05, 0.15, 0.3])
@pytest.mark.parametrize("level", [0.2, 0.5])
def test_a_dark_lesion_moves_grey_and_white_matter_little(share, level):
    draw = np.random.default_rng(1)
    values = tissue(MODES)
    ill = draw.random(len(values)) < share
    values[ill] = draw.normal(level, 0.05, ill.sum())
    found = tissue_modes(values)
    np.testing.assert_allclose(found[1:], MODES[1:], atol=0.02 if share < 0.3 else 0.07)


def test_another_contrast_gets_the_modes_of_the_training_data():
    item = standardised(tissue((0.28, 0.53, 0.75)))
    image = item["image"].as_tensor()
    found = tissue_modes(image[image > 0].numpy())
    np.testing.assert_allclose(found[1:], MODES[1:], atol=0.02)
    np.testing.assert_allclose(found[0], MODES[0], atol=0.06)  # two slopes meet at its mode: it is no normal one now
    np.testing.assert_allclose(item["tissue_modes"], (0.28, 0.53, 0.75), atol=0.03)


def test_a_standardised_image_stays():
    once = standardised(tissue((0.28, 0.53, 0.75)))
    twice = StandardiseTissued("image", MODES)(once)
    difference = (twice["image"].as_tensor() - once["image"].as_tensor()).abs()
    assert difference[once["image"].as_tensor() > 0.58].max() < 0.02  # grey and white matter
    assert difference.max() < 0.06


def test_order_background_and_range():
    values = tissue((0.28, 0.53, 0.75))
    before, after = as_item(values)["image"].as_tensor(), standardised(values)["image"].as_tensor()
    assert ((after > 0) == (before > 0)).all()
    assert after.max() <= 1
    order = before.flatten().argsort()
    assert (after.flatten()[order].diff() >= 0).all()


def test_the_way_back():
    values = tissue((0.28, 0.53, 0.75)).clip(max=0.95)
    item = standardised(values)
    back = destandardised(item["image"].as_tensor(), item["image"].meta["tissue_knots"])
    torch.testing.assert_close(back, as_item(values)["image"].as_tensor(), atol=2e-3, rtol=0)


def test_a_lesion_keeps_its_contrast():
    """Whatever modes are found, no interval is squeezed or stretched by more than the limits."""
    for values in (tissue((0.28, 0.53, 0.75)), tissue((0.2, 0.26, 0.75)), tissue((0.5, 0.65, 0.75))):
        origin, target = standardised(values)["image"].meta["tissue_knots"]
        slopes = np.diff(target) / np.diff(origin)
        assert (slopes >= SLOPES[0] - 1e-6).all()
        assert (slopes <= SLOPES[1] + 1e-6).all()


@pytest.mark.parametrize(
    "values",
    [np.full(16_000, 0.5), np.random.default_rng(0).normal(0.5, 0.02, 16_000).clip(0.01, 1)],
    ids=["constant", "one tissue"],
)
def test_without_three_tissues_nothing_is_done(values):
    item = standardised(values)
    assert np.isnan(item["tissue_modes"]).all()
    torch.testing.assert_close(item["image"].as_tensor(), as_item(values)["image"].as_tensor())


def test_the_input_stays():
    item = as_item(tissue((0.28, 0.53, 0.75)))
    before = item["image"].clone()
    StandardiseTissued("image", MODES)(item)
    assert torch.equal(item["image"].as_tensor(), before.as_tensor())


def test_piecewise_linear_is_numpys():
    values = torch.linspace(0, 1, 11)
    knots = np.array([0, 0.5, 1]), np.array([0, 0.2, 1])
    torch.testing.assert_close(piecewise_linear(values, *knots), torch.from_numpy(np.interp(values, *knots)).float())


# CSF, grey and white matter of a brain in each contrast, as `ScaleIntensityByForegroundd` leaves them
CONTRASTS = {"T1": MODES, "FLAIR": (0.25, 0.75, 0.62), "T2": (0.85, 0.55, 0.4), "PD": (0.7, 0.8, 0.65)}


def brain(contrast, lesion=None, seed=0):
    """A ball (48, 52, 44) of white matter in grey matter in CSF, with a ventricle and a lesion that fills a corner."""
    axes = [np.linspace(-1.1, 1.1, size) for size in (48, 52, 44)]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    radius = np.sqrt(x**2 + y**2 + z**2)
    csf, grey, white = CONTRASTS[contrast]
    image = np.select([radius < 0.2, radius < 0.7, radius < 0.93], [csf, white, grey], csf)
    if lesion is not None:
        image[(x > 0.1) & (y > 0.1)] = lesion
    image = np.clip(image + np.random.default_rng(seed).normal(0, 0.03, image.shape), 1 / 255, 1)
    return np.where(radius <= 1, image, 0).astype(np.float32)


def test_white_matter_lies_deep_in_t1_only():
    orders = {contrast: contrast_order(brain(contrast), (2, 2, 2)) for contrast in CONTRASTS}
    assert orders["T1"] > 0.4
    assert all(order < 0.1 for contrast, order in orders.items() if contrast != "T1")


@pytest.mark.parametrize("level", [0.15, 0.37, 0.5, 0.95])
def test_a_large_lesion_does_not_change_the_order(level):
    image = brain("T1", level)
    assert (image != brain("T1")).sum() / (image > 0).sum() > 0.13
    assert contrast_order(image, (2, 2, 2)) > 0.33


def test_the_order_does_not_depend_on_size_nor_on_what_is_around():
    image = brain("T1")
    order = contrast_order(image, (2, 2, 2))
    assert contrast_order(image, (1, 1, 1)) == pytest.approx(order)
    assert contrast_order(np.pad(image, 9), (2, 2, 2)) == pytest.approx(order)
    inside = np.ix_(*(np.flatnonzero(image.any(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1))))
    assert contrast_order(image[inside], (2, 2, 2)) == pytest.approx(order)


def test_vessels_are_thin_and_lesions_are_not():
    vessels, lesion = brain("T1"), brain("T1")
    inside = vessels > 0
    vessels[::6, ::6] = np.where(inside, 1, 0)[::6, ::6]
    lesion[10:26, 20:36, 14:30] = 1
    assert vessel_share(brain("T1"), MODES[2]) < 0.0005
    assert vessel_share(vessels, MODES[2]) == pytest.approx(((vessels == 1) & inside).sum() / inside.sum(), rel=0.05)
    assert (lesion == 1).sum() / inside.sum() > 0.1
    assert vessel_share(lesion, MODES[2]) < MOST_VESSELS
    assert np.isnan(vessel_share(vessels, np.nan))


def test_white_matter_near_the_upper_end_leaves_room_for_vessels():
    """Values are clipped at 1, which can be less than 1.25 times white matter."""
    image = brain("T1")
    image[::6, ::6] = np.where(image > 0, 1, 0)[::6, ::6]
    assert vessel_share(image, 0.85) == vessel_share(image, MODES[2]) > 0.02


def test_what_tells_the_contrast_is_that_of_the_image_as_it_came():
    image = brain("T1")
    item = StandardiseTissued("image", (0.2, 0.4, 0.9))({"image": MetaTensor(torch.from_numpy(image)[None])})
    assert item["contrast_order"] == contrast_order(image, (1, 1, 1))
    assert item["vessel_share"] == vessel_share(image, item["tissue_modes"][2])
