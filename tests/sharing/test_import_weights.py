"""Weights of `monai-generative` give the outputs of `monai-generative`: golden/generative/README.md."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks.nets import VQVAE, AutoencoderKL, DecoderOnlyTransformer, DiffusionModelUNet
from torch import Tensor, nn
from typer.testing import CliRunner, Result

from common.cli import app
from common.sharing.import_weights import WeightsImportError, load_generative_weights, read_checkpoint

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden/generative"

UNET = {
    "spatial_dims": 2,
    "in_channels": 1,
    "out_channels": 1,
    "channels": (4, 8),
    "attention_levels": (False, True),
    "num_res_blocks": 1,
    "norm_num_groups": 2,
    "num_head_channels": 4,
}
AUTOENCODER = {
    "spatial_dims": 2,
    "in_channels": 1,
    "out_channels": 1,
    "channels": (4, 8),
    "attention_levels": (False, True),
    "num_res_blocks": 1,
    "latent_channels": 2,
    "norm_num_groups": 2,
}
VQ = {
    "spatial_dims": 2,
    "in_channels": 1,
    "out_channels": 1,
    "channels": (4, 8),
    "num_res_channels": (4, 8),
    "num_res_layers": 1,
    "downsample_parameters": ((2, 4, 1, 1), (2, 4, 1, 1)),
    "upsample_parameters": ((2, 4, 1, 1, 0), (2, 4, 1, 1, 0)),
    "num_embeddings": 16,
    "embedding_dim": 4,
}
TRANSFORMER = {
    "num_tokens": 11,
    "max_seq_len": 9,
    "attn_layers_dim": 8,
    "attn_layers_depth": 2,
    "attn_layers_heads": 2,
}
CONTEXT = {"with_conditioning": True, "cross_attention_dim": 3}
NETWORKS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "unet": (DiffusionModelUNet, {**UNET, "include_fc": False}),
    "unet_context": (DiffusionModelUNet, {**UNET, **CONTEXT}),
    "autoencoder": (AutoencoderKL, {**AUTOENCODER, "include_fc": False}),
    "vqvae": (VQVAE, VQ),
    "transformer": (DecoderOnlyTransformer, TRANSFORMER),
    "transformer_context": (DecoderOnlyTransformer, {**TRANSFORMER, "with_cross_attention": True}),
}


def build(name: str, **changes: object) -> nn.Module:
    network_class, settings = NETWORKS[name]
    return network_class(**{**settings, **changes}).eval()


def golden(name: str) -> dict[str, Any]:
    return torch.load(GOLDEN / f"{name}.pt", weights_only=True)


@torch.no_grad()
def run(network: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    if isinstance(network, AutoencoderKL):
        return [*network.encode(*inputs), network.reconstruct(*inputs)]
    outputs = network(*inputs)
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


def relative_error(network: nn.Module, reference: dict[str, Any]) -> float:
    pairs = zip(run(network, reference["inputs"]), reference["outputs"], strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_are_those_of_the_old_network(name: str) -> None:
    network, reference = build(name), golden(name)
    load_generative_weights(network, reference["state_dict"])
    assert relative_error(network, reference) < 1e-5


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("unet", {"include_fc": True}),  # MONAI's default: applies a projection that the old network did not
        ("autoencoder", {"include_fc": True}),
        ("unet_context", {"include_fc": False}),  # leaves out one that the old network did apply
        ("transformer_context", {}),  # leaves the norm before the cross attention untrained
    ],
)
def test_monai_alone_is_silently_wrong(name: str, changes: dict[str, bool]) -> None:
    network, reference = build(name, **changes), golden(name)
    assert isinstance(network, DiffusionModelUNet | AutoencoderKL | DecoderOnlyTransformer)
    network.load_old_state_dict(reference["state_dict"])
    assert relative_error(network, reference) > 1e-2


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("unet", "include_fc", True),
        ("autoencoder", "include_fc", True),
        ("unet_context", "include_fc", False),
        ("transformer", "include_fc", False),
        ("unet", "use_combined_linear", True),
        ("autoencoder", "use_combined_linear", True),
        ("transformer", "use_combined_linear", True),
    ],
)
def test_wrong_setting_is_refused(name: str, setting: str, value: bool) -> None:
    network = build(name, **{setting: value})
    with pytest.raises(WeightsImportError, match=f"build it with {setting}={not value}"):
        load_generative_weights(network, golden(name)["state_dict"])


@pytest.mark.parametrize("name", NETWORKS)
def test_any_missing_tensor_is_refused(name: str) -> None:
    network, weights = build(name), golden(name)["state_dict"]
    before = copy.deepcopy(network.state_dict())
    for key in weights:
        if ".proj_attn." in key:  # never applied by the old network, so not needed
            continue
        with pytest.raises(WeightsImportError, match=r"no old tensor|no place"):
            load_generative_weights(network, {k: v for k, v in weights.items() if k != key})
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())


@pytest.mark.parametrize("name", NETWORKS)
def test_extra_tensor_is_refused(name: str) -> None:
    weights = golden(name)["state_dict"]
    with pytest.raises(WeightsImportError, match=r"no place for another\.weight"):
        load_generative_weights(build(name), {**weights, "another.weight": torch.zeros(2)})


@pytest.mark.parametrize("name", NETWORKS)
def test_any_wrong_shape_is_refused(name: str) -> None:
    network, weights = build(name), golden(name)["state_dict"]
    for key, tensor in weights.items():
        if ".proj_attn." in key:
            continue
        with pytest.raises(WeightsImportError, match=r"in the old weights"):
            load_generative_weights(network, {**weights, key: tensor.unsqueeze(0)})


@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_nested_checkpoint_is_accepted_and_left_as_it_is(key: str) -> None:
    network, reference = build("transformer"), golden("transformer")
    checkpoint = {"epoch": 3, key: reference["state_dict"]}
    names = list(reference["state_dict"])
    load_generative_weights(network, checkpoint)
    assert relative_error(network, reference) < 1e-5
    assert list(checkpoint[key]) == names


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_of_monai_core_pass_through(name: str) -> None:
    source, network = build(name), build(name)
    load_generative_weights(network, source.state_dict())
    assert all(torch.equal(v, network.state_dict()[k]) for k, v in source.state_dict().items())


@pytest.mark.parametrize("checkpoint", [{}, [torch.zeros(1)], {"epoch": 3}, {"model": {"epoch": 3}}, None])
def test_checkpoint_without_state_dict_is_refused(checkpoint: object) -> None:
    with pytest.raises(WeightsImportError, match="no state dict"):
        load_generative_weights(build("vqvae"), checkpoint)


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    whole = (GOLDEN / "vqvae.pt").read_bytes()
    contents = {"text.pt": b"hello", "empty.pt": b"", "truncated.pt": whole[: len(whole) // 2]}
    for file_name, content in contents.items():
        (tmp_path / file_name).write_bytes(content)
    torch.save(build("vqvae"), tmp_path / "module.pt")  # pickled code: must not be run
    for file_name in [*contents, "module.pt"]:
        with pytest.raises(WeightsImportError, match="not a file of plain tensors"):
            read_checkpoint(tmp_path / file_name)
    with pytest.raises(WeightsImportError, match="No such file"):
        read_checkpoint(tmp_path / "absent.pt")


def convert(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["import-weights", *map(str, arguments)])


@pytest.fixture
def config(tmp_path: Path) -> Path:
    networks = {
        "autoencoder": {"_target_": "monai.networks.nets.AutoencoderKL", **AUTOENCODER, "include_fc": False},
        "trap": {"_target_": "monai.networks.nets.AutoencoderKL", **AUTOENCODER},
    }
    path = tmp_path / "configs" / "train.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"latent_channels": 2, **networks}))
    return path


def test_command_converts(tmp_path: Path, config: Path) -> None:
    reference, old, new = golden("autoencoder"), tmp_path / "old.pt", tmp_path / "new.pt"
    torch.save({"state_dict": reference["state_dict"]}, old)
    done = convert(old, "--config", config, "--network", "autoencoder", "--output", new)
    assert (done.exit_code, done.stdout) == (0, f"{new}: the converted weights\n")
    network = build("autoencoder")
    network.load_state_dict(torch.load(new, weights_only=True))
    assert relative_error(network, reference) < 1e-5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["configs", "new.pt", "old.pt"]


def test_command_refuses_in_one_line(tmp_path: Path, config: Path) -> None:
    old, new, damaged = tmp_path / "old.pt", tmp_path / "new.pt", tmp_path / "damaged.pt"
    torch.save(golden("autoencoder")["state_dict"], old)
    damaged.write_text("hello")
    before = old.read_bytes()
    for weights, network, output, message in [
        (old, "trap", new, "WeightsImportError: .*include_fc=True"),
        (old, "absent", new, "WeightsImportError: .*cannot build 'absent'"),
        (old, "latent_channels", new, "WeightsImportError: .*is no network"),
        (damaged, "autoencoder", new, "WeightsImportError: .*not a file of plain tensors"),
        (old, "autoencoder", old, "OutputError: "),
        (old, "autoencoder", config, "OutputError: "),
        (old, "autoencoder", damaged, "OutputError: .*not a file of weights"),
        (old, "autoencoder", damaged / "new.pt", "OutputError: .*cannot be written"),
    ]:
        done = convert(weights, "--config", config, "--network", network, "--output", output)
        assert done.exit_code == 3, message
        assert re.match(message, done.stderr)
        assert len(done.stderr.splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["configs", "damaged.pt", "old.pt"]
    assert old.read_bytes() == before
