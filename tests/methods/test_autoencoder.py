import pytest
import torch
from torch import nn

from common.methods.autoencoder import AutoencoderObjective
from common.networks.latent_space import LatentSpace
from common.networks.strided_autoencoder import StridedAutoencoderKL


class Shifted(nn.Module):
    """Reconstructs with a constant error; a posterior of constant mean and deviation."""

    def __init__(self, error=0.0, mean=0.0, std=1.0):
        super().__init__()
        self.error, self.mean, self.std = error, mean, std

    def forward(self, x):
        self.seen = x
        latent = torch.zeros(len(x), 3, 2, 2)
        return x + self.error, latent + self.mean, latent + self.std


def objective(autoencoder, **settings):
    return AutoencoderObjective(LatentSpace(autoencoder, 4), **settings).eval()


def test_reconstruction_terms():
    losses = objective(Shifted(error=-0.5))(torch.rand(2, 1, 8, 8))
    assert losses["l1"].item() == pytest.approx(0.5)
    assert losses["l2"].item() == pytest.approx(0.25)
    assert losses["kl"].item() == 0
    assert losses["loss"].item() == pytest.approx(0.5 + 2 * 0.25)


@pytest.mark.parametrize(("mean", "std"), [(0.7, 1.0), (0.0, 0.3), (-1.5, 2.0)])
def test_kl_is_that_of_two_normal_distributions_summed_over_the_latent_per_pixel(mean, std):
    losses = objective(Shifted(mean=mean, std=std), kl_weight=0.1)(torch.rand(2, 1, 8, 8))
    posterior, prior = torch.distributions.Normal(mean, std), torch.distributions.Normal(0.0, 1.0)
    expected = 12 * torch.distributions.kl_divergence(posterior, prior).item() / 64
    assert losses["kl"].item() == pytest.approx(expected, rel=1e-5)
    assert losses["loss"].item() == pytest.approx(0.1 * expected, rel=1e-5)


@pytest.mark.parametrize("batch", [1, 3])
def test_kl_and_reconstruction_have_the_published_ratio(batch):
    """The published code sums both over an image: kl_weight * sum(KL) against sum(L1)."""
    images = torch.zeros(batch, 1, 8, 8)
    losses = objective(Shifted(error=0.5, mean=2.0), kl_weight=1e-6)(images)
    l1_sum, kl_sum = 64 * 0.5, 12 * 2.0  # pixels; values of the latent, mean**2 / 2 each
    ratio = (1e-6 * losses["kl"] / losses["l1"]).item()
    assert ratio == pytest.approx(1e-6 * kl_sum / l1_sum, rel=1e-5)


def test_images_are_brightened_or_darkened_one_by_one_in_training_only():
    autoencoder = Shifted()
    module, images = objective(autoencoder, max_gain=0.2), torch.full((64, 1, 2, 2), 0.9)
    images[..., 0, 0] = 0
    module(images)
    assert torch.equal(autoencoder.seen, images * 2 - 1)
    torch.manual_seed(0)
    module.train()(images)
    seen = (autoencoder.seen + 1) / 2
    assert (seen[..., 0, 0] == 0).all()
    assert seen.max() == 1
    gain = seen[:, 0, 1, 1] / 0.9
    assert gain.min() >= 0.8 - 1e-6
    assert gain.min() < 0.85
    assert ((gain > 1) & (gain < 1.11)).any()
    assert gain.unique().numel() > 30


def test_objective_thaws_the_frozen_autoencoder_and_trains_all_of_it():
    torch.manual_seed(0)
    space = LatentSpace(StridedAutoencoderKL(channels=(4, 8), latent_channels=2, num_res_layers=1), 4)
    module, images = AutoencoderObjective(space), torch.rand(2, 1, 8, 8)
    torch.manual_seed(1)
    before = module(images)["loss"]
    before.backward()
    with torch.no_grad():
        for parameter in space.autoencoder.parameters():
            parameter -= 0.01 * parameter.grad
    torch.manual_seed(1)
    assert module(images)["loss"] < before
