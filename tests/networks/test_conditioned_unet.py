"""The U-Net that reads a code, and the encoder of the code (golden/cddpm/README.md)."""

import pytest
import torch
from arrays import golden
from monai.networks.nets.diffusion_model_unet import DiffusionUNetResnetBlock, get_timestep_embedding
from torch import nn

from common.networks.conditioned_unet import CodeEncoder, ConditionedUNet, ScaleShiftBlock
from common.networks.pixel_unshuffle_unet import PixelUnshuffleUNet

SETTINGS = {"channels": [8, 16], "attention_levels": [False, True], "num_res_blocks": 1, "norm_num_groups": 4}
SETTINGS |= {"num_head_channels": 8}


def inputs(code_size=6):
    generator = torch.Generator().manual_seed(0)
    image, code = torch.rand(4, 1, 16, 16, generator=generator), torch.randn(4, code_size, generator=generator)
    return image, torch.tensor([0, 249, 499, 749]), code


def test_embeddings_are_those_of_the_published_network():
    g = {key: value.float() for key, value in golden("cddpm/conditioning").items()}
    torch.testing.assert_close(
        get_timestep_embedding(g["t_index"], g["time_sinusoid"].shape[1]), g["time_sinusoid"], atol=1e-4, rtol=0
    )
    unet = ConditionedUNet(6, **SETTINGS)
    for part, name, given in (("time_embed", "time", "time_sinusoid"), ("class_embedding", "cond", "c")):
        layers = getattr(unet, part)
        for layer, number in ((layers[0], 1), (layers[2], 2)):
            layer.load_state_dict({"weight": g[f"{name}_w{number}"], "bias": g[f"{name}_b{number}"]})
        expected = g["time_embedding" if name == "time" else "condition_embedding"]
        torch.testing.assert_close(layers(g[given]), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_published_network_has_both_side_by_side_and_scales_and_shifts():
    g = {key: value.float() for key, value in golden("cddpm/conditioning").items()}
    settings = {"channels": [8], "attention_levels": [False], "num_res_blocks": 1, "norm_num_groups": 2}
    unet, seen = ConditionedUNet(6, "concatenated", **settings | {"num_head_channels": 8}), []
    for part, name in (("time_embed", "time"), ("class_embedding", "cond")):
        for layer, number in ((getattr(unet, part)[0], 1), (getattr(unet, part)[2], 2)):
            layer.load_state_dict({"weight": g[f"{name}_w{number}"], "bias": g[f"{name}_b{number}"]})
    blocks = [module for module in unet.modules() if isinstance(module, DiffusionUNetResnetBlock)]
    assert len(blocks) == 5
    for block in blocks:
        assert isinstance(block, ScaleShiftBlock)
        block.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    unet(torch.rand(4, 1, 8, 8), g["t_index"].long(), g["c"])
    for embedding in seen:
        torch.testing.assert_close(embedding, g["embedding"], atol=1e-4, rtol=0)
    block = ScaleShiftBlock.like(DiffusionUNetResnetBlock(2, 4, 8, 4, norm_num_groups=2, norm_eps=1e-5), 64)
    block.time_emb_proj.load_state_dict({"weight": g["block_w"], "bias": g["block_b"]})
    found = block.scaled_and_shifted(g["h"], g["embedding"])
    torch.testing.assert_close(found, g["h_after_norm_scale_shift"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("change", [{"up": True}, {"down": True}, {}])
@torch.no_grad()
def test_without_scale_and_shift_it_is_monais_block(change):
    torch.manual_seed(0)
    plain = DiffusionUNetResnetBlock(2, 4, 8, 6, norm_num_groups=2, **change)
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.3)
    block = ScaleShiftBlock.like(plain, 16)
    state = {name: value for name, value in plain.state_dict().items() if not name.startswith("time_emb_proj")}
    block.load_state_dict(state, strict=False)
    for module in (plain, block):
        nn.init.zeros_(module.time_emb_proj.weight)
        nn.init.zeros_(module.time_emb_proj.bias)
    x = torch.rand(2, 4, 8, 8)
    torch.testing.assert_close(block(x, torch.rand(2, 16)), plain(x, torch.rand(2, 8)))


def test_code_is_added_to_the_embedding_of_the_time():
    """By default: residual blocks see the sum."""
    unet, seen = ConditionedUNet(6, **SETTINGS).eval(), []
    nn.init.normal_(unet.class_embedding[2].weight)
    unet.middle_block.resnet_1.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    image, t, code = inputs()
    unet(image, t, code)
    expected = unet.time_embed(get_timestep_embedding(t, 8)) + unet.class_embedding(code)
    torch.testing.assert_close(seen[0], expected)


def test_starts_as_the_network_without_a_code():
    torch.manual_seed(0)
    plain = PixelUnshuffleUNet(**SETTINGS).eval()
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.2)
    guided = ConditionedUNet(6, **SETTINGS).eval()
    missing, unexpected = guided.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith("class_embedding.") for name in missing)
    image, t, code = inputs()
    assert plain(image, t).std() > 0.01
    torch.testing.assert_close(guided(image, t, code), plain(image, t))
    nn.init.normal_(guided.class_embedding[2].weight)
    assert (guided(image, t, code) - plain(image, t)).abs().max() > 0.01


def test_code_keeps_no_places():
    """A slice that is moved by the stride of all levels has nearly the code that it had."""
    torch.manual_seed(0)
    encoder = CodeEncoder(6, channels=[8, 8]).eval()
    image = torch.rand(3, 1, 16, 16)
    code = encoder(image)
    assert code.shape == (3, 6)
    torch.testing.assert_close(encoder(image[1:2])[0], code[1], atol=1e-5, rtol=0)
    rolled = encoder(torch.roll(image, 4, dims=2))
    others = (code[0] - code[1]).norm()
    assert (rolled[0] - code[0]).norm() < others
    assert torch.equal(encoder.train()(image), code)  # no statistics of the training's scanner


def test_code_tells_how_bright_a_slice_is():
    """A group norm would make the codes of a slice and of a darker one alike."""
    torch.manual_seed(0)
    encoder = CodeEncoder(6, channels=[8, 8]).eval()
    image = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(0)) + 0.5
    code, darker = encoder(image), encoder(image / 2)
    assert (code - darker).norm() > 0.2 * (code - encoder(torch.zeros_like(image))).norm()
