"""DAE against the published formulas (golden/dae/README.md), and the contract of a method."""

import pytest
import torch
from arrays import golden, slices
from torch import nn

from common.errors import ImageShapeError
from common.methods.dae import DAE, DAEObjective, coarse_noise
from common.networks.weight_standardised_unet import WeightStandardisedUNet


class Record(nn.Module):
    """Remembers its input and returns it, times a factor."""

    size_divisor = 1

    def __init__(self, factor=1.0):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        self.seen = x
        return self.factor * x


@pytest.fixture(scope="module")
def g():
    return golden("dae/dae")


def tiny(channels=1):
    torch.manual_seed(0)
    detector = DAE(WeightStandardisedUNet(channels, (4, 8), (2, 2))).eval()
    for parameter in detector.parameters():
        nn.init.normal_(parameter, std=0.3)
    return detector


def test_noise_is_upsampled_with_aligned_corners_and_rolled(g):
    size, shifts = g["x"].shape[2:], g["shifts"].tolist()
    unrolled = coarse_noise(g["coarse_noise"], size, [0, 0])
    torch.testing.assert_close(unrolled, g["upsampled_align_corners_True"])
    assert not torch.allclose(unrolled, g["upsampled_align_corners_False_WRONG"], atol=1e-2)
    torch.testing.assert_close(coarse_noise(g["coarse_noise"], size, shifts), g["rolled"])


def test_noisy_input(g, monkeypatch):
    network = Record()
    objective = DAEObjective(DAE(network), noise_resolutions=[4], noise_std=1.0)
    shifts = iter([torch.tensor(0), g["shifts"]])
    monkeypatch.setattr(torch, "randn", lambda *shape, **_: g["coarse_noise"].view(shape))
    monkeypatch.setattr(torch, "randint", lambda *_: next(shifts))
    objective(g["x"])
    torch.testing.assert_close(network.seen, g["noisy_input"])


def test_training_loss(g):
    objective = DAEObjective(DAE(Record()))
    loss = objective.reconstruction_loss(g["reconstruction"], g["x"], g["foreground"])
    torch.testing.assert_close(loss, g["train_loss"])


def test_anomaly_map(g):
    detector, images = DAE(Record()), (g["x"], g["reconstruction"], g["foreground"])
    assert detector.anomaly_map(*images).max() > 0
    torch.testing.assert_close(detector.error(*images), g["error_before_median"])
    torch.testing.assert_close(detector.anomaly_map(*images), g["score_median5"])


def test_rim_of_the_foreground_is_left_out():
    image, expected = torch.zeros(2, 1, 1, 16, 16)
    image[..., 4:12, 4:12] = 0.5
    expected[..., 6:10, 6:10] = 0.5
    assert torch.equal(DAE(Record(0.0)).error(image, torch.zeros_like(image), image > 0), expected)


def test_median_reflects_at_the_border():
    # the window of the first row holds that row once, the second and the third row twice
    detector, error = DAE(Record()), torch.zeros(1, 1, 8, 8)
    error[:, :, [0, 2]] = 1.0
    detector.error = lambda *_: error
    assert detector.anomaly_map(error, error, error)[..., 0, :].min() == 1
    error[:, :, 2] = 0.0
    assert detector.anomaly_map(error, error, error).max() == 0


def test_identity_finds_nothing():
    detection = DAE(Record()).detect(slices())
    assert (detection.anomaly_map == 0).all()
    torch.testing.assert_close(detection.reconstruction, slices())


@pytest.mark.parametrize("channels", [1, 2])
def test_detection(check_detection, channels):
    check_detection(tiny(channels), slices(channels=channels))


def test_slice_gives_the_same_alone_and_in_any_batch(check_batches):
    check_batches(tiny(), slices())


def test_detection_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    tiny_detector = tiny()
    torch.set_rng_state(state)
    first, second = tiny_detector.detect(slices()), tiny_detector.detect(slices())
    assert torch.equal(first.anomaly_map, second.anomaly_map)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("size", [15, 18])
def test_wrong_size_is_refused(size):
    with pytest.raises(ImageShapeError, match="multiples of 4"):
        tiny().detect(torch.rand(1, 1, size, 16))


def test_smallest_allowed_size_works():
    detector = tiny()
    side = detector.size_divisor
    assert detector.detect(torch.rand(1, 1, side, side)).anomaly_map.shape == (1, 1, side, side)


@pytest.mark.parametrize("given", [True, False])
def test_noise_falls_into_the_foreground_only(given):
    network, image = Record(), slices(batch=2, channels=2, size=32)
    foreground = torch.zeros(2, 1, 32, 32, dtype=torch.bool) if given else (image > 0).any(1, keepdim=True)
    foreground[..., 10:20, 10:20] = True
    torch.manual_seed(0)
    losses = DAEObjective(DAE(network), noise_std=0.5)(image, foreground if given else None)
    noise = network.seen - image
    assert torch.equal((noise != 0).any(1, keepdim=True), foreground)
    torch.testing.assert_close(losses["loss"], (noise**2).mean())


@pytest.mark.parametrize(("loss", "power"), [("l1", 1), ("l2", 2)])
def test_loss_is_the_mean_over_all_pixels_of_the_error_inside(loss, power):
    image = torch.zeros(1, 1, 4, 4)
    foreground = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    foreground[..., :2, :] = True
    objective = DAEObjective(DAE(Record()), loss=loss)
    assert objective.reconstruction_loss(image + 0.5, image, foreground).item() == pytest.approx(0.5**power / 2)


def test_noise_has_the_published_strength():
    network, image = Record(), torch.ones(32, 1, 128, 128)
    torch.manual_seed(0)
    DAEObjective(DAE(network))(image)
    assert (network.seen - image).std().item() == pytest.approx(0.135, abs=0.005)


def test_resolution_of_the_noise_is_drawn_per_batch():
    network, image = Record(), torch.ones(1, 1, 8, 8)
    objective = DAEObjective(DAE(network), noise_resolutions=(1, 8))
    torch.manual_seed(0)
    flat = 0
    for _ in range(40):
        objective(image)
        flat += (network.seen == network.seen[0, 0, 0, 0]).all().item()  # one cell: the same everywhere
    assert 10 < flat < 30


def test_training_teaches_to_remove_the_noise(check_training):
    torch.manual_seed(0)
    detector = DAE(WeightStandardisedUNet(1, (8, 16), (2, 4)))
    objective, image = DAEObjective(detector, noise_resolutions=(4,)), slices(4)
    check_training(objective, image, below=0.3, steps=40)
