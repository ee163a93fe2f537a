"""MAD-AD against its reference program (golden/mad_ad/README.md), and the contract of a method."""

import math

import numpy as np
import pytest
import torch
from arrays import generators, golden, slices
from torch import nn

from common.detection.method import image_difference, mirror, noise_like
from common.diffusion.masked_ddim import MaskedDDIMScheduler
from common.errors import ImageShapeError, SettingError
from common.methods.mad_ad import MADAD, PATCH_SIZES, MADADObjective, random_subset
from common.networks.latent_space import LatentSpace
from common.networks.masked_unet import MaskedDiffusionUNet
from common.networks.strided_autoencoder import StridedAutoencoderKL

MAP_KINDS = ["image", "input", "latent", "mask"]


class Stub(nn.Module):
    """Stands for the U-Net: a function of (z, t); remembers its calls."""

    size_divisor = 2

    def __init__(self, predict):
        super().__init__()
        self.predict = predict
        self.calls = []

    def forward(self, z, t):
        self.calls.append((z, t))
        return self.predict(z, t)


def tiny(unet=None, randomise=True, channels=1, **settings):
    """A detector of tiny networks; all weights are random, since heads that start at zero would hide mistakes."""
    torch.manual_seed(0)
    autoencoder = StridedAutoencoderKL(in_channels=channels, channels=(4, 8), latent_channels=2, num_res_layers=1)
    network = MaskedDiffusionUNet(2, (8, 16), 1, (False, True), num_heads=2, norm_num_groups=4)
    if randomise:
        for parameter in [*autoencoder.parameters(), *network.parameters()]:
            nn.init.normal_(parameter, std=0.2)
    space = LatentSpace(autoencoder, 4)
    space.scale.fill_(1.7)
    return MADAD(space, unet or network, MaskedDDIMScheduler(), **{"sigma_px": 1.0, "gamma": None, **settings}).eval()


# --- the detector against the reference ---


def test_cells_are_updated_where_they_are_more_likely_noised_than_clean():
    g = golden("mad_ad/ddim_step")
    clean = g["f_mask_prob_clean"]
    assert (clean == 0.5).sum() == 1
    detector = tiny(Stub(lambda z, t: (g["f_z0"], torch.log((1 - clean) / clean))), num_inference_steps=1)
    corrected, mask_mean = detector.correct(g["z_t"], generators(0, 1, 2))
    torch.testing.assert_close(corrected, g["t0_z_prev"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mask_mean, 1 - clean)


@pytest.mark.parametrize("steps", [10, 5, 2])
def test_reverse_process_is_the_published_loop(steps):
    """Against the loop of the published code, in its own polarity and with its own variables."""
    stub = Stub(lambda z, t: (torch.tanh(0.7 * z + 0.3) - 0.1 * t.view(-1, 1, 1, 1), z[:, :1] * 2 - 0.1 * t[0] + 0.5))
    z = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    corrected, _ = tiny(stub, num_inference_steps=steps).correct(z, generators(3, 4))

    schedule = golden("mad_ad/schedule")
    indices, products = schedule[f"ddim{steps}_timestep_map"], schedule[f"ddim{steps}_alphas_cumprod"]
    before = schedule[f"ddim{steps}_alphas_cumprod_prev"]
    noises, expected = generators(3, 4), z.double()
    for i in reversed(range(steps)):
        z0, logit_noised = stub.predict(expected.float(), torch.full((2,), int(indices[i])))
        clean = torch.sigmoid(-logit_noised.double())
        eps = (expected - products[i].sqrt() * z0) / (1 - products[i]).sqrt()
        sigma = 0.5 * ((1 - before[i]) / (1 - products[i])).sqrt() * (1 - products[i] / before[i]).sqrt()
        candidate = before[i].sqrt() * z0 + (1 - before[i] - sigma**2).clamp(min=0).sqrt() * eps
        candidate = candidate + sigma * noise_like(z, noises)
        update = (clean < 0.5).double()
        assert 0 < update.mean() < 1
        expected = update * candidate + (1 - update) * expected
    torch.testing.assert_close(corrected, expected.float(), atol=1e-4, rtol=1e-4)


def test_anomaly_map_of_the_reference():
    g = golden("mad_ad/anomaly_map")
    detector = MADAD(LatentSpace(nn.Identity(), 8), Stub(None), MaskedDDIMScheduler())
    corrected, reference = ((g[key] + 1) / 2 for key in ("x_corrected", "x_vae_recon"))
    result = detector.smoothed(image_difference(corrected, reference, detector.gamma))
    torch.testing.assert_close(result[:, 0], g["maps"], atol=2e-4, rtol=0)


@pytest.mark.parametrize("margin", [0, 1, 3, 4, 11])
def test_mirror_is_the_border_of_scipy(margin):
    x = torch.arange(12.0).view(1, 1, 3, 4)
    expected = np.pad(x.numpy(), [(0, 0), (0, 0), (margin, margin), (margin, margin)], mode="symmetric")
    assert torch.equal(mirror(x, margin), torch.from_numpy(expected))


@pytest.mark.parametrize("sigma", [0, 0.6, 1.3, 5.0])
def test_smoothing_keeps_a_constant_up_to_the_border(sigma):
    result = tiny(sigma_px=sigma).smoothed(torch.full((1, 1, 8, 24), 0.5))
    torch.testing.assert_close(result, torch.full((1, 1, 8, 24), 0.5), atol=3e-3, rtol=0)


def test_difference_is_that_of_the_worst_channel_clipped():
    a = torch.tensor([[0.1, 0.9, 0.5, 0.5], [0.2, 0.3, 0.5, 0.5]]).view(1, 2, 2, 2)
    b = torch.tensor([[0.0, 0.4, 0.5, 0.45], [0.4, 0.3, 0.5, 0.5]]).view(1, 2, 2, 2)
    torch.testing.assert_close(image_difference(a, b, None).flatten(), torch.tensor([0.2, 0.5, 0.0, 0.05]))
    torch.testing.assert_close(image_difference(a, b, 0.4).flatten(), torch.tensor([0.5, 1.0, 0.0, 0.125]))


# --- the contract ---


@pytest.mark.parametrize("map_kind", MAP_KINDS)
@pytest.mark.parametrize("channels", [1, 2])
def test_detection(check_detection, map_kind, channels):
    check_detection(tiny(map_kind=map_kind, channels=channels), slices(channels=channels))


@pytest.mark.parametrize("map_kind", MAP_KINDS)
def test_slice_gives_the_same_alone_and_in_any_batch(check_batches, map_kind):
    check_batches(tiny(map_kind=map_kind), slices())


def test_result_depends_on_the_seed_alone(check_seeds):
    check_seeds(tiny(), slices(1))


@pytest.mark.parametrize(("map_kind", "expected"), [("image", 0.0), ("latent", 0.0), ("mask", 0.5)])
def test_map_where_no_cell_is_flagged(map_kind, expected):
    # an untrained U-Net is undecided everywhere, and 0.5 is not flagged
    detector, image = tiny(randomise=False, map_kind=map_kind, sigma_px=0), slices()
    detection = detector.detect(image)
    if expected == 0:
        assert (detection.anomaly_map == 0).all()
    torch.testing.assert_close(detection.anomaly_map, (image > 0) * expected)
    z, _ = detector.latent_space.posterior(image)
    corrected = detector.latent_space.decode(z).clamp(0, 1) * (image > 0)
    torch.testing.assert_close(detection.reconstruction, corrected)


def test_only_flagged_cells_change():
    flagged = torch.zeros(1, 1, 4, 4)
    flagged[..., 1:3, 1] = 1
    detector = tiny(Stub(lambda z, t: (torch.zeros_like(z), flagged.expand(len(z), -1, -1, -1) - 0.5)))
    z, _ = detector.latent_space.posterior(slices(2))
    corrected, mask_mean = detector.correct(z, generators(0, 1))
    assert torch.equal(corrected != z, flagged.bool().expand_as(z))
    torch.testing.assert_close(corrected * flagged, torch.zeros_like(z))  # the last step gives the prediction itself
    torch.testing.assert_close(mask_mean, torch.sigmoid(flagged - 0.5).expand(2, -1, -1, -1))


def test_network_is_asked_with_the_original_indices():
    stub = Stub(lambda z, t: (z, z[:, :1]))
    tiny(stub, num_inference_steps=5).detect(slices(2))
    assert [t.tolist() for _, t in stub.calls] == [[i, i] for i in (8, 6, 4, 2, 0)]


def test_map_against_the_input_shows_the_error_of_the_autoencoder():
    image = slices()
    detector = tiny(map_kind="input", randomise=False, sigma_px=0)  # flags no cell
    decoded = detector.latent_space.decode(detector.latent_space.posterior(image)[0])
    expected = (decoded - image).abs() * (image > 0)
    torch.testing.assert_close(detector.detect(image).anomaly_map, expected)
    assert expected.max() > 0.1


@pytest.mark.parametrize("size", [(12, 16), (16, 20), (15, 16)])
def test_wrong_size_is_refused(size):
    with pytest.raises(ImageShapeError, match="multiples of 8"):
        tiny().detect(torch.rand(1, 1, *size))


def test_impossible_number_of_steps_is_refused():
    with pytest.raises(SettingError, match="7 of them"):
        tiny(num_inference_steps=7).detect(slices(1))


# --- the training objective ---


@pytest.mark.parametrize("sample", [0, 1, 2])
@pytest.mark.parametrize(
    ("mask_loss", "mask_key", "loss_key"),
    [("mse", "mask_mse", "loss_code"), ("bce", "PAPER_mask_bce", "PAPER_loss_lambda_0p001")],
)
def test_losses_of_the_reference(sample, mask_loss, mask_key, loss_key):
    g = {key: value[sample : sample + 1] for key, value in golden("mad_ad/loss").items()}
    noised = 1 - g["mask_code_1_is_clean"][:, :1]
    logit_noised = torch.log((1 - g["f_mask"]) / g["f_mask"])
    losses = MADADObjective(tiny(), mask_loss=mask_loss).losses(g["z0"], g["f_z0"], noised, logit_noised)
    torch.testing.assert_close(losses["z0_loss"], g["mse"][0])
    torch.testing.assert_close(losses["mask_loss"], g[mask_key][0])
    torch.testing.assert_close(losses["loss"], g[loss_key][0])


@pytest.mark.parametrize("sides", [(1, 1), (2, 4), (8, 1), (8, 8)])
def test_random_mask_has_the_patches_and_counts_of_the_reference(sides, monkeypatch):
    g, rand = golden("mad_ad/random_mask"), torch.rand
    objective = MADADObjective(tiny())
    monkeypatch.setattr("common.methods.mad_ad.MAX_RATIO", 1.0)
    indices = [PATCH_SIZES.index(side) for side in sides]
    monkeypatch.setattr(torch, "multinomial", lambda *_, **__: torch.tensor(indices))
    ratios = g["ratios"].float().view(3, 1)
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: ratios if shape == (3, 1) else rand(*shape))
    mask = objective.random_mask(torch.zeros(3, 4, 32, 32))
    clean = g[f"px{sides[0]}_py{sides[1]}"]
    assert mask.shape == (3, 1, 32, 32)
    assert mask.sum(dim=(1, 2, 3)).tolist() == (1 - clean.float()).sum(dim=(1, 2)).tolist()
    for patches in (mask[:, 0], clean):
        cells = patches.unfold(1, sides[0], sides[0]).unfold(2, sides[1], sides[1]).flatten(3)
        assert torch.equal(cells.amax(3), cells.amin(3))


def test_random_mask_draws_the_ratio_as_documented(monkeypatch):
    monkeypatch.setattr("common.methods.mad_ad.PATCH_PROBABILITIES", (0.0, 1.0, 0.0, 0.0))
    objective, z = MADADObjective(tiny()), torch.zeros(400, 2, 8, 8)
    torch.manual_seed(0)
    shares = objective.random_mask(z).mean(dim=(1, 2, 3)) * 16  # patches of 2 x 2, so 16 of them
    torch.testing.assert_close(shares, shares.round())
    assert shares.min() == 0 or shares.min() == 1
    assert shares.max() == math.ceil(0.4 * 16)
    assert shares.mean() == pytest.approx(0.2 * 16 + 0.5, abs=0.3)  # rounded up


def test_random_mask_covers_a_grid_that_is_no_multiple_of_the_patch(monkeypatch):
    monkeypatch.setattr("common.methods.mad_ad.PATCH_PROBABILITIES", (0.0, 0.0, 1.0, 0.0))
    monkeypatch.setattr("common.methods.mad_ad.MAX_RATIO", 1.0)
    objective = MADADObjective(tiny())
    torch.manual_seed(0)
    masks = torch.stack([objective.random_mask(torch.zeros(1, 2, 6, 10)) for _ in range(50)])
    assert masks.shape[-2:] == (6, 10)
    assert (masks.amax(dim=(0, 1, 2)) == 1).all()


def test_random_subset_is_uniform_and_drawn_for_each_row():
    torch.manual_seed(0)
    counts = torch.tensor([0, 2, 5]).repeat(1000).view(-1, 1)
    subset = random_subset(5, counts)
    assert torch.equal(subset.sum(dim=1, keepdim=True), counts.float())
    twos = subset[1::3]
    assert (twos.mean(dim=0) - 0.4).abs().max() < 0.06
    assert len({tuple(row) for row in twos.tolist()}) == 10  # 5 over 2


def test_cells_that_may_be_noised_are_those_of_the_reference():
    g = golden("mad_ad/brainmask")
    detector = tiny()
    detector.latent_space.downsampling = 8
    allowed = MADADObjective(detector).allowed_cells(g["brainmask"][None, None].bool())
    assert torch.equal(allowed[0, 0], 1 - g["forced_clean_latent"].float())


@pytest.mark.parametrize(("share", "allowed"), [(0.5, 1), (0.51, 0)])
def test_block_of_one_cell_and_share(share, allowed):
    foreground = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    foreground[..., :2, :4] = True  # half of the first cell
    cells = MADADObjective(tiny(), brain_block=1, min_brain_share=share).allowed_cells(foreground)
    assert cells.tolist() == [[[[allowed, 0], [0, 0]]]]


def test_noise_falls_into_allowed_cells_only(monkeypatch):
    monkeypatch.setattr("common.methods.mad_ad.MAX_RATIO", 1.0)
    stub = Stub(lambda z, t: (z, z[:, :1]))
    objective = MADADObjective(tiny(stub), brain_block=1)
    mean = torch.randn(16, 2, 4, 4)
    foreground = torch.zeros(16, 1, 16, 16, dtype=torch.bool)
    foreground[..., 4:12, 4:] = True
    torch.manual_seed(0)
    for _ in range(5):
        objective(foreground=foreground, posterior=(mean, torch.zeros_like(mean)))
    changed = torch.stack([(z != mean).any(dim=1) for z, _ in stub.calls])
    assert not changed[..., [0, 3], :].any()
    assert not changed[..., 0].any()
    assert changed[..., 1:3, 1:].float().mean() == pytest.approx(0.5, abs=0.15)
    times = torch.cat([t for _, t in stub.calls])
    assert times.min() == 0
    assert times.max() == 9


def test_latents_are_sampled_from_the_posterior():
    stub = Stub(lambda z, t: (z, z[:, :1]))
    mean, std = torch.full((64, 2, 4, 4), 3.0), torch.full((64, 2, 4, 4), 0.5)
    torch.manual_seed(0)
    MADADObjective(tiny(stub))(foreground=torch.zeros(64, 1, 16, 16, dtype=torch.bool), posterior=(mean, std))
    z = stub.calls[0][0]
    assert z.mean().item() == pytest.approx(3, abs=0.05)
    assert z.std().item() == pytest.approx(0.5, abs=0.05)


def test_images_and_their_cached_posterior_give_the_same_loss():
    detector, image = tiny(), slices()
    objective = MADADObjective(detector)
    posterior = detector.latent_space.posterior(image)
    torch.manual_seed(0)
    from_images = objective(image)
    torch.manual_seed(0)
    cached = objective(foreground=image > 0, posterior=posterior)
    assert from_images.keys() == cached.keys() == {"loss", "z0_loss", "mask_loss"}
    assert torch.equal(from_images["loss"], cached["loss"])


def test_objective_needs_images_or_a_posterior_with_its_foreground():
    objective, latent = MADADObjective(tiny()), torch.zeros(1, 2, 4, 4)
    for arguments in ({}, {"posterior": (latent, latent)}, {"foreground": torch.ones(1, 1, 16, 16, dtype=torch.bool)}):
        with pytest.raises(ValueError, match="give images"):
            objective(**arguments)


def test_only_the_unet_is_trained():
    objective = MADADObjective(tiny(), mask_weight=1.0).train()
    objective(slices())["loss"].backward()
    assert all(p.grad is not None for p in objective.detector.unet.parameters())
    assert all(p.grad is None for p in objective.detector.latent_space.parameters())


@pytest.mark.parametrize("mask_loss", ["mse", "bce"])
def test_perfect_prediction_costs_nothing(mask_loss):
    mean, foreground = torch.randn(4, 2, 4, 4), torch.ones(4, 1, 16, 16, dtype=torch.bool)
    stub = Stub(lambda z, t: (mean, 200 * (z != mean).any(1, keepdim=True).float() - 100))
    objective = MADADObjective(tiny(stub), mask_loss=mask_loss, mask_weight=1.0)
    assert objective(foreground=foreground, posterior=(mean, torch.zeros_like(mean)))["loss"].item() < 1e-6
