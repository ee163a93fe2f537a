import pytest
import torch
from monai.networks.nets import AutoencoderKL
from torch import nn

from common.networks.latent_space import LatentSpace
from common.networks.strided_autoencoder import StridedAutoencoderKL


class Doubling(nn.Module):
    """Latent = 2 x image, so that ranges and scales show."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))

    def encode(self, x):
        return self.factor * x, torch.full_like(x, 0.5)

    def decode(self, z):
        return z / self.factor


def test_images_are_in_minus_one_to_one_inside():
    mean, std = LatentSpace(Doubling(), 1).posterior(torch.tensor([0.0, 0.5, 1.0]))
    torch.testing.assert_close(mean, torch.tensor([-2.0, 0.0, 2.0]))
    torch.testing.assert_close(std, torch.full((3,), 0.5))


@pytest.mark.parametrize("spread", [0.1, 7.0])
def test_fitted_scale_gives_latents_of_unit_deviation(spread):
    space = LatentSpace(Doubling(), 1)
    image = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * spread
    unscaled_std = space.posterior(image)[1]
    space.fit_scale(space.autoencoder.encode(image * 2 - 1)[0], torch.ones_like(image, dtype=torch.bool))
    mean, std = space.posterior(image)
    assert float(mean.std()) == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(std, unscaled_std * space.scale)
    torch.testing.assert_close(space.decode(mean), image, atol=1e-5, rtol=1e-5)


def test_scale_is_part_of_the_weights():
    space, other = LatentSpace(Doubling(), 1), LatentSpace(Doubling(), 1)
    space.fit_scale(torch.randn(2, 1, 8, 8) * 3, torch.ones(2, 1, 8, 8, dtype=torch.bool))
    other.load_state_dict(space.state_dict())
    assert torch.equal(other.scale, space.scale)
    assert other.scale != 1


def test_each_channel_is_standardised_by_the_cells_of_the_brain():
    generator = torch.Generator().manual_seed(0)
    spread, offset = torch.tensor([0.5, 2.0])[:, None, None], torch.tensor([1.0, -3.0])[:, None, None]
    z = torch.randn(4, 2, 8, 8, generator=generator) * spread + offset
    foreground = torch.zeros(4, 1, 16, 16, dtype=torch.bool)
    foreground[..., 4:12, 4:12] = True
    z[..., :2, :] = 100.0  # what the background holds does not count

    space = LatentSpace(Doubling(), 2, standardised_channels=2)
    space.fit_scale(z, foreground)
    inside = ((z - space.shift) * space.scale)[..., 2:6, 2:6].movedim(1, 0).flatten(1)
    torch.testing.assert_close(inside.mean(1), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(inside.std(1), torch.ones(2), atol=1e-5, rtol=0)

    image = torch.rand(1, 2, 8, 8, generator=generator)
    torch.testing.assert_close(space.decode(space.posterior(image)[0]), image)
    other = LatentSpace(Doubling(), 2, standardised_channels=2)
    other.load_state_dict(space.state_dict())
    assert torch.equal(other.shift, space.shift)


@pytest.mark.parametrize(
    "autoencoder",
    [
        lambda: StridedAutoencoderKL(channels=(4, 8), latent_channels=3, num_res_layers=1),
        lambda: AutoencoderKL(2, 1, 1, (1, 1, 1), (4, 4, 8), (False,) * 3, 3, norm_num_groups=2),
    ],
    ids=["strided", "monai"],
)
def test_autoencoder_is_frozen_and_can_be_exchanged(autoencoder):
    space = LatentSpace(autoencoder(), downsampling=4).eval()
    assert not any(p.requires_grad for p in space.parameters())
    image = torch.rand(2, 1, 16, 8)
    mean, std = space.posterior(image)
    assert mean.shape == std.shape == (2, 3, 16 // space.downsampling, 8 // space.downsampling)
    assert space.decode(mean).shape == image.shape
