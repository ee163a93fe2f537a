"""The Gaussian diffusion against closed forms (golden/latent_ddpm/README.md), and against what MONAI's does wrong."""

import pytest
import torch
from arrays import golden
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler

from common.diffusion.gaussian import GaussianScheduler, evenly_spaced
from common.errors import SettingError

OTHER = {"beta_start": 0.0015, "beta_end": 0.0195}
SCHEDULES = {
    "linear_1e-4_2e-2": GaussianScheduler(),
    "linear_0.0015_0.0195": GaussianScheduler(**OTHER),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule(name):
    g, scheduler = golden("latent_ddpm/schedules"), SCHEDULES[name]
    t = g["t_index"]
    torch.testing.assert_close(scheduler.beta[t], g[f"{name}_betas"], rtol=1e-6, atol=0)
    torch.testing.assert_close(scheduler.alpha_bar[t], g[f"{name}_alphas_cumprod"], rtol=1e-5, atol=0)
    one, t = torch.ones(len(t) - 1), t[1:]  # the posterior has no variance at t = 0
    weight = scheduler.kl(one, 0 * one, t)
    torch.testing.assert_close(weight.double(), g[f"{name}_kl_weight_fixed_small"][1:], rtol=1e-5, atol=0)


@pytest.mark.parametrize("t", [599, 500, 400, 1])
@pytest.mark.parametrize(
    ("variance", "key"), [("posterior", "fixed_small"), ("beta", "true_posterior_vs_beta_var")], ids=["small", "beta"]
)
def test_kl_in_closed_form_and_without_clipping(t, variance, key):
    g = golden("latent_ddpm/kl")
    kl = SCHEDULES["linear_0.0015_0.0195"].kl(g["noise"], g["eps_pred"], torch.full((2,), t), variance)
    torch.testing.assert_close(kl.double(), g[f"closed_form_{key}_t{t}_kl"], rtol=2e-5, atol=1e-8)
    if variance == "posterior":
        torch.testing.assert_close(kl, g[f"fixed_small_noclip_t{t}_kl"], rtol=5e-3, atol=2e-6)
        assert (kl - g[f"fixed_small_CLIP_monai_default_t{t}_kl"]).abs().max() > 1e-3


def test_each_sample_has_its_own_timestep():
    scheduler, generator = GaussianScheduler(), torch.Generator().manual_seed(0)
    z0, eps = torch.randn(2, 3, 2, 4, 4, generator=generator)
    t = torch.tensor([5, 700, 999])
    together = scheduler.add_noise(z0, eps, t), scheduler.kl(eps, z0, t)
    for i in range(3):
        alone = slice(i, i + 1)
        torch.testing.assert_close(scheduler.add_noise(z0[alone], eps[alone], t[alone]), together[0][alone])
        torch.testing.assert_close(scheduler.kl(eps[alone], z0[alone], t[alone]), together[1][alone])


def test_ddim_step():
    g = golden("latent_ddpm/ddim_step")
    z_prev = SCHEDULES["linear_0.0015_0.0195"].step(g["z_t"], g["eps_pred"], int(g["t"]), int(g["t_prev"]))
    torch.testing.assert_close(z_prev, g["z_prev"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("t", [999, 300, 1, 0])
def test_step_with_eta_1_is_the_ddpm_step(t):
    generator = torch.Generator().manual_seed(t)
    z_t, eps, noise = torch.randn(3, 2, 3, 4, 4, generator=generator)
    monai = DDPMScheduler(clip_sample=False)
    ours = GaussianScheduler().step(z_t, eps, t, t - 1, noise, eta=1.0)
    mean = monai.step(eps, t, z_t, generator=None)[0] if t == 0 else None
    if t > 0:  # MONAI draws the noise itself
        draws = torch.Generator().manual_seed(7)
        expected, _ = monai.step(eps, t, z_t, generator=draws)
        drawn = torch.randn(z_t.shape, generator=torch.Generator().manual_seed(7))
        ours = GaussianScheduler().step(z_t, eps, t, t - 1, drawn, eta=1.0)
        mean = expected
    torch.testing.assert_close(ours, mean, rtol=1e-3, atol=2e-3 if t == 999 else 1e-4)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_latent_outside_of_minus_one_to_one_survives(eta):
    """With the true noise sampling must return to z0, wherever it is; MONAI's default does not."""
    scheduler, z0 = GaussianScheduler(), torch.tensor([-9.0, -0.5, 0.5, 40.0]).view(1, 4, 1, 1)
    eps = torch.randn(z0.shape, generator=torch.Generator().manual_seed(0))
    z_t = scheduler.add_noise(z0, eps, torch.tensor([500]))
    steps = evenly_spaced(0, 501, 25)[::-1]
    z = scheduler.add_noise(z0, eps, torch.tensor([steps[0]]))
    for t, t_prev in zip(steps, [*steps[1:], -1], strict=True):
        alpha_bar = scheduler.alpha_bar[t]
        true = ((z - alpha_bar.sqrt() * z0) / (1 - alpha_bar).sqrt()).float()
        noise = torch.zeros_like(z0) if eta else None
        z = scheduler.step(z, true, t, t_prev, noise, eta)
    torch.testing.assert_close(z, z0, rtol=1e-4, atol=1e-4)
    clipped, _ = DDIMScheduler().step(eps, 500, z_t)
    assert (clipped - DDIMScheduler(clip_sample=False).step(eps, 500, z_t)[0]).abs().max() > 1


def test_schedule_keeps_its_precision():
    """MONAI's `add_noise` leaves the schedule in the precision of the samples."""
    scheduler = GaussianScheduler()
    half = torch.zeros(1, 1, 2, 2, dtype=torch.bfloat16)
    assert scheduler.add_noise(half, half, torch.tensor([10])).dtype == torch.bfloat16
    assert scheduler.alpha_bar.dtype == torch.float64
    monai = DDPMScheduler()
    monai.add_noise(half, half, torch.tensor([10]))
    assert monai.alphas_cumprod.dtype == torch.bfloat16


def test_grids():
    g = golden("latent_ddpm/timesteps")
    assert evenly_spaced(400, 600, 50) == g["Lprime_50_of_400_600"].tolist()
    assert evenly_spaced(400, 600, 200) == g["full_L_400_600"].tolist()
    assert evenly_spaced(0, 500, 500)[::-1] == g["ddpm_heal_from_500"].tolist()
    assert evenly_spaced(0, 500, 50)[::-1] == g["ddim50_from_500_stride10"].tolist()
    assert evenly_spaced(0, 1000, 50)[::-1] == g["generative_models_ddim_set_timesteps_50"].tolist()
    assert len(set(evenly_spaced(3, 1000, 333))) == 333


@pytest.mark.parametrize("count", [0, 201])
def test_impossible_grid_is_refused(count):
    with pytest.raises(SettingError, match=f"not {count} different"):
        evenly_spaced(400, 600, count)
