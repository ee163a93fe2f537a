"""The latent DDPM against the formulas of its paper (golden/latent_ddpm/README.md), and the contract of a method."""

import pytest
import torch
import torch.nn.functional as F
from arrays import generators, golden, slices
from monai.networks.nets import DiffusionModelUNet
from torch import nn

from common.detection.method import smoothed
from common.diffusion.gaussian import GaussianScheduler, evenly_spaced
from common.errors import BundleError, ImageShapeError, SettingError
from common.methods.latent_ddpm import (
    LatentDDPM,
    LatentDDPMObjective,
    location_percentile,
    masked_residual,
)
from common.networks.latent_space import LatentSpace
from common.networks.vq_autoencoder import VQAutoencoder

SCHEDULE = {"beta_start": 0.0015, "beta_end": 0.0195}
VARIANTS = ["a", "b", "c", "d"]
SHORT = {"num_train_timesteps": 20, "beta_start": 0.005, "beta_end": 0.3}


class Stub(nn.Module):
    """Stands for the U-Net: a function of (z, t); remembers its calls."""

    block_out_channels = (4,)

    def __init__(self, predict=lambda z, t: torch.zeros_like(z)):
        super().__init__()
        self.predict = predict
        self.calls = []

    def forward(self, z, t):
        self.calls.append((z, t))
        return self.predict(z, t)


def latent_space(channels=1):
    torch.manual_seed(0)
    autoencoder = VQAutoencoder(
        in_channels=channels, channels=(4, 8), num_res_layers=1, num_embeddings=16, embedding_dim=4
    )
    space = LatentSpace(autoencoder, 4)
    space.scale.fill_(0.8)
    return space


def tiny(unet=None, channels=1, fitted=True, **settings):
    """A detector of tiny networks with random weights and a short chain; about half of the locations are unlikely."""
    space = latent_space(channels)
    network = DiffusionModelUNet(2, 4, 4, 1, (8, 16), (False, True), norm_num_groups=4, num_head_channels=8)
    for parameter in network.parameters():  # its output layer starts at zero
        nn.init.normal_(parameter, std=0.2)
    settings = {"kl_range": (8, 12), "healing_start": 10, "sigma_px": 1.0, "num_score_timesteps": 5, **settings}
    if settings.get("variant") == "d":
        settings = {"num_kl_timesteps": 2, "num_healing_steps": 3, **settings}
    detector = LatentDDPM(space, unet or network, GaussianScheduler(**SHORT), (4, 4), **settings).eval()
    if fitted:
        z0, _ = space.posterior(slices(channels=channels))
        with torch.no_grad():
            v = detector.kl_map(z0, generators(7, 8, 9), detector.kl_timesteps)
        detector.threshold.fill_(v.median())
    return detector


def paper_chain(unet=None, **settings):
    return LatentDDPM(latent_space(), unet or Stub(), GaussianScheduler(**SCHEDULE), (4, 4), **settings)


# --- against the formulas ---


def test_kl_map_is_the_mean_over_timesteps_and_channels_with_one_noise(monkeypatch):
    g = golden("latent_ddpm/kl")
    monkeypatch.setattr("common.methods.latent_ddpm.noise_like", lambda z, _: g["noise"])
    timesteps = [1, 400, 500, 599]
    for max_batch in (1, 2, 5, 256):
        stub = Stub(lambda z, t: g["eps_pred"].repeat(len(z) // 2, 1, 1, 1))
        detector = paper_chain(stub, max_batch=max_batch)
        v = detector.kl_map(g["x0"], [], timesteps)
        expected = torch.stack([g[f"closed_form_fixed_small_t{t}_kl"] for t in timesteps]).mean(dim=(0, 2))
        torch.testing.assert_close(v.double(), expected, rtol=2e-5, atol=1e-8)
        torch.testing.assert_close(v.mean(dim=(1, 2)) * 4, g["fixed_small_noclip_total_mean"], rtol=5e-3, atol=0)
        assert sorted(torch.cat([t for _, t in stub.calls]).tolist()) == sorted(2 * timesteps)
        for z, times in stub.calls:
            expected = detector.scheduler.add_noise(
                g["x0"].repeat(len(z) // 2, 1, 1, 1), g["noise"].repeat(len(z) // 2, 1, 1, 1), times
            )
            torch.testing.assert_close(z, expected)


@pytest.mark.parametrize("variant", ["b", "c"])
def test_kl_as_the_map_is_one_at_the_threshold_of_its_location(variant):
    detector, images = tiny(variant=variant, map_kind="kl"), slices()
    found = detector.detect(images, seeds=torch.tensor([7, 8, 9]))
    z0, _ = detector.latent_space.posterior(images)
    with torch.no_grad():
        kl = detector.kl_map(z0, generators(7, 8, 9), detector.kl_timesteps)
    expected = F.interpolate((kl / detector.threshold).float()[:, None], images.shape[2:], mode="bilinear")
    torch.testing.assert_close(found.anomaly_map, expected * (images > 0).any(1, keepdim=True))
    assert torch.equal(detector.over_threshold(kl) >= 1, detector.unlikely(kl) == 1)
    residual = tiny(variant=variant).detect(images, seeds=torch.tensor([7, 8, 9]))
    torch.testing.assert_close(found.reconstruction, residual.reconstruction)


def test_fresh_noise_is_another_for_each_t_and_slice_whatever_the_batch():
    z0, maps = torch.randn(2, 2, 4, 4, generator=generators(9)[0]), []
    for max_batch in (1, 4, 256):
        stub = Stub()
        detector = paper_chain(stub, kl_noise="fresh", max_batch=max_batch)
        maps.append(detector.kl_map(z0, generators(0, 1), range(400, 410)))
        abar = detector.scheduler.alpha_bar
        noises = torch.cat(
            [(z - abar[t].sqrt().view(-1, 1, 1, 1) * z0.repeat(len(z) // 2, 1, 1, 1)) for z, t in stub.calls]
        )
        assert torch.pdist(noises.flatten(1)).min() > 1
    torch.testing.assert_close(maps[1], maps[0])
    torch.testing.assert_close(maps[2], maps[0])


def test_threshold_and_mask():
    g = golden("latent_ddpm/threshold")
    threshold = location_percentile(g["v_validation"], 97.5)
    torch.testing.assert_close(threshold, g["threshold_percentile97p5_linear"])
    detector = LatentDDPM(latent_space(), Stub(), GaussianScheduler(), (5, 6))
    detector.threshold.copy_(g["threshold_percentile97p5_linear"])
    assert torch.equal(detector.unlikely(g["v_test"])[:, 0], g["mask"].double())


def test_step_of_the_healing(monkeypatch):
    """One step of one t: what the network sees, and what it is led to, which is the end outside the mask alone."""
    g = golden("latent_ddpm/heal_step")
    stub, t = Stub(lambda z, t: g["eps_pred"]), int(g["t_index"])
    detector, steps = paper_chain(stub), []
    monkeypatch.setattr("common.methods.latent_ddpm.noise_like", lambda z, _: g["noise"])
    monkeypatch.setattr(detector, "noised", lambda *_: g["z_t"])
    step = detector.scheduler.step
    monkeypatch.setattr(detector.scheduler, "step", lambda *args: steps.append(step(*args)) or steps[-1])
    detector.healing_timesteps = [t, t - 1]
    detector.heal(g["z0"], g["mask"], [])
    torch.testing.assert_close(stub.calls[0][0], g["composed_paper_clean_known"])
    torch.testing.assert_close(steps[0], g["z_prev_paper_clean_known"], rtol=1e-4, atol=1e-4)


def test_masked_residual():
    g = golden("latent_ddpm/residual_dice")
    mask = g["latent_mask"][:, None]
    upsampled = nn.functional.interpolate(mask, scale_factor=4, mode="nearest")
    torch.testing.assert_close(smoothed(upsampled, 1.0)[:, 0], g["smoothed_mask"], atol=3e-4, rtol=0)
    result = masked_residual(g["x"][:, None], g["recon"][:, None], mask.float(), 1.0)
    torch.testing.assert_close(result[:, 0].double(), g["anomaly_map"], atol=3e-4, rtol=0)


def test_timesteps_of_the_variants():
    g = golden("latent_ddpm/timesteps")
    for variant in "abc":
        detector = paper_chain(variant=variant)
        assert detector.kl_timesteps == g["full_L_400_600"].tolist()
        assert detector.healing_timesteps == g["ddpm_heal_from_500"].tolist()
    fast = paper_chain(variant="d")
    assert fast.kl_timesteps == g["Lprime_50_of_400_600"].tolist()
    assert fast.healing_timesteps == g["ddim50_from_500_stride10"].tolist()


@pytest.mark.parametrize(("variant", "steps"), [("c", None), ("d", 4), ("c", 7), ("d", 10)])
def test_timesteps_of_the_walk_are_those_that_the_step_uses(variant, steps):
    """With the true noise of z0 = 3 sampling arrives at 3 only if network and step mean the same t and t_prev."""

    def true_noise(z, t):
        alpha_bar = detector.scheduler.alpha_bar[t].view(-1, 1, 1, 1)
        return ((z - alpha_bar.sqrt() * 3) / (1 - alpha_bar).sqrt()).float()

    stub = Stub(true_noise)
    detector = tiny(stub, fitted=False, variant=variant, num_healing_steps=steps)
    z0 = torch.full((1, 4, 4, 4), 3.0)
    healed = detector.heal(z0, torch.ones(1, 1, 4, 4), generators(0))
    torch.testing.assert_close(healed, z0, atol=1e-4, rtol=0)
    assert [int(t[0]) for _, t in stub.calls] == evenly_spaced(0, 10, steps or 10)[::-1]
    for z, t in stub.calls[:-1] if variant == "d" else []:  # eta = 0: the state stays that of one noise at every t
        alpha_bar = detector.scheduler.alpha_bar[t[0]]
        first, start = detector.scheduler.alpha_bar[stub.calls[0][1][0]], stub.calls[0][0]
        eps = (start - first.sqrt() * 3) / (1 - first).sqrt()
        expected = alpha_bar.sqrt() * 3 + (1 - alpha_bar).sqrt() * eps
        torch.testing.assert_close(z, expected.float(), atol=1e-4, rtol=0)


def test_only_the_mask_is_healed_and_the_rest_is_seen_clean():
    stub, mask = Stub(), torch.zeros(1, 1, 4, 4)
    mask[..., 1:3, 1] = 1
    detector = tiny(stub, fitted=False)
    z0 = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    healed = detector.heal(z0, mask, generators(0, 1))
    assert torch.equal(healed != z0, mask.bool().expand_as(z0))
    outside = (mask == 0).expand_as(z0)
    assert all(torch.equal(z[outside], z0[outside]) for z, _ in stub.calls)


def test_ddpm_draws_noise_at_every_step_but_the_last_and_ddim_never():
    zero = torch.zeros(1, 4, 4, 4)
    for variant in ("c", "d"):
        stub = Stub()
        detector = tiny(stub, fitted=False, variant=variant, num_healing_steps=10)
        healed = detector.heal(zero, torch.ones(1, 1, 4, 4), generators(0))
        last = stub.calls[-1][0] / detector.scheduler.alpha_bar[0].sqrt().float()
        torch.testing.assert_close(healed, last)  # no noise is predicted and none is added
        ratio = (stub.calls[5][0] / stub.calls[4][0]).flatten()
        assert bool(ratio.std() < 1e-5) is (variant == "d")


def test_latent_outside_of_minus_one_to_one_survives():
    detector = tiny(Stub(lambda z, t: torch.zeros_like(z)), fitted=False, variant="d")
    z0 = torch.full((1, 4, 4, 4), 25.0)
    assert detector.heal(z0, torch.ones(1, 1, 4, 4), generators(0)).min() > 20


def test_score_is_the_mean_kl_over_the_whole_chain():
    detector, image = tiny(Stub(), num_score_timesteps=19), slices()
    z0, _ = detector.latent_space.posterior(image)
    expected = detector.kl_map(z0, generators(4, 5, 6), range(1, 20)).mean(dim=(1, 2))
    score = detector.score(image, image > 0, generators(4, 5, 6))
    assert torch.equal(score, expected)
    assert len(score.unique()) == 3
    stub = Stub()
    tiny(stub, num_score_timesteps=4).score(image[:1], image[:1] > 0, generators(0))
    assert [t.tolist() for _, t in stub.calls][-1] == [3, 7, 12, 17]


def test_detection_makes_no_pass_for_the_score():
    """Its passes are those of the reverse process, for any number of t of the score."""
    for count in (1, 19):
        stub = Stub()
        detector = tiny(stub, fitted=False, variant="a", num_score_timesteps=count)
        assert detector.has_separate_score
        assert detector.detect(slices()).score is None
        assert len(stub.calls) == 10


@pytest.mark.parametrize("count", [0, 20, -1])
def test_number_of_timesteps_of_the_score_is_checked(count):
    with pytest.raises(SettingError, match=r"choose 1 to 19"):
        tiny(num_score_timesteps=count)


# --- the thresholds ---


def test_fitted_threshold_is_exceeded_by_the_stated_share_of_healthy_locations(monkeypatch):
    monkeypatch.setattr("common.methods.latent_ddpm.PERCENTILE", 80.0)
    detector, images = tiny(fitted=False), slices(20)
    assert (detector.threshold == 0).all()
    detector.fit_threshold(images.split(7))
    assert detector.threshold.isfinite().all()
    z0, _ = detector.latent_space.posterior(images)
    with torch.no_grad():
        mask = detector.unlikely(detector.kl_map(z0, generators(*range(20)), detector.kl_timesteps))
    assert torch.equal(mask.sum(dim=0)[0], torch.full((4, 4), 4.0))
    again = tiny(fitted=False)
    again.fit_threshold(images.split(20))
    torch.testing.assert_close(again.threshold, detector.threshold, rtol=1e-4, atol=0)


def test_background_does_not_set_the_threshold_of_a_location():
    v = torch.rand(100, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
    inside = torch.ones(100, 2, 3, dtype=torch.bool)
    inside[50:, 0, 0] = inside[9:, 1, 1] = inside[:, 1, 2] = False
    v[~inside] = 0.1
    fitted, everywhere = location_percentile(v, 90.0, inside), location_percentile(v[inside][:, None], 90.0)
    torch.testing.assert_close(fitted[0, 0], location_percentile(v[:50], 90.0)[0, 0])
    torch.testing.assert_close(fitted[0, 1], location_percentile(v, 90.0)[0, 1])
    assert fitted[1, 1] == fitted[1, 2] == everywhere  # 9 of them do not say what 10 % exceed


@pytest.mark.parametrize(("over", "unlikely"), [("foreground", 0.4), ("all", 1.0)])
def test_rim_of_a_large_brain(monkeypatch, over, unlikely):
    monkeypatch.setattr("common.methods.latent_ddpm.PERCENTILE", 80.0)
    detector, large = tiny(threshold_over=over, fitted=False), slices(20)
    monkeypatch.setattr(detector.latent_space, "posterior", lambda image: (F.avg_pool2d(image, 4), None))
    monkeypatch.setattr(detector, "kl_map", lambda z0, *_: z0[:, 0])
    images = large.clone()
    images[1:, :, :, :8] = 0  # of the 20 brains one reaches there
    detector.fit_threshold([images])
    share = detector.unlikely(F.avg_pool2d(large, 4)[:, 0])[..., :2].mean()
    assert share == pytest.approx(unlikely, abs=0.05)


def test_before_the_fit_every_location_is_healed():
    detection = tiny(fitted=False).detect(slices())
    assert (detection.anomaly_map[slices() > 0] > 0).float().mean() > 0.99


@pytest.mark.parametrize("size", [(4, 4), (6, 5), (2, 3), (1, 1), (9, 2)])
def test_latents_of_another_size_have_the_same_centre(size):
    detector = tiny(fitted=False)
    detector.threshold.copy_(torch.arange(16.0).view(4, 4))
    offset = [(new - 4) // 2 for new in size]
    rows, columns = ((torch.arange(n) - o).clamp(0, 3) for n, o in zip(size, offset, strict=True))
    expected = rows[:, None] * 4.0 + columns
    assert detector.unlikely(expected[None]).all()
    assert not detector.unlikely(expected[None] - 1e-3).any()


def test_slices_of_another_size_give_no_threshold():
    with pytest.raises(BundleError, match=r"\(6, 4\) locations for latents of \(4, 4\)"):
        tiny().fit_threshold([torch.rand(2, 1, 24, 16)])


def test_threshold_travels_with_the_weights():
    detector = tiny()
    other = tiny(fitted=False)
    other.load_state_dict(detector.state_dict())
    assert torch.equal(other.threshold, detector.threshold)
    with pytest.raises(RuntimeError, match="threshold"):
        LatentDDPM(latent_space(), Stub(), GaussianScheduler(), (5, 4)).load_state_dict(detector.state_dict())


# --- the contract ---


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("channels", [1, 2])
def test_detection(check_detection, variant, channels):
    check_detection(tiny(variant=variant, channels=channels), slices(channels=channels))


def test_variants_differ_in_what_they_say_they_do():
    """With the same noise: (b) is (a) within the mask, (c) decodes the healed mask in its surroundings."""
    image = slices()
    detectors = {variant: tiny(variant=variant, sigma_px=0) for variant in "abc"}
    maps = {variant: detector.detect(image).anomaly_map for variant, detector in detectors.items()}
    z0, _ = detectors["b"].latent_space.posterior(image)
    v = detectors["b"].kl_map(z0, generators(0, 0, 0), detectors["b"].kl_timesteps)
    mask = nn.functional.interpolate(detectors["b"].unlikely(v), scale_factor=4) > 0
    assert 0.2 < mask.float().mean() < 0.8
    assert (maps["a"][~mask & (image > 0)] > 0).float().mean() > 0.9
    for variant in "bc":
        assert not maps[variant][~mask].any()
        assert (maps[variant][mask & (image > 0)] > 0).float().mean() > 0.9


@pytest.mark.parametrize("variant", VARIANTS)
def test_slice_gives_the_same_alone_and_in_any_batch(check_batches, variant):
    check_batches(tiny(variant=variant, max_batch=4), slices(), score_rtol=1e-4)


def test_result_depends_on_the_seed_alone(check_seeds):
    check_seeds(tiny(), slices(1))


@pytest.mark.parametrize("size", [(12, 16), (16, 20), (15, 16)])
def test_wrong_size_is_refused(size):
    with pytest.raises(ImageShapeError, match="multiples of 8"):
        tiny().detect(torch.rand(1, 1, *size))


@pytest.mark.parametrize(
    "settings", [{"kl_range": (0, 5)}, {"kl_range": (10, 21)}, {"kl_range": (9, 9)}, {"healing_start": 21}]
)
def test_timesteps_outside_of_the_schedule_are_refused(settings):
    with pytest.raises(SettingError, match=r"outside of the schedule, \[1, 20\]"):
        tiny(fitted=False, **settings)


# --- the training objective ---


def test_loss_is_the_mean_squared_error_of_the_noise():
    stub = Stub(lambda z, t: z * 0 + 2)
    objective = LatentDDPMObjective(tiny(stub, fitted=False))
    mean = torch.full((512, 4, 4, 4), 3.0)
    torch.manual_seed(0)
    loss = objective(posterior=(mean, torch.zeros_like(mean)))["loss"]
    assert loss.item() == pytest.approx(1 + 2**2, abs=0.1)
    z_t, t = stub.calls[0]
    assert set(t.tolist()) == set(range(20))
    alpha_bar = objective.detector.scheduler.alpha_bar
    for index in (0, 19):
        assert z_t[t == index].mean().item() == pytest.approx(3 * alpha_bar[index].sqrt().item(), abs=0.1)
        assert z_t[t == index].std().item() == pytest.approx((1 - alpha_bar[index]).sqrt().item(), abs=0.1)


def test_images_and_their_cached_posterior_give_the_same_loss():
    detector, image = tiny(), slices()
    objective = LatentDDPMObjective(detector)
    losses = []
    for arguments in ({"images": image}, {"posterior": detector.latent_space.posterior(image)}):
        torch.manual_seed(0)
        losses.append(objective(**arguments)["loss"])
    assert torch.equal(*losses)
    with pytest.raises(ValueError, match="give images"):
        objective()


def test_only_the_unet_is_trained_and_the_codebook_stays():
    objective = LatentDDPMObjective(tiny()).train()
    before = {name: value.clone() for name, value in objective.detector.latent_space.state_dict().items()}
    objective(slices())["loss"].backward()
    assert all(p.grad is not None for p in objective.detector.unet.parameters())
    after = objective.detector.latent_space.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(p.grad is None for p in objective.detector.latent_space.parameters())


@pytest.mark.parametrize(("latent_channels", "count"), [(32, 64_210_464), (128, 64_431_744)])
def test_parameters_of_the_paper_size(latent_channels, count):
    with torch.device("meta"):
        unet = DiffusionModelUNet(
            2,
            latent_channels,
            latent_channels,
            2,
            (128, 256, 512),
            (False, True, True),
            num_head_channels=(0, 256, 512),
        )
    assert sum(p.numel() for p in unet.parameters()) == count
