"""f-AnoGAN against the golden arrays (golden/f_anogan/README.md), its two stages, and the contract of a method."""

import pytest
import torch
from arrays import golden, slices
from torch import nn

from common.errors import ImageShapeError, SettingError
from common.methods.f_anogan import WGAN, FAnoGAN, IZIFObjective, WGANGPObjective, gradient_penalty
from common.networks.residual_gan import Generator, ResidualEncoder


def tiny(**settings):
    torch.manual_seed(0)
    gan = WGAN(Generator(4, (8, 8, 8), size=16), ResidualEncoder(channels=(8, 8, 8), size=16))
    return FAnoGAN(gan, ResidualEncoder(4, "batch", (8, 8, 8), size=16), size=16, **settings).eval()


class Given(nn.Module):
    """A network whose outputs are given, in the order of its calls."""

    def __init__(self, *outputs):
        super().__init__()
        self.outputs, self.calls = list(outputs), []

    def forward(self, x):
        self.calls.append(x)
        return self.outputs[len(self.calls) - 1]

    features = forward


def parameters_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(module, before):
    return any(not torch.equal(value, before[name]) for name, value in module.state_dict().items())


# --- against the golden arrays ---


@pytest.mark.parametrize(("kappa", "key"), [(1.0, "score"), (0.1, "score_kappa_0p1"), (0.0, "image_mse")])
def test_score(kappa, key):
    """Means over pixels and features, not sums."""
    g = golden("f_anogan/score")
    gan = WGAN(Given(g["x_hat"]), Given(g["f"], g["f_hat"]))
    detector = FAnoGAN(gan, Given(g["z"]), size=8, kappa=kappa)
    torch.testing.assert_close(detector.losses(g["x"], g["x_hat"]), g[key], atol=1e-8, rtol=1e-8)
    assert detector.gan.critic.calls[0] is g["x"]


def test_loss_of_the_encoder_is_the_mean_score():
    g = golden("f_anogan/score")
    detector = FAnoGAN(WGAN(Given(g["x_hat"]), Given(g["f"], g["f_hat"])), Given(g["z"]), size=8)
    losses = IZIFObjective(detector)((g["x"] + 1) / 2)
    torch.testing.assert_close(losses["loss"], g["izif_loss"], atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(losses["image"], g["image_mse"].mean(), atol=1e-8, rtol=1e-8)


def test_map_is_the_difference_of_pixels_alone():
    g = golden("f_anogan/score")
    gan = WGAN(Given(g["x_hat"]), Given(g["f"], g["f_hat"]))
    detection = FAnoGAN(gan, Given(g["z"]), size=8).detect((g["x"] + 1) / 2, torch.ones(4, 1, 8, 8) > 0)
    expected = g["residual_in_0_1_units"].float()
    torch.testing.assert_close(detection.anomaly_map, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(detection.score, g["score"], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(detection.reconstruction, ((g["x_hat"] + 1) / 2).float(), atol=1e-6, rtol=0)


def test_code_is_a_tanh():
    g = golden("f_anogan/encoder_output")
    for scale, key in ((1.0, "tanh"), (3.0, "tanh3"), (0.5, "tanh05")):
        torch.testing.assert_close(tiny(code_scale=scale).code(g["pre"]), g[key])


class GoldenCritic(nn.Module):
    """D(x) = sum(w x) + 0.5 sum(q x^2) + cos(sum(v x)), of the golden arrays."""

    def __init__(self, g):
        super().__init__()
        self.w, self.q, self.v = (g[key].float() for key in "wqv")

    def forward(self, x):
        total = (self.w * x + 0.5 * self.q * x.square()).flatten(1).sum(dim=1)
        return total + torch.cos((self.v * x).flatten(1).sum(dim=1))


def test_penalty_is_of_the_norm_over_all_pixels():
    g = golden("f_anogan/wgan_gp")
    penalty = gradient_penalty(GoldenCritic(g), g["interpolate"].float())
    torch.testing.assert_close(penalty.double(), g["penalty"], atol=1e-4, rtol=1e-5)
    assert abs(penalty.item() - float(g["BAUR_penalty_axis1_only"])) > 1


def test_losses_of_both_players(monkeypatch):
    g = golden("f_anogan/wgan_gp")
    generator = Given(g["x_fake"].float(), g["x_fake"].float())
    generator.code_size = 2
    generator.unused = nn.Parameter(torch.zeros(1))
    detector = FAnoGAN(WGAN(generator, GoldenCritic(g)), nn.Identity(), size=6)
    objective = WGANGPObjective(detector, penalty=float(g["lambda_"]))
    monkeypatch.setattr(torch, "rand", lambda *size, **settings: g["alpha"].float().view(4, 1, 1, 1))
    losses = objective.eval()((g["x_real"].float() + 1) / 2)
    torch.testing.assert_close(losses["loss"].double(), g["critic_loss"], atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(losses["distance"].double(), (g["d_real"] - g["d_fake"]).mean(), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(objective.generator_loss(4).double(), g["generator_loss"], atol=1e-4, rtol=1e-5)


# --- the first stage ---


def test_gradients_stop_at_the_other_player():
    detector = tiny()
    generator, critic = detector.gan.generator, detector.gan.critic
    objective = WGANGPObjective(detector, critic_steps=2).train()
    objective(slices())["loss"].backward()
    assert all(p.grad is not None for p in critic.parameters())
    assert all(p.grad is None for p in generator.parameters())
    critic.zero_grad(set_to_none=True)
    objective.generator_loss(8).backward()
    assert all(p.grad is None for p in critic.parameters())
    assert all(p.grad is not None for p in generator.parameters())
    assert all(p.grad is None for p in detector.encoder.parameters())


def test_generator_learns_at_every_fifth_step_and_the_critic_at_each():
    detector = tiny()
    objective, parts = WGANGPObjective(detector).train(), (detector.gan.critic, detector.gan.generator)
    optimizer = torch.optim.Adam(objective.parameters(), lr=1e-3, betas=(0.0, 0.9))
    learned = []
    for _ in range(10):
        before = [{name: p.detach().clone() for name, p in part.named_parameters()} for part in parts]
        optimizer.zero_grad(set_to_none=True)
        objective(slices())["loss"].backward()
        optimizer.step()
        pairs = zip(parts, before, strict=True)
        learned.append(
            [any(not torch.equal(p, old[name]) for name, p in part.named_parameters()) for part, old in pairs]
        )
    assert learned == ([[True, False]] * 4 + [[True, True]]) * 2


def test_validation_does_not_count_and_needs_no_gradients():
    objective = WGANGPObjective(tiny()).eval()
    with torch.no_grad():
        losses = objective(slices())
    assert int(objective.calls) == 0
    assert losses["penalty"] > 0
    assert losses["spread"] > 0
    assert not losses["loss"].isnan()


def test_penalty_is_in_float32_under_autocast():
    objective = WGANGPObjective(tiny()).train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = objective(slices())
    assert losses["penalty"].dtype == torch.float32
    losses["loss"].backward()
    assert all(p.grad.isfinite().all() for p in objective.detector.gan.critic.parameters())


@pytest.mark.parametrize("critic_steps", [0, -1])
def test_critic_must_learn(critic_steps):
    with pytest.raises(SettingError, match="at least 1"):
        WGANGPObjective(tiny(), critic_steps)


# --- the second stage ---


def test_encoder_learns_and_the_gan_stays_as_it_was(check_training):
    """Its weights, and the statistics of its batch norm."""
    detector, images = tiny(), slices(4)
    objective = IZIFObjective(detector).train()
    assert not any(module.training for module in detector.gan.modules())
    assert detector.encoder.training
    before = parameters_of(detector.gan)
    check_training(objective, images, below=0.9, steps=20, ends=(1, 1))
    assert not changed(detector.gan, before)


# --- the contract ---


def test_detection(check_detection):
    detection = check_detection(tiny(), slices())
    assert detection.score is not None


def test_slice_gives_the_same_alone_and_in_any_batch(check_batches):
    check_batches(tiny(), slices(), score_rtol=1e-4)


def test_detection_draws_nothing():
    detector, state = tiny(), torch.get_rng_state()
    one, other = (detector.detect(slices(), seeds=torch.tensor([s] * 3)).anomaly_map for s in (1, 2))
    assert torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_slices_of_another_size_are_refused():
    with pytest.raises(ImageShapeError, match="give 16 x 16"):
        tiny().detect(slices(size=32))
