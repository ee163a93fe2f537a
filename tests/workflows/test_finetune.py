"""Training that starts from a bundle's own weights: its networks as they are, nothing of its calibration."""

from __future__ import annotations

import pytest
import torch
from monai.bundle import ConfigParser

from common.bundle import BUNDLES_DIR
from common.weights import load_weights

BUNDLES = sorted(path.parents[1].name for path in BUNDLES_DIR.glob("*/configs/finetune.json"))


@pytest.mark.parametrize("key", BUNDLES)
def test_training_starts_from_the_weights_of_the_bundle(key):
    root = BUNDLES_DIR / key
    parser = ConfigParser()
    parser.read_config([root / "configs" / "train.json", root / "configs" / "finetune.json"])
    parser["bundle_root"], parser["device"] = str(root), torch.device("cpu")
    setting = "air" if "air" in parser["preprocessing"] else "upper"
    parser[f"preprocessing::{setting}"] = 0.5  # as for another scanner
    parser.get_parsed_content("initialize")
    network = parser.get_parsed_content("network_def")
    load, train = parser["run"]
    assert train == "$@train::trainer.run()"
    assert load["_target_"] == "common.weights.load_networks"
    parser.get_parsed_content("run::0")
    state = network.state_dict()
    for name, value in load_weights(root / "models" / "model.pt").items():
        if name.startswith("detector."):
            torch.testing.assert_close(state[name].half(), value.half(), msg=name)
    assert not network.calibration.is_fitted
    assert 0.5 in state["preparation"]
    if "latent_space" in parser:
        assert parser.get_parsed_content("latent_space") is network.detector.latent_space
