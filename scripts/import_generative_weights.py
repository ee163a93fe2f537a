"""Convert weights trained with `monai-generative` for a network of a bundle.

    python scripts/import_generative_weights.py old.pt --config bundles/KEY/configs/train.json --network ID -o new.pt

Writes the state dict of that network alone. Where a bundle's `model.pt` holds more than one network or a calibration,
load the result into that part of it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from monai.bundle import ConfigParser
from torch import nn

from common.sharing.import_weights import WeightsImportError, load_generative_weights, read_checkpoint


def main() -> None:
    """Exit status 0, or 1 with one line on standard error (2 for a wrong command line)."""
    arguments = _parser().parse_args()
    try:
        convert(arguments.weights, arguments.config, arguments.network, arguments.output)
    except WeightsImportError as error:
        sys.exit(f"error: {error}")


def convert(weights: Path, config: Path, network_id: str, output: Path) -> None:
    """Write to `output` the state dict of the network `network_id` of `config`, with the old `weights`.

    Raises:
        WeightsImportError: a file cannot be read or written, or weights and network do not fit.
    """
    if output.exists() and output.samefile(weights):
        raise WeightsImportError(output, "is the file with the old weights", "choose another output")
    checkpoint = read_checkpoint(weights)
    network = build_network(config, network_id)
    load_generative_weights(network, checkpoint)
    _save(network, output)


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


def _save(network: nn.Module, output: Path) -> None:
    """Through a second name, so that an interrupted run never leaves half a file under the final one."""
    part = output.with_name(output.name + ".part")
    try:
        torch.save(network.state_dict(), part)
        part.replace(output)
    except (OSError, RuntimeError) as error:  # torch reports a missing folder as RuntimeError
        part.unlink(missing_ok=True)
        raise WeightsImportError(output, f"cannot be written ({error})", "choose a folder that exists") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Convert weights trained with monai-generative.")
    parser.add_argument("weights", type=Path, help="old .pt file: a state dict, bare or under 'model' or 'state_dict'")
    parser.add_argument("--config", type=Path, required=True, help="bundle config that has the network")
    parser.add_argument("--network", required=True, help="id of the network in the config, such as network_def")
    parser.add_argument("-o", "--output", type=Path, required=True, help="file for the converted weights")
    return parser


if __name__ == "__main__":
    main()
