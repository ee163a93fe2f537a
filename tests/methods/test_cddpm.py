"""cDDPM against the golden arrays (golden/cddpm/README.md), and the contract of a method."""

from itertools import pairwise

import pytest
import torch
from arrays import golden, slices
from torch import nn

from common.errors import SettingError
from common.methods.cddpm import CDDPM, CDDPMObjective
from common.networks.conditioned_unet import CodeEncoder, ConditionedUNet

SETTINGS = {"channels": [8, 16], "attention_levels": [False, False], "num_res_blocks": 1, "norm_num_groups": 4}


class Guided(nn.Module):
    """The network of the golden arrays, tanh(0.6 x_t + 0.3 mean(c)) - 0.1 t / 1000; remembers its calls."""

    block_out_channels = (1,)

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x, t, code):
        self.calls.append((x, t, code))
        return torch.tanh(0.6 * x + 0.3 * code.mean(dim=1).view(-1, 1, 1, 1)) - 0.1 * t.view(-1, 1, 1, 1) / 1000


class GivenCode(nn.Module):
    """An encoder whose code is given; remembers what it sees."""

    def __init__(self, code):
        super().__init__()
        self.code, self.seen = code, []

    def forward(self, x):
        self.seen.append(x)
        return self.code


def tiny(**settings):
    torch.manual_seed(0)
    unet = ConditionedUNet(4, **SETTINGS)
    encoder = CodeEncoder(4, channels=[8, 8])
    for parameter in unet.parameters():
        nn.init.normal_(parameter, std=0.2)
    return CDDPM(unet, encoder, **{"erosion": 0, "median_size": 1, **settings}).eval()


def detector_of(g, **settings):
    return CDDPM(Guided(), GivenCode(g["c"]), **settings)


# --- against the golden arrays ---


def test_three_reconstructions():
    g = golden("cddpm/noise_ensemble")
    detector = detector_of(g)
    torch.testing.assert_close(detector.alpha_bar[g["t_index"]], g["alpha_bar"])
    reconstruction = detector.reconstruct(g["x01"], list(g["noise"]))
    torch.testing.assert_close(reconstruction, g["mean_reconstruction"], rtol=0, atol=1e-6)
    residual = (g["x01"] - reconstruction).abs()
    torch.testing.assert_close(residual, g["residual"], rtol=0, atol=1e-6)
    assert (residual - g["VARIANT_mean_of_residuals"]).abs().max() > 1e-3  # another map


@pytest.mark.parametrize("k", range(3))
def test_one_index_and_its_loss(k):
    g = golden("cddpm/noise_ensemble")
    index = int(g["t_index"][k])
    detector = detector_of(g, indices=(index,))
    result = detector.reconstruct(g["x01"], [g["noise"][k]])
    torch.testing.assert_close(result, g["reconstructions"][k], rtol=0, atol=1e-6)
    loss = CDDPMObjective(detector).reconstruction_loss(g["x01"], g["noise"][k], torch.tensor([index, index]))
    torch.testing.assert_close(loss, g["losses"][k])


# --- what is called ---


def test_code_of_the_clean_slice_once_and_three_calls_with_their_own_noise():
    image, encoder = slices(2), GivenCode(torch.zeros(2, 4))
    detector = CDDPM(Guided(), encoder, erosion=0, median_size=1)
    detector.detect(image, seeds=torch.tensor([1, 2]))
    (seen,) = encoder.seen
    torch.testing.assert_close(seen, image)  # in [0, 1], without noise
    assert [t.tolist() for _, t, _ in detector.unet.calls] == [[249, 249], [499, 499], [749, 749]]
    noises = []
    for x, t, _ in detector.unet.calls:
        alpha_bar = detector.alpha_bar[t].float().view(-1, 1, 1, 1)
        noises.append((x - alpha_bar.sqrt() * (image * 2 - 1)) / (1 - alpha_bar).sqrt())
    assert all((a - b).abs().max() > 0.1 for a, b in pairwise(noises))
    assert (noises[0][0] - noises[0][1]).abs().max() > 0.1  # each slice its own


def test_training_noises_the_whole_slice_and_encodes_the_target():
    image, encoder = slices(8), GivenCode(torch.zeros(8, 4))
    detector = CDDPM(Guided(), encoder)
    torch.manual_seed(0)
    CDDPMObjective(detector, max_timestep=100)(image)
    torch.testing.assert_close(encoder.seen[0], image)
    x, t, _ = detector.unet.calls[0]
    assert t.max() < 100
    assert len(set(t.tolist())) > 3
    scaled = detector.alpha_bar[t].float().sqrt().view(-1, 1, 1, 1) * (image * 2 - 1)
    assert ((x - scaled).abs() > 0).float().mean() > 0.95  # the background too; the noise is 0 at pixel (0, 0)


def test_encoder_and_network_learn_together(check_training):
    torch.manual_seed(0)
    detector, image = tiny(), slices(4)
    objective = CDDPMObjective(detector)
    before = {name: value.clone() for name, value in detector.encoder.named_parameters()}
    check_training(objective, image, image > 0, below=0.8)
    for name, value in detector.encoder.named_parameters():
        assert not torch.equal(value, before[name]), name


def test_contrast_follows_the_code_and_a_lesion_does_not():
    """Noised to index 749 little is left of a slice, and the code says how bright it was, but not where a spot was."""
    torch.manual_seed(0)
    network, encoder = ConditionedUNet(4, **SETTINGS), CodeEncoder(4, channels=[8, 8])
    detector = CDDPM(network, encoder, indices=(749,))
    objective = CDDPMObjective(detector)
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.01)
    pattern = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(1)) * 0.4 + 0.6
    for _ in range(120):
        optimizer.zero_grad()
        objective((torch.rand(16, 1, 1, 1) * 0.7 + 0.3) * pattern)["loss"].backward()
        optimizer.step()
    detector.eval()
    dark, bright = 0.35 * pattern, 0.95 * pattern
    noise = [0.5 * torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(2))]

    @torch.no_grad()
    def told(image, code_of):
        detector.encoder = GivenCode(encoder(code_of))
        return detector.reconstruct(image, noise)

    assert told(bright, bright).mean() - told(dark, dark).mean() > 0.3
    assert told(dark, bright).mean() - told(bright, dark).mean() > 0.3
    spotted = dark.clone()
    spotted[..., 6:9, 6:9] = 1
    change = told(dark, spotted) - told(dark, dark)
    assert change[..., 6:9, 6:9].mean() < change.mean() + 0.1


# --- the contract ---


@pytest.mark.parametrize("settings", [{}, {"indices": (499,), "erosion": 1, "median_size": 3}])
def test_detection(check_detection, settings):
    check_detection(tiny(**settings), slices())


def test_slice_gives_the_same_alone_and_in_any_batch(check_batches):
    check_batches(tiny(), slices())


def test_result_depends_on_the_seed_alone(check_seeds):
    check_seeds(tiny(), slices(1))


@pytest.mark.parametrize("indices", [(), (1000,), (249, -1)])
def test_bad_settings_are_refused(indices):
    with pytest.raises(SettingError, match="choose"):
        CDDPM(Guided(), GivenCode(torch.zeros(1, 4)), indices=indices)


def test_parameters_of_the_paper():
    with torch.device("meta"):
        unet = ConditionedUNet(
            512,
            "concatenated",
            factor=1,
            channels=(128, 256, 256),
            attention_levels=(False, False, False),
            num_res_blocks=3,
            num_head_channels=64,
            resblock_updown=True,
        )
    assert sum(p.numel() for p in unet.parameters()) == 44_068_481
