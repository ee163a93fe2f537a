import inspect
import math

import pytest
import torch
from monai.networks.nets import AutoencoderKL

from common.networks.strided_autoencoder import StridedAutoencoderKL


def tiny(channels=(4, 8), **settings):
    torch.manual_seed(0)
    return StridedAutoencoderKL(channels=channels, latent_channels=3, num_res_layers=1, **settings)


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("in_channels", [1, 2])
def test_each_level_halves_the_resolution(levels, in_channels):
    network, x = tiny((4, 6, 8)[:levels], in_channels=in_channels), torch.randn(2, in_channels, 16, 24)
    mean, std = network.encode(x)
    assert mean.shape == std.shape == (2, 3, 16 // 2**levels, 24 // 2**levels)
    assert (std > 0).all()
    assert network.decode(mean).shape == x.shape


def test_forward_decodes_a_sample_of_the_posterior():
    network, x = tiny(), torch.randn(2, 1, 8, 8)
    torch.manual_seed(5)
    reconstruction, mean, std = network(x)
    torch.manual_seed(5)
    noise = torch.randn_like(mean)
    expected_mean, expected_std = network.encode(x)
    assert torch.equal(mean, expected_mean)
    assert torch.equal(std, expected_std)
    torch.testing.assert_close(reconstruction, network.decode(mean + std * noise))


def encode_bias(value):
    """Encoding by a network whose encoder gives this value everywhere."""
    network = tiny()
    last = network.encoder.blocks[-1].conv
    with torch.no_grad():
        last.weight.zero_()
        last.bias.fill_(value)
        return network.encode(torch.zeros(1, 1, 8, 8))


def test_encoder_gives_the_logarithm_of_the_variance():
    mean, std = encode_bias(math.log(9.0))
    torch.testing.assert_close(mean, torch.full((1, 3, 2, 2), math.log(9.0)))
    torch.testing.assert_close(std, torch.full((1, 3, 2, 2), 3.0))


@pytest.mark.parametrize("extreme", [-1e4, 1e4])
def test_standard_deviation_stays_finite(extreme):
    std = encode_bias(extreme)[1]
    assert torch.isfinite(std).all()
    assert torch.isfinite(std.log()).all()


def test_output_is_not_bounded():
    network = tiny()
    with torch.no_grad():
        network.decoder.blocks[-1].conv.bias.fill_(-7.0)
    assert network.decode(torch.zeros(1, 3, 2, 2)).min() < -5


@pytest.mark.parametrize("method", ["encode", "decode", "forward"])
def test_exchangeable_with_the_autoencoder_of_monai(method):
    own, other = (inspect.signature(getattr(c, method)) for c in (StridedAutoencoderKL, AutoencoderKL))
    assert list(own.parameters) == list(other.parameters)
