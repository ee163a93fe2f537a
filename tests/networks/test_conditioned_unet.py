"""The U-Net that reads a code, and the encoder of the code (golden/cddpm/README.md)."""

import torch
from arrays import golden
from monai.networks.nets.diffusion_model_unet import get_timestep_embedding
from torch import nn

from common.networks.conditioned_unet import CodeEncoder, ConditionedUNet
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


def test_code_is_added_to_the_embedding_of_the_time():
    """Residual blocks see the sum, where the published network has both side by side."""
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
    encoder = CodeEncoder(6, channels=[8, 8], norm_num_groups=4).eval()
    image = torch.rand(3, 1, 16, 16)
    code = encoder(image)
    assert code.shape == (3, 6)
    torch.testing.assert_close(encoder(image[1:2])[0], code[1], atol=1e-5, rtol=0)
    assert not [m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)]  # nothing of the training's scanner
    rolled = encoder(torch.roll(image, 4, dims=2))
    others = (code[0] - code[1]).norm()
    assert (rolled[0] - code[0]).norm() < others
    assert torch.equal(encoder.train()(image), code)
