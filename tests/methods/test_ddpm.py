"""Partial diffusion against the reference programs (golden/ddpm and golden/ano_ddpm), and the contract of a method."""

from itertools import pairwise

import pytest
import torch
from arrays import golden, slices
from monai.networks.nets import DiffusionModelUNet
from monai.networks.schedulers import DDPMScheduler
from stubs import Stub
from torch import nn

from common.detection.method import median, noise_like
from common.errors import ImageShapeError, SettingError
from common.methods.ddpm import DDPM, DDPMObjective, gaussian_noise, sampling_steps


class LevelL1(DDPM):
    """As AnoDDPM counts."""

    first_index = "L-1"


class Given:
    """Noise that was drawn before, one array after the other; remembers the indices."""

    def __init__(self, arrays):
        self.arrays = list(arrays)
        self.times = []

    def __call__(self, x, t, generators=None):
        self.times.append(t.tolist())
        return self.arrays.pop(0).to(x).expand_as(x)


def unet(channels=1):
    """A tiny U-Net; all weights are random, since a head that starts at zero would hide mistakes."""
    torch.manual_seed(0)
    network = DiffusionModelUNet(
        2, channels, channels, (1, 1), (8, 16), (False, True), norm_num_groups=4, num_head_channels=8
    )
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network


def tiny(channels=1, **settings):
    return DDPM(unet(channels), **{"level": 40, "num_inference_steps": 4, **settings}).eval()


# --- against the references ---


@pytest.mark.parametrize("t", [0, 1, 2, 50, 200, 500, 999])
def test_forward_and_reverse_step(t):
    g = golden("ddpm/steps")
    detector = DDPM(Stub(lambda x, _: g["model_eps"]), reverse_noise=Given([g["noise"]]))
    times = torch.tensor([t, t])
    torch.testing.assert_close(detector.add_noise(g["x0"], times, g["noise"]), g[f"addnoise_t{t}"], atol=1e-6, rtol=0)
    x0 = detector.predict_x0(g["x_t"], t, g["model_eps"])
    torch.testing.assert_close(x0, g[f"step_t{t}_pred_x0_clipped"], atol=1e-6, rtol=0)
    torch.testing.assert_close(detector.step(g["x_t"], t, t - 1, []), g[f"step_t{t}_prev"], atol=1e-6, rtol=0)


def test_step_is_that_of_monai():
    g, scheduler = golden("ddpm/steps"), DDPMScheduler(variance_type="fixed_large", prediction_type="v_prediction")
    noise = torch.randn(g["x_t"].shape, generator=torch.Generator().manual_seed(5))
    detector = DDPM(Stub(lambda x, _: g["model_eps"]), scheduler, reverse_noise=Given([noise]))
    expected, _ = scheduler.step(g["model_eps"], 120, g["x_t"], generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(detector.step(g["x_t"], 120, 119, []), expected, atol=1e-6, rtol=0)


def test_walk_up_and_down_of_the_reference():
    g, stub = golden("ddpm/steps"), Stub()
    noise = Given(g["partial_noises"])
    detector = DDPM(stub, level=5, forward_noise=noise, reverse_noise=noise, symmetric=False)
    result = detector.reconstruct(g["x0"], [])
    torch.testing.assert_close(stub.calls[0][0], g["partial_x_L"], atol=1e-6, rtol=0)
    states = [x for x, _ in stub.calls[1:]] + [result]
    torch.testing.assert_close(torch.stack(states), g["partial_traj"], atol=2e-6, rtol=0)
    assert [t.tolist() for _, t in stub.calls] == [[t, t] for t in (5, 4, 3, 2, 1, 0)]
    assert noise.times == [[t, t] for t in (5, 5, 4, 3, 2, 1)]  # none is drawn at 0


@pytest.mark.parametrize("t", [0, 1, 50, 199, 249, 999])
def test_step_with_large_variance(t):
    g = golden("ano_ddpm/steps")
    scheduler = DDPMScheduler(variance_type="fixed_large")
    detector = DDPM(Stub(lambda x, _: g["model_eps"]), scheduler, reverse_noise=Given([g["noise"]]))
    expected = g[f"t{t}_sample"]
    # the reference's schedule is in float64, which matters where 1 - alpha_bar is small
    torch.testing.assert_close(detector.step(g["x_t"], t, t - 1, []), expected, atol=3e-4 if t < 2 else 5e-6, rtol=0)


def test_level_that_stands_for_the_index_before():
    g, stub = golden("ano_ddpm/forward_backward_gauss_L6"), Stub()
    noise = Given(g["noises"])
    scheduler = DDPMScheduler(variance_type="fixed_large")
    detector = LevelL1(stub, scheduler, level=6, forward_noise=noise, reverse_noise=noise)
    result = detector.reconstruct(g["x0"], [])
    assert [int(t) for _, t in stub.calls] == [5, 4, 3, 2, 1, 0]
    states = torch.stack([x for x, _ in stub.calls] + [result])
    torch.testing.assert_close(states, g["trajectory"][1:], atol=5e-4, rtol=0)


# --- sampling steps ---


@pytest.mark.parametrize(("method", "calls"), [(DDPM, 201), (LevelL1, 200)])
def test_calls_of_the_full_walk(method, calls):
    detector = method(Stub(), level=200)
    assert detector.steps == [(t, t - 1) for t in range(calls - 1, -1, -1)]


@pytest.mark.parametrize("count", [1, 2, 7, 10, 25, 200, 201])
def test_strided_walk_stays_on_its_own_grid(count):
    steps = sampling_steps(200, -1, count)
    assert len(steps) == count
    assert steps[0][0] == 200
    assert steps[-1][1] == -1
    assert all(t_prev == following for (_, t_prev), (following, _) in pairwise(steps))
    strides = [t - t_prev for t, t_prev in steps[:-1]]
    assert not strides or 0 < min(strides) <= max(strides) <= min(strides) + 1


def test_strided_walk_by_example():
    assert sampling_steps(200, -1, 5) == [(200, 150), (150, 100), (100, 50), (50, 0), (0, -1)]
    assert sampling_steps(50, 0, 3) == [(50, 26), (26, 1), (1, 0)]
    assert sampling_steps(3, 0, None) == [(3, 2), (2, 1), (1, 0)]


@pytest.mark.parametrize("count", [1, 3, 10, 41])
def test_ddim_retraces_the_forward_process_of_an_exact_prediction(count):
    detector = tiny(num_inference_steps=count)
    x0, eps = torch.rand(2, 2, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    detector.unet, detector.forward_noise = Stub(lambda x, t: eps), Given([eps])
    torch.testing.assert_close(detector.reconstruct(x0, []), x0, atol=1e-4, rtol=0)
    states = [detector.add_noise(x0, t, eps) for _, t in detector.unet.calls]
    torch.testing.assert_close(torch.stack([x for x, _ in detector.unet.calls]), torch.stack(states), atol=1e-4, rtol=0)


def test_ddim_with_eta_1_is_the_ancestral_step():
    g = golden("ddpm/steps")
    detector = DDPM(Stub(), eta=1.0)
    for t in (1, 50, 500):
        x0 = detector.predict_x0(g["x_t"], t, g["model_eps"])
        ddim, posterior = detector.ddim(x0, g["x_t"], t, t - 1), detector.posterior(x0, g["x_t"], t)
        torch.testing.assert_close(ddim, posterior, atol=5e-4, rtol=1e-3)


def test_ddim_draws_noise_only_for_eta():
    for eta, times in ((0.0, []), (0.5, [[40] * 3, [27] * 3, [13] * 3])):
        noise = Given(torch.randn(3, 3, 1, 16, 16))
        tiny(eta=eta, reverse_noise=noise).detect(slices())
        assert noise.times == times


# --- maps ---


def test_residuals():
    image, wrong = torch.tensor([[0.5, 0.2], [1.0, 0.0]]), torch.tensor([[0.1, 0.2], [0.5, 0.1]])
    image, wrong = image.view(1, 2, 1, 2), wrong.view(1, 2, 1, 2)
    absolute = DDPM(Stub()).difference(image, wrong)
    squared = DDPM(Stub(), residual="squared").difference(image, wrong)
    torch.testing.assert_close(absolute.flatten(), torch.tensor([0.45, 0.05]))
    torch.testing.assert_close(squared.flatten(), torch.tensor([0.205, 0.005]))


@pytest.mark.parametrize(("symmetric", "lowest"), [(True, -1.0), (False, 0.0)])
def test_range_that_the_network_sees(symmetric, lowest):
    stub = Stub(lambda x, t: torch.zeros_like(x))
    detector = LevelL1(stub, level=1, forward_noise=Given([torch.zeros(1)]), symmetric=symmetric)
    detection = detector.detect(slices())
    seen = stub.calls[0][0] / 0.9999**0.5
    torch.testing.assert_close(seen.min().item(), lowest)
    torch.testing.assert_close(seen, slices() * (1 - lowest) + lowest)
    torch.testing.assert_close(detection.reconstruction, slices(), atol=3e-4, rtol=0)  # the float32 of the schedule
    assert detection.anomaly_map.max() < 3e-4


def test_median_reflects_at_the_border():
    error = torch.zeros(1, 1, 8, 8)
    error[:, :, [0, 3]] = 1.0
    assert median(error, 3).max() == 0  # the window of the first row holds it once and the second row twice
    error[:, :, 1] = 1.0
    assert median(error, 3)[..., 0, :].min() == 1
    assert torch.equal(median(error, DDPM(Stub()).median_size), error)


# --- the contract ---


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("settings", [{}, {"num_inference_steps": None, "level": 4}, {"median_size": 3}])
def test_detection(check_detection, channels, settings):
    check_detection(tiny(channels, **settings), slices(channels=channels))


@pytest.mark.parametrize("settings", [{}, {"num_inference_steps": None, "level": 4}])
def test_slice_gives_the_same_alone_and_in_any_batch(check_batches, settings):
    check_batches(tiny(**settings), slices())


def test_result_depends_on_the_seed_alone(check_seeds):
    check_seeds(tiny(), slices(1))


def test_gaussian_noise_is_that_of_the_generators():
    x, t = torch.zeros(2, 1, 4, 4), torch.tensor([3, 3])
    seeded = [[torch.Generator().manual_seed(s) for s in (1, 2)] for _ in range(2)]
    assert torch.equal(gaussian_noise(x, t, seeded[0]), noise_like(x, seeded[1]))
    assert gaussian_noise(x, t).std() > 0.5


def test_state_holds_the_network_alone():
    detector = tiny()
    assert {name.split(".")[0] for name in detector.state_dict()} == {"unet"}


@pytest.mark.parametrize(("method", "level"), [(DDPM, 1000), (DDPM, -1), (LevelL1, 0)])
def test_level_outside_the_schedule_is_refused(method, level):
    with pytest.raises(SettingError, match=r"level: index -?\d+ is outside the schedule, 0 ... 999"):
        method(Stub(), level=level)


@pytest.mark.parametrize("count", [0, -1, 42])
def test_impossible_number_of_steps_is_refused(count):
    with pytest.raises(SettingError, match=f"{count} steps do not fit the indices 40 to 0"):
        tiny(num_inference_steps=count)


def test_wrong_size_is_refused():
    with pytest.raises(ImageShapeError, match="multiples of 2"):
        tiny().detect(torch.rand(1, 1, 15, 16))


# --- the training objective ---


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_prediction_that_is_right_costs_nothing_and_means_x0(kind):
    detector = DDPM(Stub(), DDPMScheduler(prediction_type=kind))
    x0, noise = torch.rand(2, 1, 4, 4) * 2 - 1, torch.randn(2, 1, 4, 4)
    t = torch.tensor([3, 500])
    alpha_bar = detector.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    velocity = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x0
    right = {"epsilon": noise, "sample": x0, "v_prediction": velocity}[kind]
    for error, loss in ((0.0, 0.0), (0.1, 0.01)):
        detector.unet = Stub(lambda x, _, error=error: right + error)
        assert DDPMObjective(detector).noise_loss(x0, t, noise).item() == pytest.approx(loss, abs=1e-6)
    x_t = detector.add_noise(x0, t, noise)
    for i in range(2):
        predicted = detector.predict_x0(x_t[i : i + 1], int(t[i]), right[i : i + 1])
        torch.testing.assert_close(predicted, x0[i : i + 1], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("max_timestep", "highest"), [(None, 999), (800, 799), (1, 0)])
def test_indices_of_training(max_timestep, highest):
    stub = Stub()
    objective = DDPMObjective(DDPM(stub), max_timestep)
    torch.manual_seed(0)
    for _ in range(8):
        objective(torch.rand(256, 1, 2, 2))
    times = torch.cat([t for _, t in stub.calls])
    assert times.min() <= highest * 0.01
    assert highest * 0.99 <= times.max() <= highest


def test_training_noises_the_image_in_the_range_of_the_network():
    stub, image = Stub(lambda x, t: torch.zeros_like(x)), slices(2)
    noise = torch.randn(2, 1, 16, 16)
    objective = DDPMObjective(DDPM(stub, forward_noise=Given([noise])))
    loss = objective(image)["loss"]
    torch.testing.assert_close(loss, (noise**2).mean())
    x_t, t = stub.calls[0]
    torch.testing.assert_close(x_t, objective.detector.add_noise(image * 2 - 1, t, noise))


def test_training_learns(check_training):
    torch.manual_seed(0)
    detector = tiny(level=1, num_inference_steps=None)
    objective, image = DDPMObjective(detector, max_timestep=1000), slices(4)
    check_training(objective, image, image > 0, below=0.75)
    assert all(p.grad is not None for p in detector.unet.parameters())
