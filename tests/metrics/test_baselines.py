import pytest
import torch

from common.metrics import MeanHealthyImage, intensity_threshold
from common.metrics.baselines import (
    QUANTITIES,
    AboveHealthyAtlas,
    HealthyBaselines,
    darker_than_mirrored,
    without_rim,
)


def brain(size=(12, 14, 10), box=(8, 10, 6), start=(2, 1, 3), value=0.5, channels=1):
    """A box-shaped brain of intensity `value` plus a ramp along the first axis of the box."""
    foreground = torch.zeros(1, *size, dtype=torch.bool)
    image = torch.zeros(channels, *size)
    where = tuple(slice(s, s + b) for s, b in zip(start, box, strict=True))
    foreground[(0, *where)] = True
    ramp = (torch.arange(box[0]) + 0.5) / box[0] * 0.2
    image[(slice(None), *where)] = value + ramp[:, None, None]
    return image, foreground


@pytest.mark.parametrize(("direction", "expected"), [("bright", 0.5), ("dark", 0.5), ("bright", 0.2), ("dark", 0.8)])
def test_intensity_threshold_is_the_intensity_or_its_complement(direction, expected):
    foreground = torch.zeros(1, 4, 4, 4, dtype=torch.bool)
    foreground[:, 1:3] = True
    intensity = expected if direction == "bright" else 1 - expected
    image = torch.full((2, 4, 4, 4), intensity) * foreground
    result = intensity_threshold(image, foreground, direction)
    assert result.shape == (1, 4, 4, 4)
    torch.testing.assert_close(result, expected * foreground)


def test_intensity_threshold_is_never_negative():
    image, foreground = torch.full((1, 2, 2, 2), 1.2), torch.ones(1, 2, 2, 2, dtype=torch.bool)
    assert (intensity_threshold(image, foreground, "dark") == 0).all()


def test_intensity_threshold_refuses_other_directions():
    with pytest.raises(ValueError, match="direction"):
        intensity_threshold(*brain(), direction="up")


@pytest.mark.parametrize("channels", [1, 2])
def test_mean_healthy_image_finds_what_differs(channels):
    model = MeanHealthyImage(box=(16, 20, 12)).fit([brain(value=v, channels=channels) for v in (0.3, 0.4, 0.5)])
    assert model.n_subjects_ == 3
    image, foreground = brain(value=0.4, channels=channels)
    image[:, 5, 5, 5] += 0.3
    result = model(image, foreground)
    assert result.shape == (1, 12, 14, 10)
    assert result.dtype == torch.float32
    assert result[0, 5, 5, 5] == pytest.approx(0.3, abs=0.01)
    result[0, 5, 5, 5] = 0
    assert result.max() < 0.01
    assert (result[~foreground] == 0).all()


def test_brains_are_aligned_by_their_bounding_boxes():
    healthy = [brain(), brain((20, 20, 20), (12, 12, 10), (5, 6, 7)), brain((16, 16, 9), (16, 16, 9), (0, 0, 0))]
    model = MeanHealthyImage(box=(16, 16, 16)).fit(healthy)
    for image, foreground in healthy:
        assert model(image, foreground).max() < 0.02


def test_mean_and_standard_deviation_are_those_of_the_foreground():
    volumes = [brain(value=v, size=(8, 10, 6), start=(0, 0, 0)) for v in (0.2, 0.3, 0.7)]
    image, foreground = volumes[0]
    foreground[:, :2, :2] = False  # a corner that this brain does not fill
    image[:, :2, :2] = 0
    model = MeanHealthyImage(box=(8, 10, 6)).fit(iter(volumes))  # a generator will do
    stack = torch.stack([v for v, _ in volumes])
    torch.testing.assert_close(model.mean_[:, 4:], stack.mean(0)[:, 4:])
    torch.testing.assert_close(model.std_[:, 4:], stack.std(0, correction=0)[:, 4:])
    torch.testing.assert_close(model.mean_[:, :2, :2], stack[1:].mean(0)[:, :2, :2])


def test_place_no_healthy_brain_covers_has_mean_zero():
    image, foreground = brain(size=(8, 8, 8), box=(8, 8, 8), start=(0, 0, 0))
    foreground[:, :4, :4] = False
    model = MeanHealthyImage(box=(8, 8, 8)).fit([(image, foreground)])
    assert (model.mean_[:, :4, :4] == 0).all()
    assert torch.isfinite(model.std_).all()


def test_fitting_again_starts_afresh():
    model = MeanHealthyImage(box=(8, 8, 8)).fit([brain(value=0.7)])
    model.fit([brain(value=0.1)])
    assert model.n_subjects_ == 1
    assert model.mean_.max() < 0.4


def test_mean_healthy_image_refuses_what_it_cannot_do():
    model = MeanHealthyImage()
    image, foreground = brain()
    with pytest.raises(ValueError, match="fit"):
        model(image, foreground)
    with pytest.raises(ValueError, match="at least one"):
        model.fit([])
    with pytest.raises(ValueError, match="empty"):
        model.fit([(image, torch.zeros_like(foreground))])


def lobes(dent=0.0, size=(40, 44, 36)):
    """A box-shaped brain of two equal halves, brighter to the front; `dent` darkens a cube on the left."""
    image, foreground = torch.zeros(1, *size), torch.zeros(1, *size, dtype=torch.bool)
    where = (0, slice(4, -4), slice(4, -4), slice(4, -4))
    foreground[where] = True
    image[where] = torch.linspace(0.4, 0.7, size[1] - 8)[None, :, None]
    image[0, 10:15, 20:25, 16:21] -= dent
    return image, foreground


@pytest.mark.parametrize(
    ("name", "dent", "found"),
    [
        ("darkness_minus_atlas", 0.3, True),
        ("darkness_minus_atlas", -0.2, False),
        ("brightness_minus_atlas", -0.2, True),
        ("brightness_minus_atlas", 0.3, False),
        ("mirrored_minus_atlas", 0.3, True),
    ],
)
def test_what_exceeds_the_healthy_atlas_is_found_and_nothing_else(name, dent, found):
    """Also in a brain of another size than the healthy ones; the gradient of the healthy brain is no lesion."""
    healthy = AboveHealthyAtlas(QUANTITIES[name]).fit([lobes(), lobes(size=(44, 40, 38))])
    image, foreground = lobes(dent)
    result = healthy(image, foreground)
    assert result.shape == foreground.shape and result.dtype == torch.float32
    assert healthy(*lobes()).max() < 0.02
    inside = torch.zeros_like(foreground)
    inside[0, 7:18, 17:28, 13:24] = True  # smoothing carries it over the border of the cube
    assert (result[0, 12, 22, 18] > 0.1 * abs(dent)) == found
    assert result[~inside].max() < 0.02


def test_the_side_that_is_darker_is_marked_and_not_its_mirror_image():
    result = AboveHealthyAtlas(darker_than_mirrored).fit([lobes()])(*lobes(0.3))[0]
    assert result[12, 22, 18] > 0.1
    assert result[40 - 1 - 12, 22, 18] == 0
    both, foreground = lobes(0.3)
    both = torch.minimum(both, both.flip(1))
    assert darker_than_mirrored(both, foreground).max() < 0.01


def test_the_rim_is_left_out():
    image, foreground = lobes()
    image[:, :6] = 0.0  # two voxels of the brain
    assert AboveHealthyAtlas(QUANTITIES["darkness_minus_atlas"]).fit([lobes()])(image, foreground).max() < 0.02
    assert without_rim(torch.ones(1, 7, 7, 7, dtype=torch.bool)).sum() == 27  # beyond the volume there is no brain


def test_a_brain_that_is_all_rim_has_an_empty_map():
    image, foreground = lobes()
    model = AboveHealthyAtlas(darker_than_mirrored).fit(
        [(image, foreground), (image[..., 17:18], foreground[..., 17:18])]
    )
    assert (model(image[..., 17:18], foreground[..., 17:18]) == 0).all()
    with pytest.raises(ValueError, match="at least one"):
        AboveHealthyAtlas(darker_than_mirrored).fit([])


def test_baselines_that_have_seen_healthy_brains_are_fitted_in_one_pass():
    seen = []

    def volumes():
        for index in range(31):
            seen.append(index)
            yield lobes(0.3 if index % 2 else 0.0)  # every second is kept for the atlases: these have no dent

    healthy = HealthyBaselines.fit(volumes(), 31)
    assert seen == list(range(31))
    assert healthy.mean_image.n_subjects_ == 31
    assert set(healthy.atlases) == set(QUANTITIES)
    assert healthy.atlases["darkness_minus_atlas"](*lobes(0.3)).max() > 0.1
    with pytest.raises(ValueError, match="at least one"):
        HealthyBaselines.fit([], 0)
