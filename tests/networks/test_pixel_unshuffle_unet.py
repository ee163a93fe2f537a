import pytest
import torch
from monai.networks.blocks.selfattention import SABlock
from monai.networks.nets import DiffusionModelUNet

from common.errors import UADError
from common.methods.ddpm import DDPM
from common.networks.pixel_unshuffle_unet import PixelUnshuffleUNet, size_divisor

SETTINGS = {
    "channels": (8, 16),
    "attention_levels": (False, True),
    "num_res_blocks": 1,
    "num_head_channels": (0, 8),
    "norm_num_groups": 4,
}


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_image_in_and_out(factor):
    network = PixelUnshuffleUNet(2, factor, **SETTINGS).eval()
    assert size_divisor(network) == 2 * factor
    assert network(torch.rand(2, 2, 16, 8), torch.tensor([3, 500])).shape == (2, 2, 16, 8)


def test_output_of_other_channels():
    network = PixelUnshuffleUNet(2, 2, out_channels=1, **SETTINGS).eval()
    assert network(torch.rand(3, 2, 8, 16), torch.tensor([3, 500, 7])).shape == (3, 1, 8, 16)


def test_cells_are_channels_of_monais_network():
    torch.manual_seed(0)
    network = PixelUnshuffleUNet(1, 2, **SETTINGS).eval()
    torch.nn.init.normal_(network.out[2].conv.weight)
    plain = DiffusionModelUNet(spatial_dims=2, in_channels=4, out_channels=4, **SETTINGS).eval()
    plain.load_state_dict(network.state_dict())
    x, t = torch.rand(1, 1, 8, 8), torch.tensor([7])
    cells = torch.stack([x[:, 0, i::2, j::2] for i in (0, 1) for j in (0, 1)], dim=1)
    expected = torch.empty_like(x)
    for k, output in enumerate(plain(cells, t)[0]):
        expected[0, 0, k // 2 :: 2, k % 2 :: 2] = output
    assert torch.allclose(network(x, t), expected, atol=1e-6)
    assert expected.std() > 0.01


def test_a_detector_asks_for_the_multiple_of_its_network():
    detector = DDPM(PixelUnshuffleUNet(factor=2, **SETTINGS), num_inference_steps=2).eval()
    assert detector.size_divisor == 4
    with pytest.raises(UADError, match="multiples of 4"):
        detector.detect(torch.rand(1, 1, 10, 8))


def test_attention_is_fused_in_evaluation_only_and_says_the_same():
    plain = PixelUnshuffleUNet(**SETTINGS)
    torch.manual_seed(0)
    torch.nn.init.normal_(plain.out[2].conv.weight)
    fused = PixelUnshuffleUNet(**SETTINGS, use_flash_attention=True)
    fused.load_state_dict(plain.state_dict())
    blocks = [module for module in fused.modules() if isinstance(module, SABlock)]
    assert blocks
    assert not any(block.use_flash_attention for block in blocks)
    x, t = torch.rand(2, 1, 16, 16), torch.tensor([3, 500])
    assert torch.allclose(plain.eval()(x, t), fused.eval()(x, t), atol=1e-5)
    assert all(block.use_flash_attention for block in blocks)
    assert not any(block.use_flash_attention for block in fused.train().modules() if isinstance(block, SABlock))
    assert not any(block.use_flash_attention for block in plain.modules() if isinstance(block, SABlock))
