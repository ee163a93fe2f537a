"""Configs that wait for their training build what they name, and training and inference build the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from monai.bundle import ConfigParser

from common.bundle import available_bundles

FOLDERS = sorted(path for path in Path(__file__).parent.iterdir() if (path / "metadata.json").is_file())


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def folder(request):
    return request.param


def parsed(*files, **override):
    parser = ConfigParser()
    parser.read_config([str(file) for file in files])
    parser.update({"bundle_root": "nowhere", "device": "$torch.device('cpu')", **override})
    return parser.get_parsed_content


def test_names_are_those_of_bundles_to_come(folder):
    about = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
    assert about["name"] == folder.name
    assert folder.name not in available_bundles()


def test_training_and_inference_build_the_same_network(folder):
    train, inference = (parsed(folder / name) for name in ("train.json", "inference.json"))
    trained, used = train("network_def"), inference("network_def")
    assert {n: p.shape for n, p in trained.state_dict().items()} == {n: p.shape for n, p in used.state_dict().items()}
    assert train("objective").detector is trained.detector
    assert train("preprocessing").settings == inference("preprocessing").settings
    inference("postprocessing")
    if (folder / "train_autoencoder.json").is_file():
        stage = parsed(folder / "train_autoencoder.json")("objective")
        assert sum(p.numel() for p in stage.autoencoder.parameters()) > 0
