import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from common.transforms.tissue import SLOPES, StandardiseTissued, destandardised, piecewise_linear, tissue_modes

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
