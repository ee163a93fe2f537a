"""The networks of f-AnoGAN: blocks against the golden arrays (golden/f_anogan/README.md), sizes as published."""

import pytest
import torch
from arrays import golden

from common.networks.residual_gan import Generator, ResidualBlock, ResidualEncoder, norm_of


def block_of(g, resample, norm):
    block = ResidualBlock(3, 4, resample, norm).double().eval()
    names = {"norm1.weight": "s1", "norm1.bias": "o1", "norm2.weight": "s2", "norm2.bias": "o2"}
    names |= {"conv1.weight": "w1", "conv2.weight": "w2", "conv2.bias": "b2"}
    names |= {"shortcut.weight": "ws", "shortcut.bias": "bs"}
    if norm == "batch":
        names |= {f"norm{k}.running_{n}": f"{n[0]}{k}" for k in (1, 2) for n in ("mean", "var")}
    missing, unexpected = block.load_state_dict({name: g[key] for name, key in names.items()}, strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)
    return block


@pytest.mark.parametrize(("resample", "norm"), [("down", "layer"), ("up", "batch")])
@torch.no_grad()
def test_block(resample, norm):
    g = golden(f"f_anogan/block_{resample}")
    torch.testing.assert_close(block_of(g, resample, norm)(g["x"]), g["y"], atol=1e-8, rtol=0)


def test_layer_norm_is_over_channels_and_pixels_of_a_sample():
    g = golden("f_anogan/block_down")
    norm = norm_of("layer", 3).double()
    norm.load_state_dict({"weight": g["s1"], "bias": g["o1"]})
    torch.testing.assert_close(norm(g["x"]), g["layernorm_first"], atol=1e-8, rtol=0)


def test_parameters_of_the_paper():
    with torch.device("meta"):
        networks = Generator(), ResidualEncoder(), ResidualEncoder(128, "batch")
    counts = [sum(p.numel() for p in network.parameters()) for network in networks]
    assert counts == [8_539_329, 7_490_689, 8_531_200]


def test_compact_networks_of_another_size():
    widths = {"size": 96, "image_channels": 1}
    with torch.device("meta"):
        networks = (
            Generator(64, (128, 128, 64, 32, 16), **widths),
            ResidualEncoder(channels=(16, 32, 64, 128, 128), **widths),
            ResidualEncoder(64, "batch", (16, 32, 64, 128, 128), **widths),
        )
        image = networks[0](torch.rand(2, 64))
        assert image.shape == (2, 1, 96, 96)
        assert networks[1].features(image).shape == (2, 128 * 6 * 6)
        assert [network(image).shape for network in networks[1:]] == [(2, 1), (2, 64)]


def test_images_of_the_generator_are_in_range():
    image = Generator(4, (8, 8), size=8)(5 * torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))
    assert image.shape == (6, 1, 8, 8)
    assert -1 <= image.min() < image.max() <= 1


def test_critic_judges_each_image_alone():
    critic = ResidualEncoder(channels=(8, 8), size=8).train()
    image = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(critic(image)[1:2], critic(image[1:2]))
