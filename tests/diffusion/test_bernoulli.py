"""Schedule, forward process and posterior of BerDiff: golden/berdiff/README.md, closed forms, and simulation."""

import pytest
import torch
from arrays import golden

from common.diffusion.bernoulli import BernoulliScheduler
from common.errors import SettingError


def bits(*shape, seed=0):
    return torch.randint(2, shape, generator=torch.Generator().manual_seed(seed)).float()


def uniform(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def sampling_steps(scheduler):
    """Pairs (t, s) of the scheduler's timesteps, the last s is -1."""
    return list(zip(scheduler.timesteps, [*scheduler.timesteps[1:], -1], strict=True))


# --- against the reference ---


def test_schedule():
    g, scheduler = golden("berdiff/schedule"), BernoulliScheduler()
    torch.testing.assert_close(1 - scheduler.alphas, g["betas_full"], rtol=1e-11, atol=0)
    torch.testing.assert_close(scheduler.alpha_bar, g["alphas_cumprod_full"], rtol=1e-11, atol=0)


@pytest.mark.parametrize(("reference", "key"), [("paper", "paper_eq2"), ("code", "reference_code")])
def test_probability(reference, key):
    g = golden("berdiff/q_mean")
    z0 = g["z0"].expand(len(g["t_index"]), 2)
    probability = BernoulliScheduler(reference=reference).probability(z0, g["t_index"])
    assert probability.dtype == torch.float64
    torch.testing.assert_close(probability, g[key].double(), atol=1e-6 if "reference" in key else 1e-12, rtol=0)


@pytest.mark.parametrize(("reference", "key"), [("paper", "z_t_paper_xor"), ("code", "z_t_reference")])
def test_forward_process(reference, key):
    g = golden("berdiff/loss")
    z_t = BernoulliScheduler(reference=reference).add_noise(g["z0"], g["u"], g["t_index"])
    assert z_t.dtype == g["z0"].dtype
    assert torch.equal(z_t, g[key])


def posterior_of_golden(**settings):
    """For each t of the golden grid: (2, 9), z_t by z0."""
    g, scheduler = golden("berdiff/posterior"), BernoulliScheduler(**settings)
    z_t, z0 = torch.broadcast_tensors(g["z_t"].view(2, 1), g["z0_tilde"].view(1, 9))
    return torch.stack([scheduler.posterior(z_t, z0, t, t - 1) for t in g["t_index"].tolist()]), g


def test_posterior_of_the_reference():
    result, g = posterior_of_golden(soft_z0="inserted")
    torch.testing.assert_close(result, g["exact_bayes_float64"], atol=1e-13, rtol=1e-11)
    late = g["t_index"] >= 10
    torch.testing.assert_close(result, g["reference_code_float32"], atol=2e-4, rtol=0)
    torch.testing.assert_close(result[late], g["reference_code_float32"][late], atol=1e-5, rtol=0)


def test_posterior_of_binary_z0_is_the_same_either_way():
    result, g = posterior_of_golden()
    binary = [0, 8]
    assert g["z0_tilde"][binary].tolist() == [0, 1]
    torch.testing.assert_close(result[..., binary], g["exact_bayes_float64"][..., binary], atol=1e-13, rtol=1e-11)
    assert (result[..., 4] - g["exact_bayes_float64"][..., 4]).abs().max() > 0.1  # z0 = 0.5


@pytest.mark.parametrize("soft_z0", ["marginalised", "inserted"])
def test_posterior_is_not_that_of_the_supplement(soft_z0):
    result, g = posterior_of_golden(soft_z0=soft_z0)
    assert (result - g["paper_supplement_literal_float64"]).abs().max() > 0.5


@pytest.mark.parametrize("t", [199, 57, 1])
def test_reverse_step(t):
    g = golden("berdiff/masked_step")
    scheduler = BernoulliScheduler(soft_z0="inserted")
    z0 = g[f"t{t}_z0_stitched"]
    torch.testing.assert_close(
        scheduler.posterior(g["z_t"], z0, t, t - 1).float(), g[f"t{t}_theta"], atol=2e-4 if t == 1 else 1e-5, rtol=0
    )
    assert torch.equal(scheduler.step(g["z_t"], z0, t, t - 1, g["u"]), g[f"t{t}_sample"])


def test_last_step_draws_from_the_prediction():
    g = golden("berdiff/masked_step")
    last = BernoulliScheduler().step(g["z_t"], g["t0_paper_z0_stitched"], 0, -1, g["u"])
    assert torch.equal(last, g["t0_paper_sample_binarised_u_lt_p"])


# --- steps ---


@pytest.mark.parametrize(
    ("steps", "L", "expected"),
    [
        (4, 200, [199, 149, 99, 49]),
        (3, 10, [9, 5, 2]),
        (1, 200, [199]),
        (5, 5, [4, 3, 2, 1, 0]),
        (2, None, [999, 499]),
    ],
)
def test_timesteps_start_below_the_noise_level_in_even_jumps(steps, L, expected):
    scheduler = BernoulliScheduler()
    assert scheduler.timesteps == list(range(999, -1, -1))
    scheduler.set_timesteps(steps, L)
    assert scheduler.timesteps == expected


@pytest.mark.parametrize("steps", [200, 50, 20, 10, 7, 199])
def test_any_number_of_steps_walks_the_whole_way(steps):
    scheduler = BernoulliScheduler()
    scheduler.set_timesteps(steps, 200)
    jumps = [t - s for t, s in sampling_steps(scheduler)]
    assert len(jumps) == steps
    assert sum(jumps) == 200
    assert max(jumps) - min(jumps) <= 1


@pytest.mark.parametrize(("steps", "L"), [(0, 10), (-1, 10), (11, 10), (1, 0), (5, 1001), (1001, None)])
def test_impossible_number_of_steps_is_refused(steps, L):
    with pytest.raises(SettingError, match=f"{steps} steps"):
        BernoulliScheduler().set_timesteps(steps, L)


@pytest.mark.parametrize(("t", "s"), [(5, 5), (5, 6), (5, -2), (0, 0)])
def test_step_that_does_not_lead_back_is_refused(t, s):
    z = bits(1, 2)
    with pytest.raises(ValueError, match=f"not to {s}"):
        BernoulliScheduler().posterior(z, z, t, s)


def plain_step(z_t, z0, i, u, abar, alpha):
    """The published step from i to i - 1, written out (spec section 4.1), in float64."""
    before = abar[i - 1] if i > 0 else torch.ones((), dtype=torch.float64)

    def theta(z0):
        on = (alpha[i] * z_t + (1 - alpha[i]) / 2) * (before * z0 + (1 - before) / 2)
        off = (alpha[i] * (1 - z_t) + (1 - alpha[i]) / 2) * (before * (1 - z0) + (1 - before) / 2)
        return on / (on + off)

    marginal = z0 * theta(torch.ones_like(z0)) + (1 - z0) * theta(torch.zeros_like(z0))
    return marginal, theta(z0)


@pytest.mark.parametrize(("soft_z0", "which"), [("marginalised", 0), ("inserted", 1)])
def test_jumps_of_one_are_the_plain_chain_bit_for_bit(soft_z0, which):
    scheduler = BernoulliScheduler(soft_z0=soft_z0)
    scheduler.set_timesteps(200, 200)
    abar, alpha = scheduler.alpha_bar, scheduler.alphas
    z_t = plain = bits(2, 3, 4, 4)
    for t, s in sampling_steps(scheduler):
        assert s == t - 1
        z0, u = uniform(2, 3, 4, 4, seed=t), uniform(2, 3, 4, 4, seed=1000 + t)
        theta = plain_step(plain.double(), z0.double(), t, u, abar, alpha)[which]
        assert torch.equal(scheduler.posterior(z_t, z0, t, s), theta)
        z_t, plain = scheduler.step(z_t, z0, t, s, u), (u < theta).float()
        assert torch.equal(z_t, plain)


@pytest.mark.parametrize(("t", "s"), [(199, 198), (199, 99), (57, 20), (10, 0), (999, 3), (49, -1)])
def test_posterior_of_any_jump_is_bayes_of_the_chain_of_single_steps(t, s):
    """Brute force: 2 x 2 transition matrices of every single step, multiplied."""
    scheduler = BernoulliScheduler()

    def transition(first, last):
        result = torch.eye(2, dtype=torch.float64)
        for i in range(first, last + 1):
            flip = (1 - scheduler.alphas[i]) / 2
            result = result @ torch.stack([torch.stack([1 - flip, flip]), torch.stack([flip, 1 - flip])])
        return result

    early, jump = transition(0, s), transition(s + 1, t)
    for z_t in (0, 1):
        for z0 in (0, 1):
            joint = early[z0] * jump[:, z_t]
            result = scheduler.posterior(torch.tensor([float(z_t)]), torch.tensor([float(z0)]), t, s)
            torch.testing.assert_close(result[0], joint[1] / joint.sum(), rtol=1e-9, atol=1e-15)


def test_posterior_keeps_its_digits_in_float32_input():
    z_t, z0 = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])
    scheduler = BernoulliScheduler()
    single, double = (scheduler.posterior(z_t.to(d), z0.to(d), 1, 0) for d in (torch.float32, torch.float64))
    assert single.dtype == torch.float64
    assert torch.equal(single, double)


# --- simulation ---

N = 50_000


@pytest.mark.parametrize("t", [0, 50, 199, 600])
@pytest.mark.parametrize("z0", [0.0, 1.0])
def test_marginals_of_the_chain_are_the_closed_form(t, z0):
    scheduler = BernoulliScheduler()
    generator = torch.Generator().manual_seed(t)
    z = torch.full((N,), z0)
    for i in range(t + 1):
        # one step of eq. 1: a bit is drawn anew with probability beta
        anew = torch.rand(N, generator=generator) < 1 - scheduler.alphas[i]
        z = torch.where(anew, torch.randint(2, (N,), generator=generator).float(), z)
    expected = scheduler.probability(torch.tensor([z0]), torch.tensor([t])).item()
    assert z.mean().item() == pytest.approx(expected, abs=4 * (expected * (1 - expected) / N) ** 0.5 + 1e-9)


@pytest.mark.parametrize("reference", ["paper", "code"])
def test_noise_belongs_to_its_sample_and_has_the_stated_share(reference):
    scheduler = BernoulliScheduler(reference=reference)
    z0, t = bits(3, 1, 100, 400), torch.tensor([999, 0, 300])
    z_t = scheduler.add_noise(z0, uniform(3, 1, 100, 400, seed=1), t)
    expected = scheduler.probability(z0, t)
    for value in (0, 1):
        for sample in range(3):
            chosen = z0[sample] == value
            assert z_t[sample][chosen].mean().item() == pytest.approx(expected[sample][chosen][0].item(), abs=0.015)


@pytest.mark.parametrize("steps", [200, 20, 3, 1])
@pytest.mark.parametrize("share", [0.05, 0.3])
def test_reverse_walk_of_a_perfect_network_gives_the_data_back(steps, share):
    """Independent bits, of which `share` are 1: P(z0 | z_t) is known. Only the marginalised posterior is unbiased."""
    shares = {}
    for soft_z0 in ("marginalised", "inserted"):
        scheduler = BernoulliScheduler(soft_z0=soft_z0)
        scheduler.set_timesteps(steps, 200)
        generator = torch.Generator().manual_seed(steps)
        z0 = (torch.rand(1, N, generator=generator) < share).float()
        z_t = scheduler.add_noise(z0, torch.rand(1, N, generator=generator), torch.tensor([199]))
        for t, s in sampling_steps(scheduler):
            likelihood = scheduler.probability(torch.tensor([[0.0, 1.0]]), torch.tensor([t]))[0]  # P(z_t = 1 | z0)
            off, on = (torch.where(z_t > 0, p, 1 - p) for p in likelihood)
            z0_given = share * on / (share * on + (1 - share) * off)
            z_t = scheduler.step(z_t, z0_given, t, s, torch.rand(1, N, generator=generator))
        shares[soft_z0] = z_t.mean().item()
    assert shares["marginalised"] == pytest.approx(share, abs=0.006)
    assert shares["inserted"] > share + 0.04


def test_no_randomness_but_that_given():
    scheduler, z, u = BernoulliScheduler(), bits(2, 8), uniform(2, 8)
    t, state = torch.tensor([5, 900]), torch.get_rng_state()
    assert torch.equal(scheduler.add_noise(z, u, t), scheduler.add_noise(z, u, t))
    assert torch.equal(scheduler.step(z, u, 199, 99, u), scheduler.step(z, u, 199, 99, u))
    assert torch.equal(torch.get_rng_state(), state)


def test_schedule_is_no_part_of_the_weights():
    assert BernoulliScheduler().state_dict() == {}
