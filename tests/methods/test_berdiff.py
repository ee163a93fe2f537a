"""BerDiff against its reference program (golden/berdiff/README.md), and the contract of a method."""

import math

import pytest
import torch
from arrays import generators, golden, slices
from monai.data import MetaTensor, list_data_collate
from monai.networks.nets import PatchDiscriminator
from monai.networks.nets.diffusion_model_unet import get_timestep_embedding
from torch import nn

from common.detection.method import median
from common.detection.volume import VolumeDetector
from common.diffusion.bernoulli import BernoulliScheduler
from common.errors import ImageShapeError, SettingError
from common.methods import berdiff
from common.methods.berdiff import (
    LOGIT_ERROR,
    BerDiff,
    BerDiffObjective,
    BinaryAutoencoderObjective,
    decided,
    flip_unet,
    in_equal_batches,
    uniform_like,
)
from common.networks.binary_autoencoder import BinaryLatentSpace, StridedBinaryAutoencoder

REFERENCES = ["paper", "code"]


class Stub(nn.Module):
    """Stands for the U-Net: gives the logits of eps(z_t, t); remembers its calls."""

    block_out_channels = (8, 16)

    def __init__(self, eps):
        super().__init__()
        self.eps = eps
        self.calls = []

    def forward(self, z_t, t):
        self.calls.append((z_t, t))
        eps = self.eps(z_t, t)
        return torch.log(eps) - torch.log1p(-eps)


def tiny(unet=None, channels=1, scheduler=None, reference="paper", **settings):
    """A detector of tiny networks with random weights; heads that start at zero would hide mistakes."""
    torch.manual_seed(0)
    autoencoder = StridedBinaryAutoencoder(in_channels=channels, channels=(4, 8), latent_channels=6, num_res_layers=1)
    network = flip_unet(6, (8, 16), 1, (False, True), norm_num_groups=4)
    for parameter in [*autoencoder.parameters(), *network.parameters()]:
        nn.init.normal_(parameter, std=0.3)
    space = BinaryLatentSpace(autoencoder, 4)
    settings = {"L": 20, "num_inference_steps": 5, "batch_size": 2, **settings}
    return BerDiff(space, unet or network, scheduler or BernoulliScheduler(reference=reference), **settings).eval()


def code(*shape, seed=0):
    return torch.randint(2, shape, generator=torch.Generator().manual_seed(seed)).float()


# --- Algorithm 1 ---


def published_loop(z, eps_of, L, P, generators, is_reference):
    """Algorithm 1 as the spec has it (section 4.2), or as the published program does, in float64."""
    scheduler = BernoulliScheduler()
    alpha, abar = scheduler.alphas, scheduler.alpha_bar
    u, start = uniform_like(z, generators), L if is_reference else L - 1
    z = z.double()
    kept, flipped = u < abar[start] * z, u < (1 - abar[start]) / 2
    z_t = kept.double() if is_reference else (z - flipped.double()).abs()
    mask = torch.zeros_like(z)
    for i in range(L - 1, -1, -1):
        eps = eps_of(z_t, torch.full((len(z),), i)).double()
        z0 = z_t * (1 - eps) + (1 - z_t) * eps
        if is_reference and i == 0:
            return z0, mask
        mask = torch.maximum(mask, (eps > P).double())
        z0 = mask * z0 + (1 - mask) * z
        before = abar[i - 1] if i > 0 else 1.0

        def theta(x, z_t=z_t, i=i, before=before):
            on = (alpha[i] * z_t + (1 - alpha[i]) / 2) * (before * x + (1 - before) / 2)
            off = (alpha[i] * (1 - z_t) + (1 - alpha[i]) / 2) * (before * (1 - x) + (1 - before) / 2)
            return on / (on + off)

        u = uniform_like(z, generators)
        expected = z0 * theta(torch.ones_like(z0)) + (1 - z0) * theta(torch.zeros_like(z0))
        z_t = (u < (theta(z0) if is_reference else expected)).double()
    return z_t, mask


def eps_of(z_t, t):
    """A made-up network: neighbours and time matter, values on both sides of 0.5 that differ between samples."""
    wave = torch.sin(3 * z_t + 2 * z_t.roll(1, -1) + 0.37 * torch.arange(z_t[0].numel()).view(z_t[0].shape))
    return (0.45 + 0.35 * wave + 0.003 * t.view(-1, 1, 1, 1)).clamp(0.01, 0.99)


@pytest.mark.parametrize("P", [0.0, 0.5, 0.75])
@pytest.mark.parametrize("is_reference", [False, True])
def test_walk_is_the_published_loop(is_reference, P):
    settings = {"num_inference_steps": None, "L": 30, "P": P}
    if is_reference:
        settings["scheduler"] = BernoulliScheduler(soft_z0="inserted", reference="code")
    z = code(2, 6, 4, 4)
    result, mask = tiny(Stub(eps_of), **settings).sample(z, generators(3, 4))
    expected, expected_mask = published_loop(z, eps_of, 30, P, generators(3, 4), is_reference)
    torch.testing.assert_close(result, expected.float())
    assert torch.equal(mask.double(), expected_mask)
    share = mask.float().mean(dim=(1, 2, 3))
    assert (share == 1).all() if P == 0 else (share[0] != share[1] and share.min() > 0 and share.max() < 1)


@pytest.mark.parametrize("t", [199, 57, 1, 0])
def test_masked_step_of_the_reference(t):
    """One step from z_t: the first call only finds the mask that the reference begins with."""
    g = golden("berdiff/masked_step")
    scheduler = BernoulliScheduler(soft_z0="inserted")
    scheduler.add_noise = lambda z, u, start: g["z_t"]
    assert g["eps"][0, 0, 0, 0] == 0.5
    seen, step = [], scheduler.step
    scheduler.step = lambda z_t, z0, *args: seen.append(z0) or step(z_t, z0, *args)
    detector = tiny(Stub(lambda z_t, i: g["eps"]), scheduler=scheduler, P=g["prob_threshold"].item())
    scheduler.timesteps = [t]
    _, mask = detector.sample(g["z_org"], generators(0))
    expected = g["t0_paper_mask"] if t == 0 else g[f"t{t}_mask"]
    mask = mask | g["mask_in"].bool()
    assert torch.equal(mask, expected.bool())
    kept = g["mask_in"] == 0  # the reference begins with a mask
    stitched = g["t0_paper_z0_stitched"] if t == 0 else g[f"t{t}_z0_stitched"]
    torch.testing.assert_close(seen[0][kept], stitched[kept], atol=1e-6, rtol=0)


def test_last_step_of_the_reference_is_soft_and_leaves_the_mask():
    g = golden("berdiff/masked_step")
    scheduler = BernoulliScheduler(reference="code")
    scheduler.add_noise = lambda z, u, start: g["z_t"]
    detector = tiny(Stub(lambda z_t, i: g["eps"]), scheduler=scheduler)
    scheduler.timesteps = [0]
    result, mask = detector.sample(g["z_org"], generators(0))
    torch.testing.assert_close(result, g["t0_sample"], atol=1e-6, rtol=0)
    assert not mask.any()


def test_final_codes():
    """One call: eps is 0.8 in the upper half, which is masked, and 0.3 in the lower, which is kept."""
    eps = torch.full((1, 6, 4, 4), 0.3)
    eps[:, :, :2] = 0.8
    z, results, calls = code(1, 6, 4, 4), {}, {}
    for reference in REFERENCES:
        stub = Stub(lambda z_t, t: eps)
        results[reference], mask = tiny(stub, num_inference_steps=1, reference=reference).sample(z, generators(5))
        assert mask.any() == (reference == "paper")
        calls[reference] = stub.calls[0][0][:1]
    torch.testing.assert_close(results["code"], (calls["code"] - eps).abs())
    assert torch.equal(results["paper"][:, :, 2:], z[:, :, 2:])
    assert set(results["paper"].unique().tolist()) == {0, 1}
    likely = 1 - calls["paper"]
    agreement = (results["paper"] == likely)[:, :, :2].float().mean().item()
    assert agreement == pytest.approx(0.8, abs=0.15)


def test_entries_that_the_network_agrees_with_are_those_of_the_input():
    stub = Stub(lambda z_t, t: torch.full_like(z_t, 0.5))  # 0.5 is not above P
    z = code(2, 6, 4, 4)
    result, mask = tiny(stub).sample(z, generators(0, 1))
    assert not mask.any()
    assert torch.equal(result, z)
    assert any(not torch.equal(z_t, z) for z_t, _ in stub.calls)


def test_mask_only_grows_and_stays_in_its_sample():
    def eps(z_t, t):
        result = torch.full_like(z_t, 0.1)
        result[0, 0, 0, 0] = 0.9 if t[0] == 19 else 0.1  # at the first call only
        return result

    z = code(2, 6, 4, 4)
    _, mask = tiny(Stub(eps)).sample(z, generators(0, 1))
    assert mask.nonzero().tolist() == [[0, 0, 0, 0]]


def test_unmasked_variant_masks_everything_even_what_is_certain():
    class Certain(Stub):
        def forward(self, z_t, t):
            return torch.full_like(z_t, -1000.0)  # sigmoid is exactly 0

    detection = tiny(Certain(None), P=0.0).detect(slices())
    assert detection.score.tolist() == [1, 1, 1]


@pytest.mark.parametrize(("steps", "expected"), [(5, [19, 15, 11, 7, 3]), (None, list(range(19, -1, -1)))])
def test_network_is_asked_with_the_indices_of_the_jumps(steps, expected):
    stub = Stub(eps_of)
    tiny(stub, num_inference_steps=steps).detect(slices(2))
    assert [t.tolist() for _, t in stub.calls] == [[i, i] for i in expected]


@pytest.mark.parametrize(("reference", "offset"), [("paper", 0), ("code", 1)])
def test_noise_goes_as_far_as_the_first_step_or_beyond(reference, offset):
    detector, starts = tiny(reference=reference), []
    detector.scheduler.add_noise = lambda z, u, t: starts.append(t.tolist()) or z
    detector.sample(code(3, 6, 4, 4), generators(0, 1, 2))
    assert starts == [[19 + offset] * 3]


# --- the detection ---


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("channels", [1, 3])
def test_detection(check_detection, monkeypatch, reference, channels):
    """The map is the squared difference to what was decoded, median filtered, within the foreground."""
    decoded, image = [], slices(channels=channels)
    detector = tiny(reference=reference, channels=channels)
    decode = detector.latent_space.decode
    monkeypatch.setattr(detector.latent_space, "decode", lambda z: decoded.append(decode(z).clamp(0, 1)) or decoded[-1])
    detection = check_detection(detector, image)
    difference = (image - decoded[-1]).square().sum(1, keepdim=True)
    foreground = (image > 0).any(1, keepdim=True)
    torch.testing.assert_close(detection.reconstruction, decoded[-1] * foreground)
    torch.testing.assert_close(detection.anomaly_map, median(difference, 5) * foreground)
    assert (detection.anomaly_map - difference * foreground).abs().max() > 1e-3


@pytest.mark.parametrize("P", [0.6, 0.8])
def test_score_is_the_share_of_masked_entries_of_each_slice(P):
    detector, image = tiny(P=P), slices()
    detection = detector.detect(image, seeds=torch.tensor([4, 5, 6]))
    noise = generators(4, 5, 6)
    p, _ = detector.latent_space.posterior(image)
    _, mask = detector.sample((uniform_like(p, noise) < p).float(), noise)
    assert torch.equal(detection.score, mask.float().mean(dim=(1, 2, 3)))
    assert len(detection.score.unique()) > 1


@pytest.mark.parametrize(
    "settings", [{}, {"P": 0.0}, {"reference": "code", "num_passes": 2}, {"num_inference_steps": None}]
)
def test_slice_gives_the_same_alone_and_in_any_batch(check_batches, settings):
    check_batches(tiny(**settings), slices())


@pytest.mark.parametrize("count", [1, 2, 4, 5])
def test_networks_see_batches_of_one_size_only(count):
    z, t = code(count, 6, 4, 4), torch.arange(count)
    seen = []
    result = in_equal_batches(lambda z, t: seen.append((len(z), len(t))) or z + t.view(-1, 1, 1, 1), 4, z, t)
    assert seen == [(4, 4)] * math.ceil(count / 4)
    assert torch.equal(result, z + t.view(-1, 1, 1, 1))


def test_bits_of_a_slice_do_not_depend_on_its_batch():
    """Of a network of the bundle's size, whose roundings do depend on the size of a batch."""
    torch.manual_seed(0)
    unet = flip_unet(16, (32, 64, 128), 1, (False, True, True)).eval()
    for parameter in unet.parameters():
        nn.init.normal_(parameter, std=0.05)
    z, t = code(9, 16, 24, 24), torch.arange(9)
    with torch.no_grad():
        together = in_equal_batches(unet, 4, z, t)
        for index in ([8], [3, 0], [7, 6, 5, 4, 3]):
            assert torch.equal(in_equal_batches(unet, 4, z[index], t[index]), together[index])


@pytest.mark.parametrize("P", [0.0, 0.5])
def test_draws_of_a_slice_do_not_depend_on_its_batch(P):
    """Of such a network: the same bits alone as in a full batch, nearly always without filling up the batch."""
    torch.manual_seed(0)
    unet = flip_unet(16, (32, 64, 128), 1, (False, True, True)).eval()
    for parameter in unet.parameters():
        nn.init.normal_(parameter, std=0.05)
    detector, sizes = tiny(unet, P=P, batch_size=4), []
    unet.register_forward_hook(lambda module, inputs, logits: sizes.append(len(logits)))
    z = code(4, 16, 24, 24)
    with torch.no_grad():
        together, mask = detector.sample(z, generators(0, 1, 2, 3))
        assert sizes == [4] * 5
        for index in ([3], [1, 0]):
            sizes.clear()
            alone, own_mask = detector.sample(z[index], generators(*index))
            assert torch.equal(alone, together[index])
            assert torch.equal(own_mask, mask[index])
            assert sizes.count(len(index)) == 5


@pytest.mark.parametrize("error", [-0.5, 0.5])
def test_decision_that_rounding_could_change_is_that_of_a_full_batch(error):
    """A network whose logits are other ones in a full batch, by less than the error that is allowed for."""
    u = torch.rand(4, 50, generator=torch.Generator().manual_seed(1))
    near = torch.logit(u) + error * LOGIT_ERROR / 2  # in a full batch on the other side of u
    calls = []

    def network(x):
        calls.append(len(x))
        return x - error * LOGIT_ERROR * (len(x) == 4)

    def decide(logits, u):
        return logits.sigmoid() > u, logits > 3

    far = torch.logit(u) + 0.1
    for logits, expected_calls in ((near, [2, 4]), (far, [2])):
        full = decided(network, decide, 4, (logits,), (u,))
        calls.clear()
        alone = decided(network, decide, 4, (logits[:2],), (u[:2],))
        assert all(torch.equal(one, both[:2]) for one, both in zip(alone, full, strict=True))
        assert calls == expected_calls
    assert (decide(near, u)[0] != decide(network(near), u)[0]).any()


@pytest.mark.parametrize("error", [0.0, 0.9])
def test_bits_that_rounding_could_change_are_those_of_a_full_batch(error, monkeypatch):
    """Of an encoder that gives other probabilities in a full batch, by less than the error that is allowed for."""
    detector, image, seeds, sizes = tiny(num_passes=3), slices(2), torch.tensor([1, 2]), []
    _, std = detector.latent_space.posterior(image)
    u = uniform_like(std, generators(1, 2))  # of the first pass

    def posterior(x):
        sizes.append(len(x))
        off = LOGIT_ERROR * std[: len(x)] * (0.5 if len(x) == 2 else -0.5)
        return u[: len(x)] + (error * off if error else 0.1), std[: len(x)]

    drawn = []
    monkeypatch.setattr(detector.latent_space, "posterior", posterior)
    monkeypatch.setattr(detector, "sample", lambda z, g: drawn.append(z) or BerDiff.sample(detector, z, g))
    detector.detect(image, seeds=seeds)
    together, sizes[:] = list(drawn), []
    drawn.clear()
    detector.detect(image[:1], seeds=seeds[:1])
    assert all(torch.equal(one, both[:1]) for one, both in zip(drawn, together, strict=True))
    assert sizes == ([1, 2] if error else [1])


def test_full_batches_are_encoded_once(monkeypatch):
    """However near the decisions of the batch that is not full; the bits are those of full batches."""
    monkeypatch.setattr(berdiff, "LOGIT_ERROR", 1.0)
    detector, image, sizes, drawn = tiny(), slices(3), [], []
    posterior, seeds = detector.latent_space.posterior, torch.tensor([1, 2, 3])
    monkeypatch.setattr(detector.latent_space, "posterior", lambda x: sizes.append(len(x)) or posterior(x))
    monkeypatch.setattr(detector, "sample", lambda z, g: drawn.append(z) or BerDiff.sample(detector, z, g))
    detector.detect(image, seeds=seeds)
    assert sizes == [2, 1, 2]
    for part in (slice(2), slice(2, 3)):
        detector.detect(image[part], seeds=seeds[part])
        assert torch.equal(drawn.pop(), drawn[0][part])


def test_volumes_with_meta_data_as_inference_has_them():
    volume = slices(3)[:, 0].movedim(0, -1)[None]
    batch = list_data_collate([{"image": MetaTensor(volume, meta={"filename_or_obj": "a.nii.gz"})}])["image"]
    network = VolumeDetector(tiny())
    assert torch.equal(network(batch).as_tensor(), network(volume[None]))


def test_result_depends_on_the_seed_alone(check_seeds):
    check_seeds(tiny(), slices(1))


def test_bits_of_the_input_are_drawn():
    stub = Stub(lambda z_t, t: torch.full_like(z_t, 0.4))  # masks nothing, so the code of the input is decoded
    image = slices(1)
    p, _ = tiny().latent_space.posterior(image)
    decoded = []
    detector = tiny(stub)
    detector.latent_space.decode = lambda z: decoded.append(z) or torch.zeros_like(image)
    detector.detect(image, seeds=torch.tensor([3]))
    assert torch.equal(decoded[0], (uniform_like(p, generators(3)) < p).float())
    assert not torch.equal(decoded[0], (p > 0.5).float())


@pytest.mark.parametrize("compared_with", ["image", "decoded"])
@pytest.mark.parametrize("combine", ["maps", "reconstructions", "mahalanobis"])
def test_passes_are_combined(combine, compared_with):
    image, noise = slices(2, channels=2), generators(1, 2)
    detector = tiny(num_passes=3, combine=combine, regularisation=0.02, channels=2, compared_with=compared_with)
    p, _ = detector.latent_space.posterior(image)
    seen = image if compared_with == "image" else detector.latent_space.decode(p).clamp(0, 1)
    passes = [detector.one_pass((uniform_like(p, noise) < p).float(), noise) for _ in range(3)]
    assert not torch.equal(passes[0][0], passes[1][0])
    x_hat, score = (torch.stack(part) for part in zip(*passes, strict=True))
    expected = {
        "maps": ((seen - x_hat) ** 2).mean(0),
        "reconstructions": (seen - x_hat.mean(0)) ** 2,
        "mahalanobis": (seen - x_hat.mean(0)) ** 2 / (((x_hat - x_hat.mean(0)) ** 2).mean(0) + 0.02),
    }[combine].sum(1, keepdim=True)
    detection = detector.detect(image, seeds=torch.tensor([1, 2]))
    foreground = image > 0
    torch.testing.assert_close(detection.anomaly_map, median(expected, 5) * foreground[:, :1])
    torch.testing.assert_close(detection.reconstruction, x_hat.mean(0) * foreground)
    torch.testing.assert_close(detection.score, score.mean(0))


@pytest.mark.parametrize(
    ("settings", "fact"),
    [
        ({"P": -0.1}, "P = "),
        ({"P": 1.0}, "P = "),
        ({"num_passes": 0}, "num_passes"),
        ({"regularisation": 0.0}, "regularisation"),
        ({"batch_size": 0}, "batch_size"),
        ({"L": 0, "num_inference_steps": None}, "L = 0"),
        ({"L": 1001}, "L = 1001"),
        ({"L": 1000, "num_inference_steps": None, "reference": "code"}, "choose 1 to 999"),
        ({"L": 20, "num_inference_steps": 21}, "21 steps"),
        ({"num_inference_steps": 0}, "0 steps"),
    ],
)
def test_impossible_settings_are_refused(settings, fact):
    with pytest.raises(SettingError, match=fact):
        tiny(**settings)


@pytest.mark.parametrize("size", [(12, 16), (16, 20)])
def test_wrong_size_is_refused(size):
    with pytest.raises(ImageShapeError, match="multiples of 8"):
        tiny().detect(torch.rand(1, 1, *size))


# --- the network ---


def test_network_starts_undecided_with_silent_attention():
    unet = flip_unet(6, (8, 16), 1, (False, True), norm_num_groups=4)
    assert (unet(code(2, 6, 4, 4), torch.tensor([0, 999])) == 0).all()
    outputs = [m.out_proj for m in unet.modules() if hasattr(m, "out_proj")]
    assert len(outputs) == 1 + 2 + 1  # the lower level down and up, and the middle
    assert all((o.weight == 0).all() and (o.bias == 0).all() for o in outputs)
    assert {m.eps for m in unet.modules() if isinstance(m, nn.GroupNorm)} == {1e-5}
    assert {m.num_heads for m in unet.modules() if hasattr(m, "num_heads")} == {1}


def test_time_is_embedded_as_in_the_reference():
    g = golden("berdiff/timestep_embedding")
    torch.testing.assert_close(get_timestep_embedding(g["t"], int(g["dim"])), g["embedding"], atol=2e-4, rtol=0)


# --- the training objective ---


@pytest.mark.parametrize("sample", [0, 1, 2])
@pytest.mark.parametrize(
    ("z_t", "loss", "factor"),
    [
        ("z_t_paper_xor", "loss_nats_paper", 1.0),
        ("z_t_paper_xor", "loss_bits_paper", math.log(2)),
        ("z_t_reference", "loss_bits_reference", math.log(2)),
    ],
)
def test_loss_of_the_reference(sample, z_t, loss, factor):
    g = golden("berdiff/loss")
    eps = g["eps_pred"].clamp(1e-7, 1 - 1e-7).double()  # the clamp of the reference, in float32
    logits = torch.log(eps) - torch.log1p(-eps)
    arguments = (value[sample : sample + 1] for value in (g["z0"], g[z_t], logits))
    result = BerDiffObjective(tiny()).flip_loss(*arguments)
    assert result.item() == pytest.approx(g[loss][sample].item() * factor, rel=1e-4)


def test_noised_bits_of_the_posterior_are_given_to_the_network():
    stub = Stub(lambda z_t, t: torch.full_like(z_t, 0.5))
    p = torch.full((400, 6, 4, 4), 0.2)
    torch.manual_seed(0)
    losses = BerDiffObjective(tiny(stub))(posterior=(p, torch.zeros_like(p)))
    assert losses.keys() == {"loss"}
    assert losses["loss"].item() == pytest.approx(math.log(2))
    z_t, t = stub.calls[0]
    assert t.shape == (400,)
    assert 0 <= t.min() < 20
    assert 980 < t.max() <= 999
    abar = BernoulliScheduler().alpha_bar[t].view(-1, 1, 1, 1)
    torch.testing.assert_close(z_t.mean().double(), (abar * 0.2 + (1 - abar) / 2).mean(), atol=0.01, rtol=0)


@pytest.mark.parametrize("max_t", [1, 7])
def test_training_may_leave_out_the_noise_that_detection_never_sees(max_t):
    stub = Stub(lambda z_t, t: torch.full_like(z_t, 0.5))
    p = torch.full((200, 6, 4, 4), 0.2)
    torch.manual_seed(0)
    BerDiffObjective(tiny(stub), max_t=max_t)(posterior=(p, p))
    assert stub.calls[0][1].unique().tolist() == list(range(max_t))


@pytest.mark.parametrize("max_t", [0, 1001])
def test_impossible_times_are_refused(max_t):
    with pytest.raises(SettingError, match=f"max_t = {max_t}"):
        BerDiffObjective(tiny(), max_t=max_t)


def test_a_network_that_knows_the_flips_costs_nothing():
    p = (torch.rand(8, 6, 4, 4) < 0.5).float()  # certain bits, so that z0 = p
    stub = Stub(lambda z_t, t: (z_t - p).abs().clamp(1e-6, 1 - 1e-6))
    assert BerDiffObjective(tiny(stub))(posterior=(p, p))["loss"].item() < 1e-5


def test_images_and_their_cached_posterior_give_the_same_loss():
    detector, image = tiny(), slices()
    objective = BerDiffObjective(detector)
    torch.manual_seed(0)
    from_images = objective(image)
    torch.manual_seed(0)
    cached = objective(foreground=image > 0, posterior=detector.latent_space.posterior(image))
    assert torch.equal(from_images["loss"], cached["loss"])
    with pytest.raises(ValueError, match="give images"):
        objective(foreground=image > 0)


def test_only_the_unet_is_trained():
    objective = BerDiffObjective(tiny()).train()
    objective(slices())["loss"].backward()
    assert all(p.grad is not None for p in objective.detector.unet.parameters())
    assert all(p.grad is None for p in objective.detector.latent_space.parameters())


def test_training_lowers_the_loss(check_training):
    detector, posterior = tiny(), (code(4, 6, 4, 4), torch.zeros(4, 6, 4, 4))
    objective = BerDiffObjective(detector, max_t=300)
    check_training(objective, posterior=posterior, below=0.7, steps=60, lr=3e-3)


# --- the objective of the autoencoder ---


class Shifted(nn.Module):
    """Reconstructs with a constant error."""

    def __init__(self, error):
        super().__init__()
        self.error = nn.Parameter(torch.tensor(error))

    def forward(self, x):
        return x + self.error, torch.full((len(x), 2, 1, 1), 0.5), torch.full((len(x), 2, 1, 1), 0.5)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"reconstruction": "l1"}, 0.5),
        ({"reconstruction": "l2"}, 0.25),
        ({"reconstruction": "both"}, 1.0),
        ({"reconstruction": "both", "indecision_weight": 0.1}, 1.1),
    ],
)
def test_reconstruction_loss(settings, expected):
    """Each bit of `Shifted` is a coin, so that its indecision is 1."""
    losses = BinaryAutoencoderObjective(BinaryLatentSpace(Shifted(-0.5), 4), **settings)(torch.rand(2, 1, 8, 8))
    assert losses.keys() == {"loss", "l1", "l2", "indecision"}
    assert losses["l1"].item() == pytest.approx(0.5)
    assert losses["l2"].item() == pytest.approx(0.25)
    assert losses["indecision"].item() == pytest.approx(1.0)
    assert losses["loss"].item() == pytest.approx(expected)


def test_perceptual_term_is_added_and_frozen():
    features = nn.Conv2d(1, 1, 1)

    class Distance(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = features

        def forward(self, a, b):
            return (self.features(a) - self.features(b)).abs().mean()

    space = BinaryLatentSpace(Shifted(-0.5), 4)
    losses = BinaryAutoencoderObjective(space, perceptual=Distance())(torch.rand(2, 1, 8, 8))
    assert losses["perceptual"].item() == pytest.approx(0.5 * features.weight.abs().item(), rel=1e-4)
    assert losses["loss"].item() == pytest.approx(0.5 + losses["perceptual"].item())
    assert not features.weight.requires_grad


def test_the_players_gradients_stop_at_each_other():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(2, 4, 1, num_layers_d=1)
    space, image = tiny().latent_space, torch.rand(2, 1, 16, 16)
    objective = BinaryAutoencoderObjective(space, discriminator=discriminator)
    losses = objective(image)
    total = losses["l1"] + 0.1 * losses["generator"] + losses["discriminator"]
    torch.testing.assert_close(losses["loss"], total)
    players = {"generator": space.autoencoder, "discriminator": discriminator}
    for name, player in players.items():
        objective.zero_grad()
        losses[name].backward(retain_graph=True)
        trained = [any(p.grad is not None and p.grad.abs().max() > 0 for p in m.parameters()) for m in players.values()]
        assert trained == [module is player for module in players.values()]


def test_autoencoder_is_thawed_and_learns(check_training):
    torch.manual_seed(0)
    objective, images = BinaryAutoencoderObjective(tiny().latent_space), slices(4)
    check_training(objective, images, below=0.7, steps=60, lr=3e-3)
