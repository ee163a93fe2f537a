import pytest
import torch
from arrays import golden

from common.networks.masked_unet import MaskedDiffusionUNet


def tiny(**changes):
    settings = {"latent_channels": 2, "channels": (8, 16), "num_res_blocks": 1, "num_heads": 2, "norm_num_groups": 4}
    return MaskedDiffusionUNet(**{"attention_levels": (False, True), **settings, **changes})


def randomised(network):
    torch.manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network


@pytest.mark.parametrize(
    ("base", "heads", "total", "mask_head"),
    [
        (64, 4, 16_142_149, 705),
        (128, 4, 64_478_853, 1_409),
        (192, 6, 145_010_117, 2_113),
        (256, 8, 257_735_941, 2_817),
    ],
    ids=["XS", "S", "M", "L"],
)
def test_parameters_of_the_published_sizes(base, heads, total, mask_head):
    with torch.device("meta"):
        network = MaskedDiffusionUNet(channels=(base, 2 * base, 4 * base), num_heads=heads)
    assert sum(p.numel() for p in network.parameters()) == total
    assert sum(p.numel() for p in network.trunk.out.mask.parameters()) == mask_head


def test_every_residual_block_has_the_published_dropout_before_its_second_convolution():
    blocks = [m for m in tiny().modules() if hasattr(m, "conv1") and hasattr(m, "conv2")]
    assert len(blocks) == 2 + 2 * 2 + 2  # down 1 per level, up 2 per level, middle 2
    for block in blocks:
        dropout, convolution = block.conv2
        assert dropout.p == 0.4
        assert isinstance(convolution.conv, torch.nn.Conv2d)


def test_dropout_acts_in_training_only():
    network, z, t = randomised(tiny()), torch.randn(1, 2, 4, 4), torch.tensor([3])
    assert not torch.equal(network(z, t)[0], network(z, t)[0])
    network.eval()
    assert torch.equal(network(z, t)[0], network(z, t)[0])


def test_untrained_network_predicts_zero_and_is_undecided_everywhere():
    z0, logit = tiny()(torch.randn(2, 2, 4, 4), torch.tensor([0, 9]))
    assert (z0 == 0).all()
    assert (logit == 0).all()


def test_attention_outputs_start_at_zero():
    outputs = [m.out_proj for m in tiny().modules() if hasattr(m, "out_proj")]
    assert len(outputs) == 1 + 2 + 1  # the lower level down and up, and the middle
    assert all((o.weight == 0).all() and (o.bias == 0).all() for o in outputs)


def test_mask_head_has_no_activation():
    network = randomised(tiny().eval())
    features = []
    network.trunk.out.register_forward_pre_hook(lambda module, args: features.append(args[0]))
    z0, logit = network(torch.randn(2, 2, 4, 4), torch.tensor([0, 9]))
    assert z0.shape == (2, 2, 4, 4)
    norm, convolution = network.trunk.out.mask
    normalised = torch.nn.functional.group_norm(features[0], 4, norm.weight, norm.bias, eps=1e-5)
    expected = torch.nn.functional.conv2d(normalised, convolution.weight, convolution.bias, padding=1)
    torch.testing.assert_close(logit, expected)


def test_timestep_matters_and_belongs_to_its_sample():
    network, z = randomised(tiny().eval()), torch.randn(1, 2, 4, 4).repeat(2, 1, 1, 1)
    z0, logit = network(z, torch.tensor([0, 9]))
    assert (z0[0] - z0[1]).abs().max() > 1e-3
    assert (logit[0] - logit[1]).abs().max() > 1e-3
    alone = network(z[1:], torch.tensor([9]))
    torch.testing.assert_close(z0[1:], alone[0], atol=1e-5, rtol=1e-5)


def test_timesteps_enter_unscaled_with_the_cosines_first():
    g = golden("mad_ad/timestep_embedding")
    network = MaskedDiffusionUNet(2, (256,), num_res_blocks=1, attention_levels=(False,), dropout=0.0).eval()
    seen = []
    network.trunk.time_embed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        network(torch.zeros(10, 2, 1, 1), g["t"])
    torch.testing.assert_close(seen[0], g["embedding"], atol=2e-6, rtol=1e-5)


def test_mask_loss_alone_trains_the_trunk():
    network = randomised(tiny())
    network(torch.randn(2, 2, 4, 4), torch.tensor([1, 5]))[1].square().mean().backward()
    assert network.trunk.conv_in.conv.weight.grad.abs().max() > 0
    assert (network.trunk.out.z0[0].weight.grad == 0).all()
