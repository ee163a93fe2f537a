"""Weights trained with `monai-generative` 0.2, for the networks that MONAI core took over from it.

MONAI's own `load_old_state_dict` renames the tensors but is lax: some settings and tensors it ignores without a word,
and the network then gives wrong outputs. Here every old tensor must find its place and every new one must be set.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from pathlib import Path
from zipfile import is_zipfile

import torch
from monai.bundle import ConfigParser
from monai.networks.blocks import SpatialAttentionBlock
from monai.networks.blocks.selfattention import SABlock
from monai.networks.blocks.transformerblock import TransformerBlock
from monai.networks.nets import DecoderOnlyTransformer
from torch import Tensor, nn

from ..errors import OutputError, UADError, first_few
from ..files import replacing
from ..outputs import Inputs, check_file

StateDict = dict[str, Tensor]


class WeightsImportError(UADError, ValueError):
    """The old weights cannot be read, or do not fit the network."""


def import_weights(weights: Path, config: Path, network: str, output: Path) -> None:
    """Convert weights that were trained with monai-generative for a network of a bundle: its state dict alone.

    weights: the old file, see `read_checkpoint`. config, network: a bundle's config, and the id of the network in it.
    Raises WeightsImportError, OutputError.
    """
    Inputs([weights, config]).check([output])
    check_file(output, is_zipfile(output), "a file of weights")
    checkpoint = read_checkpoint(weights)
    built = build_network(config, network)
    load_generative_weights(built, checkpoint)
    try:
        with replacing(output) as temporary:
            torch.save(built.state_dict(), temporary)
    except OSError as error:
        raise OutputError(output, f"cannot be written ({error.strerror or error})", "choose another place") from error


def build_network(config: Path, network_id: str) -> nn.Module:
    """The network that a bundle's config has under `network_id`; nothing else of the config is built.

    Raises:
        WeightsImportError: the config cannot be read, or has no network there.
    """
    parser = ConfigParser()
    try:
        parser.read_config(str(config))
        network = parser.get_parsed_content(network_id)
    except Exception as error:  # a config names arbitrary classes, so building one can raise anything
        fact = f"cannot build {network_id!r} ({type(error).__name__}: {error})"
        raise WeightsImportError(config, fact, "correct the config or the id") from error
    if not isinstance(network, nn.Module):
        raise WeightsImportError(config, f"{network_id!r} is no network", "name the id of a torch module")
    return network


def read_checkpoint(path: str | Path) -> object:
    """What `torch.save` wrote to `path`, on the CPU; never unpickles code.

    Raises:
        WeightsImportError: no such file, damaged, or more than tensors in it.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise WeightsImportError(path, error.strerror or "cannot be read", "name a readable file") from error
    except Exception as error:  # a damaged file can raise anything: UnpicklingError, RuntimeError, EOFError, OSError…
        remedy = "save network.state_dict() with torch.save where the network was trained"
        raise WeightsImportError(path, "not a file of plain tensors", remedy) from error


def load_generative_weights(network: nn.Module, checkpoint: object) -> None:
    """Give `network` the weights of its `monai-generative` twin: the outputs are then the same to rounding.

    network: built with the constructor values of the old one, and with `include_fc` as `check_attention` says. One
    without `load_old_state_dict` (VQVAE) kept its names. checkpoint: the old state dict, or a dict that has it under
    `"model"` or `"state_dict"`. Left as it is; so is the network on any error.

    Raises:
        WeightsImportError: no state dict, a network that would compute something else, or a tensor that is missing,
            left over or of another shape.
    """
    check_attention(network)
    old = _state_dict(checkpoint)
    new = _rename(network, old)
    _check_complete(network, old, new)
    network.load_state_dict(new)


def check_attention(network: nn.Module) -> None:
    """Refuse attention blocks that would load old weights and compute something else.

    `monai-generative` saved an output projection of its spatial attention (`proj_attn`) but never applied it, so there
    `include_fc` must be False; in all other attention blocks it was applied, so there `include_fc` must be True.

    Raises:
        WeightsImportError: one of the two is not so, or query, key and value are one layer (`use_combined_linear`).
    """
    modules = dict(network.named_modules())
    for path, block in modules.items():
        if not isinstance(block, SABlock):
            continue
        include_fc = not isinstance(modules[path.rpartition(".")[0]], SpatialAttentionBlock)
        for setting, expected in (("include_fc", include_fc), ("use_combined_linear", False)):
            if getattr(block, setting) is not expected:
                fact = f"{path} has {setting}={not expected}, with which old weights give wrong outputs"
                raise WeightsImportError(type(network).__name__, fact, f"build it with {setting}={expected}")


def _state_dict(checkpoint: object) -> StateDict:
    if isinstance(checkpoint, Mapping):
        for key in ("model", "state_dict"):
            if isinstance(checkpoint.get(key), Mapping):
                checkpoint = checkpoint[key]
                break
    if isinstance(checkpoint, Mapping) and checkpoint and all(isinstance(v, Tensor) for v in checkpoint.values()):
        return {name: tensor.detach() for name, tensor in checkpoint.items()}  # one object per name, also if tied
    remedy = "pass it bare, or under the key 'model' or 'state_dict'"
    raise WeightsImportError("checkpoint", "holds no state dict (names and tensors)", remedy)


class _Recorder:
    """Stands in for the network in `load_old_state_dict`, to see what would be loaded before anything is."""

    def __init__(self, network: nn.Module) -> None:
        self.state_dict = network.state_dict
        self.loaded: StateDict = {}

    def load_state_dict(self, state_dict: StateDict, **_: object) -> None:
        self.loaded = dict(state_dict)


def _rename(network: nn.Module, old: StateDict) -> StateDict:
    """The old tensors under the names of `network`, and its own tensor where there is no old one."""
    if isinstance(network, DecoderOnlyTransformer):
        old = _rename_norms(old)
    recorder = _Recorder(network)
    load = getattr(type(network), "load_old_state_dict", _Recorder.load_state_dict)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints when there is nothing to rename
            load(recorder, dict(old))  # a copy: it empties what it is given
    except KeyError as error:
        remedy = "build the network with the settings of the old one"
        raise WeightsImportError(type(network).__name__, f"no old tensor {error}", remedy) from error
    return {name: recorder.loaded.get(name, tensor) for name, tensor in network.state_dict().items()}


def _rename_norms(old: StateDict) -> StateDict:
    """MONAI takes the old `norm2` for its own of that name, and leaves the one before the cross attention untrained."""
    if not any(".norm3." in name for name in old):
        return old  # names of MONAI core already
    return {name.replace(".norm2.", ".norm_cross_attn.").replace(".norm3.", ".norm2."): old[name] for name in old}


def _check_complete(network: nn.Module, old: StateDict, new: StateDict) -> None:
    """Every old tensor is used, every tensor of the network comes from an old one, and shapes agree."""
    source, remedy = type(network).__name__, "build the network with the settings of the old one"
    own, needless = network.state_dict(), _without_effect(network)
    old_ids, used_ids = {id(tensor) for tensor in old.values()}, {id(tensor) for tensor in new.values()}

    # proj_attn had no effect on what the old network computed, see check_attention
    left_over = [name for name in old if id(old[name]) not in used_ids and ".proj_attn." not in name]
    if left_over:
        raise WeightsImportError(source, f"no place for {first_few(left_over)}", remedy)
    unset = [name for name in new if id(new[name]) not in old_ids and not name.startswith(needless)]
    if unset:
        raise WeightsImportError(source, f"no old tensor for {first_few(unset)}", remedy)
    for name, tensor in own.items():
        if tensor.shape != new[name].shape:
            fact = f"{name} is {tuple(tensor.shape)}, but {tuple(new[name].shape)} in the old weights"
            raise WeightsImportError(source, fact, remedy)


def _without_effect(network: nn.Module) -> tuple[str, ...]:
    """Prefixes of tensors that the network has but never uses: a norm before a cross attention that is not there."""
    return tuple(
        f"{path}.norm_cross_attn."
        for path, block in network.named_modules()
        if isinstance(block, TransformerBlock) and not block.with_cross_attention
    )
