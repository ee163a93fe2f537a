"""AnoDDPM against its reference program: golden/ano_ddpm/README.md. What it shares with `ddpm` is tested there."""

import pytest
import torch
from arrays import golden, slices
from monai.networks.nets import DiffusionModelUNet
from torch import nn

from common.diffusion.simplex import SimplexNoise
from common.methods.ano_ddpm import AnoDDPM, AnoDDPMObjective
from common.methods.ddpm import gaussian_noise

PAPER_UNET = {
    "spatial_dims": 2,
    "in_channels": 1,
    "out_channels": 1,
    "channels": (128, 128, 256, 256, 512, 512),
    "attention_levels": (False, False, False, True, True, True),
    "num_res_blocks": 2,
    "num_head_channels": (0, 0, 0, 128, 256, 256),
    "resblock_updown": True,
}


class Stub(nn.Module):
    """The model of the golden arrays; remembers its calls."""

    block_out_channels = (1,)

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x, t):
        self.calls.append((x, t))
        return torch.tanh(0.7 * x + 0.3) - 0.1 * t.view(-1, 1, 1, 1) / 1000


class Seeded(SimplexNoise):
    """Simplex noise of given seeds, one after the other; remembers the indices."""

    def __init__(self, seeds):
        super().__init__()
        self.seeds = list(seeds)
        self.times = []

    def __call__(self, x, t, generators=None):
        self.times.append(int(t[0]))
        seed = torch.tensor([self.seeds.pop(0)])
        return self.field(x.shape[2:], t[:1], seed).expand_as(x)


def test_up_and_down_with_simplex_noise():
    g = golden("ano_ddpm/forward_backward_simplex_L5")
    noise, stub = Seeded(g["seeds_in_order"].tolist()), Stub()
    detector = AnoDDPM(stub, level=5, forward_noise=noise, reverse_noise=noise)
    result = detector.reconstruct(g["x0"], [])
    states = torch.stack([x for x, _ in stub.calls] + [result])
    torch.testing.assert_close(states, g["trajectory"][1:], atol=6e-4, rtol=0)
    assert noise.times == [4, 4, 3, 2, 1]  # the height of the plane is the index


def test_training_loss():
    g = golden("ano_ddpm/train_loss_simplex")
    objective, t = AnoDDPMObjective(AnoDDPM(Stub())), g["t"].view(1)
    noise = Seeded([int(g["seed"])])(g["x0"], t)
    torch.testing.assert_close(noise[0, 0].double(), g["noise"], atol=6e-4, rtol=0)
    loss = objective.noise_loss(g["x0"], t, noise)
    torch.testing.assert_close(loss, g["loss"][0], atol=1e-3, rtol=0)
    torch.testing.assert_close(objective.detector.unet.calls[0][0], g["x_t"], atol=3e-4, rtol=0)


def test_defaults_are_the_published_ones():
    detector = AnoDDPM(Stub())
    assert detector.steps == [(t, t - 1) for t in range(249, -1, -1)]
    assert detector.residual == "squared"
    assert detector.scheduler.variance_type == "fixed_large"
    for noise in (detector.forward_noise, detector.reverse_noise):
        assert (noise.octaves, noise.persistence, noise.frequency, noise.mode) == (6, 0.8, 64.0, "3d")
    assert AnoDDPMObjective(detector).max_timestep == 800


def test_noises_are_chosen_separately():
    def recorded(name, drawn):
        def noise(x, t, generators=None):
            drawn.append((name, int(t[0])))
            return gaussian_noise(x, t, generators)

        return noise

    drawn = []
    settings = {"forward_noise": recorded("up", drawn), "reverse_noise": recorded("down", drawn)}
    AnoDDPM(Stub(), level=3, **settings).detect(slices(1))
    assert drawn == [("up", 2), ("down", 2), ("down", 1)]


def test_training_has_the_noise_of_the_way_up():
    objective, image = AnoDDPMObjective(AnoDDPM(Stub())), slices(2)
    torch.manual_seed(3)
    objective(image)
    x_t, t = objective.detector.unet.calls[0]
    alpha_bar = objective.detector.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    noise = (x_t - alpha_bar.sqrt() * (image * 2 - 1)) / (1 - alpha_bar).sqrt()
    torch.manual_seed(3)
    torch.randint(800, (2,))
    torch.testing.assert_close(noise, SimplexNoise()(image, t), atol=1e-3, rtol=0)


@pytest.mark.parametrize("reverse_noise", [None, gaussian_noise])
def test_slice_gives_the_same_alone_and_in_any_batch(check_batches, check_seeds, reverse_noise):
    detector = AnoDDPM(Stub(), level=3, reverse_noise=reverse_noise)
    check_batches(detector, slices(3))
    check_seeds(detector, slices(1), differ=1e-4)


def test_parameters_of_the_paper():
    with torch.device("meta"):
        network = DiffusionModelUNet(**PAPER_UNET)
    assert sum(p.numel() for p in network.parameters()) == 131_649_793
    assert AnoDDPM(network).size_divisor == 32
