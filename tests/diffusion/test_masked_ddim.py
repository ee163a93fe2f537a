"""Schedule, forward process and reverse step of MAD-AD against its reference program: golden/mad_ad/README.md."""

import pytest
import torch
from arrays import golden

from common.diffusion.masked_ddim import MaskedDDIMScheduler
from common.errors import SettingError


def test_alpha_bar_is_the_published_cosine_schedule():
    expected = golden("mad_ad/schedule")["ddim10_alphas_cumprod"]
    torch.testing.assert_close(MaskedDDIMScheduler().alpha_bar, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("count", "expected"), [(10, [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]), (5, [8, 6, 4, 2, 0]), (2, [5, 0])]
)
def test_fewer_steps_are_those_of_the_reference(count, expected):
    scheduler, reference = MaskedDDIMScheduler(), golden("mad_ad/schedule")
    steps = scheduler.timesteps(count)
    assert steps == expected == reference[f"ddim{count}_timestep_map"].flip(0).tolist()
    torch.testing.assert_close(scheduler.alpha_bar[steps].flip(0), reference[f"ddim{count}_alphas_cumprod"])


@pytest.mark.parametrize(("count", "expected"), [(1, [0]), (3, [8, 4, 0]), (4, [9, 6, 3, 0])])
def test_timesteps_have_one_stride(count, expected):
    assert MaskedDDIMScheduler().timesteps(count) == expected


@pytest.mark.parametrize("count", [-1, 0, 6, 7, 8, 9, 11])
def test_impossible_number_of_steps_is_refused(count):
    with pytest.raises(SettingError, match=f"gives {count} of them"):
        MaskedDDIMScheduler().timesteps(count)


@pytest.mark.parametrize(("eta", "key", "power"), [(0.5, "sigma_eta0.5", 1), (1.0, "posterior_variance", 2)])
def test_sigma(eta, key, power):
    scheduler = MaskedDDIMScheduler(eta=eta)
    sigma = torch.stack([scheduler.sigma(t, t - 1) for t in range(10)])
    torch.testing.assert_close(sigma**power, golden("mad_ad/schedule")[key])
    assert sigma[0] == 0


def test_forward_process_has_the_polarity_of_the_paper():
    g, scheduler = golden("mad_ad/q_sample"), MaskedDDIMScheduler()
    mask = g["mask_paper_1_is_noised"][:, :1]
    assert torch.equal(mask, 1 - g["mask_code_1_is_clean"][:, :1])
    torch.testing.assert_close(scheduler.add_noise(g["z0"], g["noise"], mask, g["t_index"]), g["z_t"])
    assert not torch.allclose(scheduler.add_noise(g["z0"], g["noise"], 1 - mask, g["t_index"]), g["z_t"])


@pytest.mark.parametrize("t", [9, 5, 1, 0])
def test_reverse_step(t):
    g, scheduler = golden("mad_ad/ddim_step"), MaskedDDIMScheduler()
    assert scheduler.eta == g["eta"]
    mask = (g["f_mask_prob_clean"] < 0.5).float()
    undecided = (g["f_mask_prob_clean"] == 0.5).expand_as(g["z_t"])
    z_prev = scheduler.step(g["z_t"], g["f_z0"], mask, t, t - 1, g["noise"])
    torch.testing.assert_close(z_prev, g[f"t{t}_z_prev"], rtol=1e-5, atol=1e-5)
    assert torch.equal(z_prev[undecided], g["z_t"][undecided])
    candidate = scheduler.step(g["z_t"], g["f_z0"], torch.ones_like(mask), t, t - 1, g["noise"])
    torch.testing.assert_close(candidate, g[f"t{t}_unmasked_full"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("t", [9, 5, 1])
def test_reverse_step_is_not_the_printed_one(t):
    g = golden("mad_ad/ddim_step")
    args = (torch.ones_like(g["f_mask_prob_clean"]), t, t - 1, g["noise"])
    result = MaskedDDIMScheduler().step(g["z_t"], g["f_z0"], *args)
    literal = [value for key, value in g.items() if key.startswith(f"t{t}_PAPER_LITERAL")]
    assert len(literal) == 2
    assert all((result - value).abs().max() > 0.01 for value in literal)


@pytest.mark.parametrize("count", [10, 5, 4, 3, 2, 1])
def test_exact_prediction_without_noise_retraces_the_forward_process(count):
    scheduler = MaskedDDIMScheduler(eta=0.0)
    z0, eps = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = (torch.arange(16).view(1, 1, 4, 4) % 3 == 0).double().expand(2, 1, 4, 4)
    steps = scheduler.timesteps(count)
    z_t = scheduler.add_noise(z0, eps, mask, torch.tensor([steps[0]] * 2))
    for t, t_prev in zip(steps, [*steps[1:], -1], strict=True):
        z_t = scheduler.step(z_t, z0, mask, t, t_prev, torch.randn_like(z0))
        expected = z0 if t_prev < 0 else scheduler.add_noise(z0, eps, mask, torch.tensor([t_prev] * 2))
        torch.testing.assert_close(z_t, expected)


def test_last_step_gives_the_prediction_itself():
    z_t, z0, noise = torch.randn(3, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 1, 4, 4)
    torch.testing.assert_close(MaskedDDIMScheduler(eta=1.0).step(z_t, z0, mask, 0, -1, noise), z0)
