import dataclasses

import pytest
import torch

from common.detection.method import AnomalyDetector, Detection, foreground_of, noise_like, top_mean
from common.errors import ImageIntensityError, ImageShapeError


class Toy(AnomalyDetector):
    """A map of ones and more, and a reconstruction from -0.5 to 1.5 that is brightest outside: both need masking."""

    size_divisor = 4

    def _detect(self, image, foreground, generators):
        self.seen = image, foreground
        noise = noise_like(image, generators)
        return torch.ones_like(image[:, :1]).double() + noise.abs().amax(1, keepdim=True), 1.5 - 2 * image


def slices(batch=2, channels=1, size=(8, 4)):
    image = torch.rand(batch, channels, *size, generator=torch.Generator().manual_seed(0)) * 0.9 + 0.1
    image[..., :2, :] = 0
    return image


@pytest.mark.parametrize("channels", [1, 3])
def test_map_and_reconstruction_are_masked_and_the_reconstruction_is_clamped(channels):
    image = slices(channels=channels)
    detection = Toy().detect(image)
    background = torch.zeros(2, 1, 8, 4, dtype=torch.bool)
    background[..., :2, :] = True
    assert detection.anomaly_map.shape == (2, 1, 8, 4)
    assert detection.anomaly_map.dtype == torch.float32
    assert (detection.anomaly_map[background] == 0).all()
    assert (detection.anomaly_map[~background] >= 1).all()
    expected = (1.5 - 2 * image).clamp(0, 1).masked_fill(background, 0)
    torch.testing.assert_close(detection.reconstruction, expected)
    assert detection.score is None


def test_default_foreground_is_where_any_channel_is_positive():
    image = torch.zeros(1, 2, 4, 4)
    image[0, 0, 0, 0] = image[0, 1, 3, 3] = 0.5
    assert Toy().detect(image).anomaly_map.nonzero().tolist() == [[0, 0, 0, 0], [0, 0, 3, 3]]


def test_foreground_of_slices_and_of_volumes():
    for shape in [(2, 3, 4, 4), (2, 3, 4, 4, 4)]:
        image = torch.zeros(shape)
        image[1, 2, 3] = 1e-3
        expected = torch.zeros(2, 1, *shape[2:], dtype=torch.bool)
        expected[1, 0, 3] = True
        assert torch.equal(foreground_of(image), expected)


def test_method_sees_nothing_outside_the_given_foreground():
    detector, image = Toy(), slices()
    foreground = torch.zeros(2, 1, 8, 4, dtype=torch.bool)
    foreground[..., 4:, :] = True
    detection = detector.detect(image, foreground)
    assert torch.equal(detector.seen[0], image * foreground)
    assert torch.equal(detection.anomaly_map > 0, foreground)


def test_method_has_no_score_unless_it_says_so():
    image = slices()
    assert not Toy().has_separate_score
    assert Toy().score(image, image > 0, []) is None


def test_score_that_comes_with_the_map_is_handed_on():
    class Scored(Toy):
        def _detect(self, image, foreground, generators):
            return *super()._detect(image, foreground, generators), image.sum(dim=(1, 2, 3))

    image = slices()
    assert torch.equal(Scored().detect(image).score, image.sum(dim=(1, 2, 3)))
    assert not Scored().has_separate_score


def test_score_that_takes_passes_of_its_own_is_not_made_with_the_map():
    class Costly(Toy):
        def score(self, image, foreground, generators):
            raise AssertionError("was not asked for")

    assert Costly().has_separate_score
    assert Costly().detect(slices()).score is None


def test_map_of_an_empty_slice_is_zero():
    assert (Toy().detect(torch.zeros(2, 1, 4, 4)).anomaly_map == 0).all()


def test_randomness_follows_the_seed_of_the_slice():
    image = slices(1).repeat(3, 1, 1, 1)
    maps = Toy().detect(image, seeds=torch.tensor([4, 5, 4])).anomaly_map
    assert torch.equal(maps[0], maps[2])
    assert not torch.equal(maps[0], maps[1])
    assert torch.equal(maps[1:2], Toy().detect(image[:1], seeds=torch.tensor([5])).anomaly_map)
    zeros = torch.zeros(3, dtype=torch.int64)
    assert torch.equal(Toy().detect(image).anomaly_map, Toy().detect(image, seeds=zeros).anomaly_map)


def test_no_gradients_are_recorded():
    image = slices().requires_grad_()
    assert not Toy().detect(image).reconstruction.requires_grad


@pytest.mark.parametrize("size", [(6, 4), (4, 6), (1, 1)])
def test_size_that_is_no_multiple_is_refused(size):
    with pytest.raises(ImageShapeError, match="multiples of 4"):
        Toy().detect(torch.rand(1, 1, *size))


@pytest.mark.parametrize("shape", [(4, 4), (1, 4, 4), (1, 1, 4, 4, 4)])
def test_other_numbers_of_dimensions_are_refused(shape):
    with pytest.raises(ImageShapeError, match=r"is not \(B, C, H, W\)"):
        Toy().detect(torch.rand(shape))


@pytest.mark.parametrize("shape", [(2, 2, 8, 4), (1, 1, 8, 4), (2, 1, 4, 8), (2, 8, 4)])
def test_foreground_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match="does not fit"):
        Toy().detect(slices(channels=2), torch.ones(shape, dtype=torch.bool))


@pytest.mark.parametrize("seeds", [[1], [1, 2, 3], [[1], [2]], 1])
def test_seeds_that_are_not_one_per_slice_are_refused(seeds):
    with pytest.raises(ValueError, match="seeds"):
        Toy().detect(slices(), seeds=torch.tensor(seeds))


def test_detection_cannot_be_changed():
    detection = Detection(torch.zeros(1), torch.zeros(1))
    with pytest.raises(dataclasses.FrozenInstanceError):
        detection.score = torch.ones(1)


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        ([], 0.01, 0.0),
        ([3.0], 0.01, 3.0),
        ([1.0, 5.0, 2.0], 0.01, 5.0),
        ([1.0, 5.0, 2.0, 4.0], 0.5, 4.5),
        ([1.0, 5.0], 1.0, 3.0),
        (list(range(1000)), 0.01, 994.5),
    ],
)
def test_top_mean(values, share, expected):
    assert top_mean(torch.tensor(values, dtype=torch.float32), share).item() == expected


def test_noise_is_normal_and_of_the_dtype_of_the_reference():
    generators = [torch.Generator().manual_seed(s) for s in (0, 1)]
    noise = noise_like(torch.zeros(2, 4, 50, 50, dtype=torch.float64), generators)
    assert noise.dtype == torch.float64
    assert noise.shape == (2, 4, 50, 50)
    assert abs(noise.mean()) < 0.03
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    assert abs((noise[0] * noise[1]).mean()) < 0.05
    assert not torch.equal(noise, noise_like(noise, generators))  # the generators have moved on


@pytest.mark.parametrize("value", [1.01, -0.01, float("nan")])
def test_values_outside_of_the_range_are_refused(value):
    image = torch.full((1, 1, 8, 8), 0.5)
    image[0, 0, 3, 3] = value
    with pytest.raises(ImageIntensityError, match=r"values outside of \[0, 1\]"):
        Toy().detect(image)
