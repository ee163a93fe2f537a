import pytest
import torch

from common.networks.weight_standardised_unet import WeightStandardisedConv2d, WeightStandardisedUNet, filters_kept


@pytest.mark.parametrize(("channels", "expected"), [(4, 7_703_748), (1, 7_701_825)])
def test_parameters_of_the_published_network(channels, expected):
    with torch.device("meta"):
        network = WeightStandardisedUNet(in_channels=channels)
    assert sum(p.numel() for p in network.parameters()) == expected


@pytest.mark.parametrize("size", [(8, 8), (16, 24)])
@pytest.mark.parametrize("channels", [1, 2])
def test_output_has_the_shape_of_the_input(channels, size):
    network = WeightStandardisedUNet(channels, (4, 6, 8), (2, 3, 4))
    assert network.size_divisor == 4
    assert network(torch.rand(2, channels, *size)).shape == (2, channels, *size)


@pytest.mark.parametrize(("in_channels", "out_channels"), [(2, 1), (1, 3)])
def test_output_may_have_other_channels(in_channels, out_channels):
    network = WeightStandardisedUNet(in_channels, (4, 8), (2, 2), out_channels=out_channels)
    assert (network.in_channels, network.out_channels) == (in_channels, out_channels)
    assert network(torch.rand(2, in_channels, 8, 8)).shape == (2, out_channels, 8, 8)


def test_output_that_is_not_set_leaves_the_settings_as_they_were():
    """Weights are known by the settings that differ from the defaults."""
    network = WeightStandardisedUNet(1, (4, 8), (2, 2))
    assert network.out_channels == 1
    assert "out_channels" not in network.changed_settings


def test_convolution_ignores_offset_and_scale_of_its_filters():
    convolution, x = WeightStandardisedConv2d(3, 5, 3), torch.randn(2, 3, 6, 6)
    before = convolution(x)
    with torch.no_grad():
        convolution.weight.mul_(torch.rand(5, 1, 1, 1) * 3 + 0.5).add_(torch.randn(5, 1, 1, 1))
    torch.testing.assert_close(convolution(x), before, atol=1e-3, rtol=1e-3)


def test_constant_image_gives_no_border_of_its_own():
    # reflected borders repeat the constant, zeros would not
    torch.manual_seed(0)
    network = WeightStandardisedUNet(1, (4, 8), (2, 2)).eval()
    features = network.down[0](torch.full((1, 1, 8, 8), 0.7))
    assert features.flatten(2).std(dim=2).max() < 1e-5


@pytest.mark.parametrize("level", [0, 1])
def test_skips_and_depth_both_reach_the_output(level):
    torch.manual_seed(0)
    network, x = WeightStandardisedUNet(1, (4, 8), (2, 2)).eval(), torch.rand(1, 1, 8, 8)
    before = network(x)
    network.down[level].register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    assert (network(x) - before).abs().max() > 1e-3


def test_batch_is_independent():
    torch.manual_seed(0)
    network, x = WeightStandardisedUNet(1, (4, 8), (2, 2)), torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(network(x)[1:2], network(x[1:2]), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_filters_that_are_kept_change_nothing_and_are_let_go():
    torch.manual_seed(0)
    network, x = WeightStandardisedUNet(1, (4, 8), (2, 2)).eval(), torch.rand(2, 1, 8, 8)
    before = network(x)
    with pytest.raises(ZeroDivisionError), filters_kept(network):
        assert network(x).equal(before)
        raise ZeroDivisionError
    assert not any("kept" in vars(part) for part in network.modules())
    for weight in network.parameters():
        weight.normal_()
    assert (network(x) - before).abs().max() > 1e-3


@torch.no_grad()
def test_training_and_detection_compute_the_same():
    torch.manual_seed(0)
    network, x = WeightStandardisedUNet(1, (16, 32), (4, 4)), torch.rand(2, 1, 16, 16)
    torch.testing.assert_close(network.train()(x), network.eval()(x), atol=1e-5, rtol=1e-5)
