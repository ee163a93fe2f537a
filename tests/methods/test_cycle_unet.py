"""Cycl.UNet and MMCCD against the golden arrays (golden/cycle_unet/README.md), and the contract of a method."""

import pytest
import torch
from arrays import golden, slices
from monai.bundle import ConfigParser
from monai.networks.nets import DiffusionModelUNet
from torch import nn

from common.bundle import BUNDLES_DIR
from common.errors import ImageShapeError, SettingError
from common.methods.cycle_unet import MMCCD, CycleUNet, CycleUNetObjective, MMCCDObjective, strips, to_image, to_network
from common.networks.weight_standardised_unet import WeightStandardisedUNet


class Toy(nn.Module):
    """A function in the place of a network; remembers its calls."""

    size_divisor = 1
    block_out_channels = (1,)

    def __init__(self, function):
        super().__init__()
        self.function, self.calls = function, []

    def forward(self, *inputs):
        self.calls.append(inputs)
        return self.function(*inputs)


def there(v):
    return 1.5 * torch.tanh(0.8 * v) - 0.2


def back(v):
    return torch.atanh(((v + 0.2) / 1.5).clamp(-0.99, 0.80)) / 0.8


def same(v):
    return v


def unet():
    return WeightStandardisedUNet(1, (8, 8), (4, 4))


def tiny():
    torch.manual_seed(0)
    return CycleUNet(unet(), unet()).eval()


def tiny_mmccd(**settings):
    torch.manual_seed(0)
    network = DiffusionModelUNet(2, 2, 1, 1, (8, 16), (False, False), norm_num_groups=4)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return MMCCD(network, unet(), **{"width": 8, "stride": 8, "num_inference_steps": 2, **settings}).eval()


# --- Cycl.UNet against the golden arrays ---


def test_map():
    g = golden("cycle_unet/cycle_map")
    detector = CycleUNet(Toy(there), Toy(back))
    x, brain = g["x"], g["brain"] > 0
    inside = ((x >= -3) & (x <= 3)).all(dim=(1, 2, 3))  # those that images in [0, 1] can be
    assert inside.any()
    detection = detector.detect(to_image(x[inside]), brain[inside])
    expected = (g["error"] * brain)[inside]
    torch.testing.assert_close(detection.anomaly_map, expected, atol=1e-4, rtol=1e-4)
    expected = (to_image(g["cycled"]).clamp(0, 1) * brain)[inside]
    torch.testing.assert_close(detection.reconstruction, expected, atol=1e-5, rtol=0)


def test_cycle_of_any_values():
    g, detector = golden("cycle_unet/cycle_map"), CycleUNet(Toy(there), Toy(back))
    translated = detector.there(g["x"])
    torch.testing.assert_close(translated, g["translated"], atol=1e-5, rtol=0)
    torch.testing.assert_close(detector.back(translated), g["cycled"], atol=1e-4, rtol=1e-4)
    found, _ = detector._detect(to_image(g["x"]), g["brain"] > 0, [])
    torch.testing.assert_close(found, g["error"], atol=1e-3, rtol=1e-3)


def test_losses():
    g = golden("cycle_unet/loss")
    images = torch.cat([to_image(g["a"]), to_image(g["b"])], dim=1)
    answers = {"there": g["pred_b"], "back": g["pred_a"]}
    detector = CycleUNet(Toy(lambda v: answers["there"]), Toy(lambda v: answers["back"]))
    losses = CycleUNetObjective(detector)(images, g["foreground"])
    for key, name in (("there", "loss_ab"), ("back", "loss_ba")):
        torch.testing.assert_close(losses[key].double(), g[name], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(losses["loss"], losses["there"] + losses["back"])
    torch.testing.assert_close(detector.there.calls[0][0], g["a"], atol=1e-5, rtol=0)
    torch.testing.assert_close(detector.back.calls[0][0], g["b"], atol=1e-5, rtol=0)  # real, not a translation
    inside = CycleUNetObjective(detector, foreground_only=True)(images, g["foreground"])
    torch.testing.assert_close(inside["there"].double(), g["loss_ab_foreground"], atol=1e-5, rtol=1e-5)


# --- its properties ---


def test_networks_that_change_nothing_find_nothing():
    image = slices()
    detection = CycleUNet(Toy(same), Toy(same)).detect(image)
    assert detection.anomaly_map.max() < 1e-10
    torch.testing.assert_close(detection.reconstruction, image)


def test_two_calls_a_batch():
    detector = CycleUNet(Toy(there), Toy(back))
    detector.detect(slices())
    assert (len(detector.there.calls), len(detector.back.calls)) == (1, 1)


def test_modalities_and_networks_exchanged_exchange_the_losses():
    images, detector = slices(channels=2), tiny()
    one = CycleUNetObjective(detector)(images)
    other = CycleUNetObjective(CycleUNet(detector.back, detector.there))(images.flip(1))
    torch.testing.assert_close(one["there"], other["back"])
    torch.testing.assert_close(one["back"], other["there"])


def test_networks_are_trained_as_if_alone():
    images, detector = slices(channels=2), tiny()
    losses = CycleUNetObjective(detector)(images)
    losses["loss"].backward()
    together = [p.grad.clone() for p in detector.there.parameters()]
    detector.zero_grad()
    CycleUNetObjective(detector)(images)["there"].backward()
    for parameter, expected in zip(detector.there.parameters(), together, strict=True):
        torch.testing.assert_close(parameter.grad, expected)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("objective", [lambda: CycleUNetObjective(tiny()), lambda: MMCCDObjective(tiny_mmccd())])
def test_training_without_pairs_is_refused(channels, objective):
    with pytest.raises(ImageShapeError, match="train on pairs"):
        objective()(slices(channels=channels))


@pytest.mark.parametrize("make", [tiny, tiny_mmccd])
def test_training_learns(check_training, make):
    detector, images = make(), slices(4, channels=2)
    objective = (CycleUNetObjective if isinstance(detector, CycleUNet) else MMCCDObjective)(detector)
    check_training(objective, images, below=0.8)


# --- the contract ---


@pytest.mark.parametrize("make", [tiny, tiny_mmccd])
def test_detection(check_detection, make):
    check_detection(make(), slices())


@pytest.mark.parametrize("make", [tiny, tiny_mmccd])
def test_slice_gives_the_same_alone_and_in_any_batch(check_batches, make):
    check_batches(make(), slices())


def test_cycle_draws_nothing():
    detector, state = tiny(), torch.get_rng_state()
    one, other = (detector.detect(slices(), seeds=torch.tensor([s] * 3)).anomaly_map for s in (1, 2))
    assert torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_diffusion_depends_on_the_seed_alone(check_seeds):
    check_seeds(tiny_mmccd(), slices(1))


# --- MMCCD against the golden arrays ---


def toy_mmccd(**settings):
    def forward(x, t):
        return 0.5 * torch.tanh(x[:, :1]) + 0.4 * x[:, 1:] - 0.1 * t.view(-1, 1, 1, 1) / 1000

    return MMCCD(Toy(forward), Toy(lambda y: 1.1 * y - 0.05), width=4, stride=2, num_inference_steps=5, **settings)


def test_strips_and_steps():
    g, detector = golden("cycle_unet/mmccd_run"), toy_mmccd()
    masks = torch.stack(strips(g["x"], detector.width, detector.stride))
    assert torch.equal(masks, 1 - g["masks"].float())
    assert torch.equal(masks.sum(dim=0), g["coverage"].float())
    assert detector.steps == g["timesteps"].tolist()
    torch.testing.assert_close(detector.scheduler.alpha_bar[detector.steps], g["alpha_bar"], atol=1e-6, rtol=1e-4)


def test_run(monkeypatch):
    g, detector = golden("cycle_unet/mmccd_run"), toy_mmccd()
    noises = iter([g["start_noise"], *g["condition_noise"].flatten(0, 1)])
    monkeypatch.setattr("common.methods.cycle_unet.noise_like", lambda reference, generators: next(noises))
    found, reconstruction = detector._detect(to_image(g["x"]), g["x"] > -3, [])
    torch.testing.assert_close(found, g["map"], atol=1e-4, rtol=1e-4)
    inside = 1 - g["masks"].float()
    expected = (inside * g["cycled"]).sum(dim=0) / g["coverage"]
    torch.testing.assert_close(reconstruction, to_image(expected), atol=1e-4, rtol=0)
    assert next(noises, None) is None
    assert len(detector.there.calls) == 16 * 5
    assert len(detector.back.calls) == 16


def test_published_strips_and_calls():
    """64 starts of columns, 64 of rows; a pixel lies in 2 to 16 strips."""
    detector = MMCCD(Toy(same), Toy(same), stride=2, num_inference_steps=100)
    masks = strips(torch.zeros(1, 1, 128, 128), detector.width, detector.stride)
    assert len(masks) * len(detector.steps) + len(masks) == 12_928
    assert detector.steps[0] == 990
    coverage = sum(masks)[0, 0]
    assert (coverage[0, 0], coverage[0, 64], coverage[64, 64], coverage[-1, -1]) == (2, 9, 16, 16)


def test_what_is_in_a_strip_is_not_told():
    detector, x = toy_mmccd(), to_network(slices())
    strip = strips(x, detector.width, detector.stride)[3]
    noises = [torch.full_like(x, 7.0)] * 5
    detector.translate(x, strip, torch.zeros_like(x), iter(noises))
    for seen, _ in detector.there.calls:
        torch.testing.assert_close(seen[:, 1:], torch.where(strip == 1, 7.0, x))


@pytest.mark.parametrize("settings", [{"stride": 17}, {"stride": 0}, {"num_inference_steps": 3}])
def test_bad_settings_are_refused(settings):
    with pytest.raises(SettingError, match="choose a"):
        MMCCD(Toy(same), Toy(same), **settings)


def test_config_trains_what_it_detects_with():
    configs = BUNDLES_DIR / "cycle_unet_glioma" / "configs"
    for name in ("train.json", "inference.json"):
        parser = ConfigParser()
        parser.read_config([configs / name, configs / "mmccd.json"])
        detector = parser.get_parsed_content("network_def").detector
        assert isinstance(detector, MMCCD)
        assert len(strips(torch.zeros(1, 1, 96, 96), detector.width, detector.stride)) == 16
        if name == "train.json":
            assert parser.get_parsed_content("objective").detector is detector
