"""THOR against its reference arrays (golden/thor/README.md), the traps of its published code, and the contract."""

import numpy as np
import pytest
import torch
from arrays import generators, golden, slices
from monai.networks.nets import DiffusionModelUNet
from scipy import ndimage
from stubs import Stub
from torch import nn
from torch.nn.functional import avg_pool2d

from common.bundle import BUNDLES_DIR, run_inference
from common.diffusion.simplex import SimplexNoise
from common.errors import BundleError, SettingError
from common.methods.auto_ddpm import SSIMMap
from common.methods.ddpm import DDPM, gaussian_noise
from common.methods.thor import THOR, Sampling, THORObjective, harmonic_mean
from common.weights import load_into, load_weights, save_weights

FAST = {"level": 30, "num_inference_steps": 4, "window": 5}


class ToyMap(nn.Module):
    """The perceptual map of the golden arrays; remembers its calls."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, a, b):
        self.calls.append((a, b))
        return 0.8 * avg_pool2d((a - b).abs(), 3, stride=1, padding=1)


class Fixed(nn.Module):
    """A perceptual map that is given."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, a, b):
        return self.value


def unet(channels=1):
    torch.manual_seed(0)
    network = DiffusionModelUNet(2, channels, channels, 1, (8, 16), (False, False), norm_num_groups=4)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network


def tiny(channels=1, **settings):
    detector = THOR(unet(channels), **{"perceptual": SSIMMap(5), **FAST, **settings}).eval()
    detector.threshold.fill_(0.05)
    return detector


# --- against the reference ---


@pytest.mark.parametrize("scale", ["fixed", "image"])
def test_whole_run(scale):
    g = golden("thor/run")
    mode = {"fixed": "recommended", "image": "recommended_image"}[scale]
    harmonise, collect = g["harmonise"].tolist(), g["collect"].tolist()
    settings = {"level": int(g["level"]), "harmonise": harmonise, "collect": collect, "scale": scale}
    detector = THOR(
        Stub(),
        perceptual=ToyMap(),
        forward_noise=lambda x, t, generators=None: g["n0"],
        reverse_noise=lambda x, t, generators=None: g["step_noise"][int(g["level"]) - int(t[0])],
        **settings,
    )
    detector.threshold.fill_(float(g["fixed_scale"]))
    found, scaled = [], detector.scaled
    detector.scaled = lambda c, t: found.append(scaled(c, t)) or found[-1]
    detection = detector.detect(g["x"], torch.ones_like(g["x"], dtype=torch.bool))
    assert [int(t[0]) for _, t in detector.unet.calls] == list(range(12, -1, -1))
    assert len(detector.perceptual.calls) == len(collect)
    torch.testing.assert_close(torch.stack(found), g[f"{mode}_a"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(detection.reconstruction, g[f"{mode}_reconstruction"], atol=1e-4, rtol=0)
    torch.testing.assert_close(detection.anomaly_map, g[f"{mode}_map"], atol=1e-4, rtol=0)
    torch.testing.assert_close(detection.score.double(), g[f"{mode}_score"], atol=1e-5, rtol=0)
    if scale == "fixed":
        masks = torch.stack([detector.mask(a) for a in found])
        torch.testing.assert_close(masks, g["recommended_mask"], atol=1e-4, rtol=0)


def test_from_perceptual_map_to_mask():
    g = golden("thor/guidance_step")
    detector = THOR(Stub(), perceptual=Fixed(g["S"]))
    c = detector.disagreement(Sampling(g["x"], g["n0"], g["x"], []), detector.to_network(g["x0_hat"]))
    torch.testing.assert_close(c, g["product"], atol=1e-5, rtol=0)
    assert c[0, 0, 10, 8].item() == pytest.approx(0.0902887, abs=1e-6)
    detector.threshold.fill_(float(g["fixed_scale"]))
    torch.testing.assert_close(detector.scaled(c, 50).clamp(max=1), g["a_fixed"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(detector.mask(detector.scaled(c, 50)), g["mask13_fixed"], atol=1e-4, rtol=0)
    detector.scale = "image"
    a = detector.scaled(c, 50)
    torch.testing.assert_close(a, g["a_image"], atol=1e-5, rtol=0)
    torch.testing.assert_close(detector.closed(a), g["closing13"], atol=1e-5, rtol=0)
    torch.testing.assert_close(detector.mask(a), g["mask13"], atol=1e-5, rtol=0)
    assert detector.mask(a)[0, 0, 10, 8].item() == pytest.approx(0.991290, abs=1e-5)
    detector.window = 7
    torch.testing.assert_close(detector.mask(a), g["mask7"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("renoise", "expected"), [("next", "renoised_tm1"), ("t", "renoised_t")])
def test_harmonised_image_is_noised_with_the_noise_of_the_start(renoise, expected):
    g = golden("thor/guidance_step")
    detector = THOR(Stub(), level=60, harmonise=[50], renoise=renoise)
    detector.mask = lambda scaled: g["mask13"]
    state = Sampling(g["x"], g["n0"], torch.zeros_like(g["x"]), [])
    detector.advance(state, detector.to_network(g["x0_hat"]), g["a_image"], int(g["t"]), int(g["t"]) - 1)
    torch.testing.assert_close(state.x_t, g[expected], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("symmetric", "expected"), [(True, "harmonised"), (False, "harmonised_01space")])
def test_harmonised_image_keeps_the_range_of_the_network(symmetric, expected):
    """The reference clips [-1, 1] to [0, 1]: what is darker than mid-grey becomes mid-grey."""
    g = golden("thor/guidance_step")
    detector = THOR(Stub(), symmetric=symmetric)
    result = detector.to_network(detector.harmonised(g["x"], g["x0_hat"], g["mask13"]))
    torch.testing.assert_close(result, g[expected], atol=1e-5, rtol=0)
    if symmetric:
        assert result.min() < -0.9
        assert (result - g["harmonised_clamp01"]).abs().max() > 0.9


def test_harmonic_mean():
    g = golden("thor/final_map")
    result = harmonic_mean(g["stack"])
    torch.testing.assert_close(result, g["hmean"], atol=1e-6, rtol=1e-5)
    assert (result[(g["stack"] == 0).any(dim=0)] == 0).all()
    torch.testing.assert_close(result.clamp(max=0.999), g["clipped"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(result.clamp(max=0.999).mean(dim=(1, 2, 3)).double(), g["score_mean"], atol=1e-6, rtol=0)


# --- the traps of the published code ---


def test_background_stays_black_under_harmonising():
    """What the network sees after a step that agrees everywhere is the slice, noised; also where it is black."""
    image, noise = slices(), torch.randn(slices().shape, generator=torch.Generator().manual_seed(0))
    seen = THOR(Stub(), perceptual=Fixed(torch.zeros_like(image)), forward_noise=lambda *_: noise, **FAST)
    seen.detect(image)
    for x_t, times in seen.unet.calls:
        t = int(times[0])
        alpha_bar = seen.scheduler.alphas_cumprod[t]
        x = (x_t - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()
        assert t in (20, 30) or (x[image == 0] + 1).abs().max() < 1e-4, t
    assert [int(t[0]) for _, t in seen.unet.calls] == [30, 20, 10, 0]


def test_filters_run_within_a_slice_only():
    """The reference's Gaussian filter runs over the batch too."""
    g = golden("thor/guidance_step")
    detector = THOR(Stub(), perceptual=Fixed(g["S"]))
    state = Sampling(g["x"], g["n0"], g["x"], [])
    together = detector.disagreement(state, detector.to_network(g["x0_hat"]))
    assert (together - g["product_all_axes"]).abs().max() > 0.01
    for i in range(3):
        detector.perceptual.value = g["S"][i : i + 1]
        one = Sampling(*(v[i : i + 1] for v in (g["x"], g["n0"], g["x"])), [])
        alone = detector.disagreement(one, detector.to_network(g["x0_hat"][i : i + 1]))
        torch.testing.assert_close(alone[0], together[i], atol=1e-7, rtol=0)
        smooth = ndimage.gaussian_filter(g["S"][i, 0].numpy(), 2.0, mode="reflect")
        expected = np.clip(smooth, 0, 1) * (g["x"] - g["x0_hat"]).abs()[i, 0].numpy()
        np.testing.assert_allclose(alone[0, 0].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("scale", ["fixed", "image"])
def test_slice_gives_the_same_alone_and_in_any_batch(check_batches, scale):
    check_batches(tiny(scale=scale), slices())


def test_healthy_slice_stays_low_with_the_fixed_scale_only():
    """Divided by its own maximum, the map of every slice reaches the top at each step."""
    healthy = [slices(2)]
    for scale, low in (("fixed", True), ("image", False)):
        detector = tiny(scale=scale, perceptual=None, num_inference_steps=1)
        detector.fit_threshold(healthy)
        highest = detector.detect(healthy[0] * 1.0, seeds=torch.tensor([0, 1])).anomaly_map
        share = (highest >= 0.99).double().mean().item()
        faint = THOR(Stub(lambda x, t: x * 0), scale=scale, level=1, num_inference_steps=1, sigma_px=0.0)
        faint.threshold.fill_(0.5)
        top = faint.detect(healthy[0]).anomaly_map.max()
        assert (top < 0.2) if low else (top == 0.999), scale
        assert share < 0.02


@pytest.mark.parametrize(
    ("settings", "calls", "maps"),
    [
        ({"level": 350, "harmonise": [300, 150, 50], "collect": range(0, 351, 50)}, 351, 8),
        ({"level": 250, "harmonise": [200, 150, 100, 50], "collect": range(0, 251, 50)}, 251, 6),
        ({"level": 300, "num_inference_steps": 7, "harmonise": [250, 150, 50]}, 7, 7),
        ({"level": 300, "num_inference_steps": 4}, 4, 4),
        ({"level": 300, "num_inference_steps": 1}, 1, 1),
    ],
)
def test_calls_of_the_network_and_maps(settings, calls, maps):
    """Those of the two published variants, and of coarse sampling."""
    settings = {key: list(value) if isinstance(value, range) else value for key, value in settings.items()}
    detector = THOR(Stub(), perceptual=ToyMap(), **settings)
    detector.detect(slices(1))
    assert len(detector.unet.calls) == calls
    assert len(detector.perceptual.calls) == maps


def test_what_is_harmonised_is_collected():
    detector = THOR(Stub(), harmonise=[300, 70], collect=[350, 0])
    assert detector.collect == {350, 300, 70, 0}
    assert THOR(Stub(), level=300, num_inference_steps=4).harmonise == {200, 100}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"level": 350, "max_timestep": 350}, "index 350 is not trained, .* below 350; choose a level of at most 349"),
        ({"level": 1000}, "index 1000 is outside the schedule"),
        ({"harmonise": [400]}, "index 400 is not among the 351 that are sampled at; choose among 350 to 0"),
        ({"level": 300, "num_inference_steps": 4, "harmonise": [150]}, "choose among 300, 200, 100, 0"),
        ({"level": 300, "num_inference_steps": 4, "collect": [250]}, "collect: index 250 is not among the"),
        ({"harmonise": [], "collect": []}, "no step is collected"),
        ({"window": 12}, "choose an odd window"),
        ({"sigma_px": -1.0}, "sigma of 0 or more"),
        ({"scale": "batch"}, "'fixed' or 'image'"),
        ({"noise": "perlin"}, "'gaussian' or 'simplex'"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(SettingError, match=message) as caught:
        THOR(Stub(), **settings)
    assert "\n" not in str(caught.value)


def test_levels_up_to_the_last_trained_index():
    assert THOR(Stub(), level=349, max_timestep=350).start == 349


# --- the contract and the options ---


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"scale": "image", "renoise": "t"},
        {"perceptual": None, "symmetric": False, "median_size": 3},
        {"num_inference_steps": None, "level": 6, "harmonise": [4, 2], "collect": [6, 0]},
        {"noise": "simplex", "eta": 1.0, "level": 300},
    ],
)
def test_detection(check_detection, channels, settings):
    detection = check_detection(tiny(channels, **settings), slices(channels=channels), above=1e-4)
    torch.testing.assert_close(detection.score, detection.anomaly_map.mean(dim=(1, 2, 3)))


def test_result_depends_on_the_seed_alone(check_seeds):
    check_seeds(tiny(eta=1.0), slices(1), differ=1e-4)


@pytest.mark.parametrize(("noise", "kind"), [("gaussian", gaussian_noise), ("simplex", SimplexNoise())])
def test_noise_of_the_start_is_drawn_once_and_used_again(noise, kind):
    image = slices(2)
    detector = THOR(Stub(), noise=noise, perceptual=Fixed(torch.zeros_like(image)), **FAST)
    detector.detect(image, seeds=torch.tensor([3, 4]))
    x, t = image * 2 - 1, torch.full((2,), 30)
    start = kind(x, t, generators(3, 4))
    for index, (x_t, t) in enumerate(detector.unet.calls):
        if index != 1:  # which a reverse step leads to, as the first step is not harmonised
            expected = detector.add_noise(x, t, start)
            torch.testing.assert_close(x_t, expected, atol=1e-5, rtol=0)


def test_slice_equal_to_its_prediction_has_no_map():
    image = slices(2)
    perfect = Stub()
    detector = THOR(perfect, perceptual=ToyMap(), **FAST)
    perfect.predict = lambda x, t: (
        (x - detector.scheduler.alphas_cumprod[int(t[0])].sqrt() * (image * 2 - 1))
        / (1 - detector.scheduler.alphas_cumprod[int(t[0])]).sqrt()
    )
    detection = detector.detect(image)
    assert detection.anomaly_map.max() < 1e-6
    torch.testing.assert_close(detection.reconstruction, image, atol=1e-4, rtol=0)


@pytest.mark.parametrize("steps", [None, 3])
def test_without_harmonising_the_reconstruction_is_that_of_ddpm(steps):
    settings = {"level": 6, "num_inference_steps": steps, "eta": 1.0}
    thor = THOR(unet(), harmonise=[], perceptual=None, **settings).eval()
    ddpm = DDPM(unet(), **settings).eval()
    torch.testing.assert_close(thor.detect(slices()).reconstruction, ddpm.detect(slices()).reconstruction)


def test_fitted_scales_are_exceeded_by_few_healthy_pixels_in_any_batches():
    detector, image = tiny(window=3), slices(8)
    detector.fit_threshold(image.split(3))
    fitted = detector.threshold.clone()
    assert set(fitted.nonzero().flatten().tolist()) == detector.collect == {30, 20, 10, 0}
    detector.fit_threshold([image])
    torch.testing.assert_close(detector.threshold, fitted, atol=1e-5, rtol=1e-4)
    state, shares = detector.begin(image, generators(*range(8))), []
    for t, t_prev in detector.steps:
        x0 = detector.clean(state, t)
        a = detector.scaled(detector.disagreement(state, x0), t)
        shares.append((a[image > 0] > 1 + 1e-4).double().mean().item())
        detector.advance(state, x0, a, t, t_prev)
    assert max(shares) <= 0.001
    assert all(detector.scaled(torch.full((1, 1, 1, 1), float(fitted[t])), t) == pytest.approx(1) for t in (30, 0))


def test_published_scale_needs_no_fit():
    detector = tiny(scale="image")
    before = detector.threshold.clone()
    detector.fit_threshold([slices()])
    assert torch.equal(detector.threshold, before)


def test_weights_of_ddpm_are_read_and_ask_for_a_calibration(tmp_path):
    """As do its own weights at an index that they were not calibrated at; the published scale needs none."""
    ddpm, detector = DDPM(unet()), tiny()
    save_weights({**ddpm.state_dict()}, tmp_path / "ddpm.pt")
    load_into(detector, tmp_path / "ddpm.pt")
    detector.eval()
    with pytest.raises(BundleError, match=r"at index 30; calibrate them .*, or give --scale=image") as caught:
        detector.detect(slices())
    assert "\n" not in str(caught.value)
    published = tiny(scale="image")
    load_into(published, tmp_path / "ddpm.pt")
    assert published.detect(slices()).anomaly_map.max() > 0.1
    detector.fit_threshold([slices()])
    detector.detect(slices())
    save_weights(detector.state_dict(), tmp_path / "thor.pt")
    same, other = tiny(), tiny(level=40)
    for reader in (same, other):
        load_into(reader, tmp_path / "thor.pt")
    assert torch.equal(same.threshold, detector.threshold)
    with pytest.raises(BundleError, match="at index 40"):
        other.detect(slices())


def test_training_is_that_of_ddpm():
    objective = THORObjective(tiny(perceptual=None))
    objective(slices(), slices() > 0)["loss"].backward()
    assert all(p.grad is not None for p in objective.parameters())


def test_calibration_makes_its_weights_of_those_of_ano_ddpm(cohort, tmp_path):
    """The command of the model card, with one seed, on the ten slices of a thin brain."""
    settings = {"num_seeds": 1, "preprocessing::brain_volume_ml": [1, 2300]}
    source, output = BUNDLES_DIR / "ano_ddpm" / "models" / "model.pt", tmp_path / "model.pt"
    paths = {"cohort": str(cohort), "weights": str(source), "task::output": str(output), "device": torch.device("cpu")}
    run_inference("thor", ["inference.json", "calibrate.json"], **paths, **settings)
    before, after = load_weights(source), load_weights(output)
    assert after.keys() - before.keys() == {"detector.threshold"}
    assert all(torch.equal(after[name], before[name]) for name in before if name.startswith("detector."))
    assert after["detector.threshold"].nonzero().flatten().tolist() == [0, 250]
    assert (after["calibration.threshold"] > 0) & (after["calibration.threshold"] != before["calibration.threshold"])
