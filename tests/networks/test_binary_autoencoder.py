"""Bits between MONAI's encoders and decoders: the published sizes and arrays (golden/berdiff/README.md)."""

import inspect

import pytest
import torch
from arrays import golden
from monai.networks.nets import AutoencoderKL
from torch import nn

from common.methods.berdiff import flip_unet
from common.networks.binary_autoencoder import (
    BernoulliAutoencoder,
    BinaryAutoencoder,
    BinaryLatentSpace,
    StridedBinaryAutoencoder,
    straight_through,
)

DEAD = 153_092  # of the published 4,256,808: shortcuts and a head that are never used, for four channels


def paper(**changes):
    torch.manual_seed(0)
    settings = {"in_channels": 2, "channels": (4, 8), "latent_channels": 5, "embedding_channels": 6}
    return BinaryAutoencoder(**{**settings, "num_res_blocks": 1, "norm_num_groups": 2, **changes})


def strided(**changes):
    torch.manual_seed(0)
    return StridedBinaryAutoencoder(
        **{"in_channels": 2, "channels": (4, 8), "latent_channels": 5, "num_res_layers": 1, **changes}
    )


NETWORKS = pytest.mark.parametrize(("build", "downsampling"), [(paper, 2), (strided, 4)])


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_parameters_of_the_published_sizes():
    with torch.device("meta"):
        brats, oct_, unet = BinaryAutoencoder(), BinaryAutoencoder(in_channels=1), flip_unet()
    assert count(brats) == 4_103_716 == 4_256_808 - DEAD
    assert count(brats.encoder) == 1_880_512
    assert count(brats.decoder) == 2_157_028
    assert count(brats.norm) + count(brats.to_logits) + brats.embedding.numel() == 512 + 32_896 + 32_768
    assert count(oct_) == 4_254_978 - (DEAD - 3 * 33)  # the dead head ends in a convolution per channel
    assert count(unet) == 36_034_432


def test_published_shapes():
    with torch.device("meta"):
        network = BinaryAutoencoder()
        p, _ = network.encode(torch.empty(2, 4, 256, 256))
        assert p.shape == (2, 128, 32, 32)
        assert network.decode(p).shape == (2, 4, 256, 256)


@pytest.mark.parametrize("size", [96, 128])
def test_compact_network_fits_the_slices(size):
    with torch.device("meta"):
        network = StridedBinaryAutoencoder()
        p, std = network.encode(torch.empty(2, 1, size, size))
        assert p.shape == std.shape == (2, 16, size // 4, size // 4)
        assert network.decode(p).shape == (2, 1, size, size)


def test_bottleneck_of_the_reference():
    g = golden("berdiff/binarizer")
    network = paper(latent_channels=5, embedding_channels=6)
    network.encoder = nn.Identity()
    network.to_logits = nn.Conv2d(4, 5, 1)
    with torch.no_grad():
        network.to_logits.weight.copy_(g["proj_weight"])
        network.to_logits.bias.copy_(g["proj_bias"])
        network.embedding.copy_(g["embed"])
    h = g["h"].requires_grad_()
    p, std = network.encode(h)
    torch.testing.assert_close(p, g["prob"])
    torch.testing.assert_close(std, (p * (1 - p)).sqrt())
    z = straight_through(p, g["u"])
    assert torch.equal(z, g["code"])
    z_q = network.embed(z)
    torch.testing.assert_close(z_q, g["z_q"])
    z_q.backward(g["upstream_grad"])
    torch.testing.assert_close(h.grad, g["grad_h_straight_through"])


def test_bits_are_exact():
    p = torch.rand(10_000, requires_grad=True)
    z = straight_through(p, torch.rand(10_000))
    assert set(z.tolist()) == {0.0, 1.0}


def test_decoder_begins_with_the_normalised_embedding():
    network, z = paper(), torch.randint(2, (2, 5, 4, 4)).float()
    seen = []
    network.decoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    network.decode(z)
    expected = (z[:, :, None] * network.embedding[None, :, :, None, None]).sum(1)
    torch.testing.assert_close(seen[0], nn.functional.group_norm(expected, 2, eps=1e-6))


@NETWORKS
def test_encoding_and_decoding(build, downsampling):
    network, x = build(), torch.randn(3, 2, 8, 16)
    p, std = network.encode(x)
    assert p.shape == std.shape == (3, 5, 8 // downsampling, 16 // downsampling)
    assert p.min() > 0
    assert p.max() < 1
    torch.testing.assert_close(p, network.logits(x).sigmoid())
    assert network.decode(p).shape == x.shape


@NETWORKS
def test_forward_decodes_sampled_bits_and_trains_everything(build, downsampling):
    network, x = build(), torch.randn(2, 2, 8, 8)
    torch.manual_seed(3)
    reconstruction, p, _ = network(x)
    torch.manual_seed(3)
    bits = (torch.rand_like(p) < p).float()
    torch.testing.assert_close(reconstruction, network.decode(bits))
    (reconstruction - x).square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    assert all(g is not None and g.isfinite().all() for g in gradients.values())
    assert gradients[next(iter(gradients))].abs().max() > 0  # of the encoder's first layer, through the bits


def test_bits_are_drawn_in_single_precision_under_autocast():
    network, x = strided(), torch.randn(1, 2, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert network.logits(x).dtype == torch.bfloat16
        assert network.encode(x)[0].dtype == torch.float32


def test_saturated_logits_give_certain_bits():
    class Certain(BernoulliAutoencoder):
        def logits(self, x):
            return x * 1e4

    p, std = Certain().encode(torch.tensor([-1.0, 1.0]))
    assert p.tolist() == [0, 1]
    assert std.tolist() == [0, 0]


@pytest.mark.parametrize("method", ["encode", "decode", "forward"])
@pytest.mark.parametrize("network", [BinaryAutoencoder, StridedBinaryAutoencoder])
def test_exchangeable_with_the_autoencoder_of_monai(network, method):
    own, other = (inspect.signature(getattr(c, method)) for c in (network, AutoencoderKL))
    assert list(own.parameters) == list(other.parameters)


@NETWORKS
def test_latent_space_of_bits_is_never_scaled(build, downsampling):
    space, image = BinaryLatentSpace(build(), downsampling), torch.rand(2, 2, 8, 8)
    space.fit_scale(torch.rand(2, 4, 2, 2), torch.ones(2, 1, 8, 8, dtype=torch.bool))
    assert space.scale == 1
    p, _ = space.posterior(image)
    assert torch.equal(p, space.autoencoder.encode(image * 2 - 1)[0])
    torch.testing.assert_close(space.decode(p), (space.autoencoder.decode(p) + 1) / 2)
