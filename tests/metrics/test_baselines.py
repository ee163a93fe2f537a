import pytest
import torch

from common.metrics import MeanHealthyImage, intensity_threshold


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
