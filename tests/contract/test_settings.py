"""Whatever changes a map changes the fingerprint: each value of each config, whether or not its class records it."""

from __future__ import annotations

import copy
import re

import pytest
from monai.bundle import ConfigParser
from torch import nn

from common.detection.fingerprint import differences, of_map, of_map_alone
from common.images.check import root_cause
from common.recorded import describe

REFUSED_ALONE = {"jump"}  # its other value needs other values of other settings too


def leaves(config, name):
    """Ids of the values, and lists of values, that an item depends on; its references are followed."""
    found, waiting, seen = [], [name], set()
    while waiting:
        key = waiting.pop()
        if key in seen:
            continue
        seen.add(key)
        value = config[key]
        if isinstance(value, dict):
            waiting += [f"{key}::{child}" for child in value if not child.startswith("_")]
        elif isinstance(value, str) and re.search(r"[@$]", value):
            waiting += re.findall(r"@([\w:]+)", value)
        elif value is not None and value != []:
            found.append(key)
    return sorted(found)


def others(value):
    """Other values of the same type, of which a constructor may take one; of a list one element is another."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, str):
        return ["no such choice"]
    if isinstance(value, list):
        return [[*value[:i], other, *value[i + 1 :]] for i, old in enumerate(value) for other in others(old)]
    if isinstance(value, dict):
        return [{**value, key: other} for key, old in value.items() for other in others(old)]
    found = [value * 2, value + 1, value / 2 if isinstance(value, float) else value // 2, value - 1, value * 3]
    return [other for other in found if other != value]


def made_with(config, key, value, name):
    """An item of the config, with another value of one of its settings; None where that is no such setting."""
    parser = ConfigParser(copy.deepcopy(config))
    parser[key] = value
    try:
        return parser.get_parsed_content(name)
    except Exception as error:
        choices = re.findall(r"'([\w-]+)'", getattr(root_cause(error), "remedy", ""))
        if value != "no such choice":
            return None
        old = ConfigParser(config)[key]
        return next((made_with(config, key, choice, name) for choice in choices if choice != old), None)


@pytest.fixture
def no_initial_weights(monkeypatch):
    """Networks are made without filling them, which is most of the time."""
    for name in ("kaiming_uniform_", "uniform_", "normal_", "xavier_uniform_", "kaiming_normal_", "xavier_normal_"):
        monkeypatch.setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)


@pytest.mark.parametrize("name", ["network_def", "preprocessing"])
def test_every_setting_is_in_the_fingerprint(name, configs, no_initial_weights):
    config = configs["inference.json"]
    made = ConfigParser(copy.deepcopy(config)).get_parsed_content(name)
    shipped, shipped_changes = describe(made), describe(made, only_changed=True)
    keys = leaves(ConfigParser(config), name)
    assert len(keys) >= 2
    for key in keys:
        old = ConfigParser(config)[key]
        made = next(filter(None, (made_with(config, key, other, name) for other in others(old))), None)
        if made is None:
            assert key in REFUSED_ALONE, f"{key} = {old!r}: no other value found"
            continue
        assert describe(made) != shipped, key
        assert describe(made, only_changed=True) != shipped_changes, key


def test_classes_of_this_project_record_their_settings(inference):
    def foreign(settings):
        if isinstance(settings, dict):
            own = {settings["class"]} if "parts" in settings else set()
            return own.union(*(foreign(value) for value in settings.values()))
        return set()

    known = {"DiffusionModelUNet", "AutoEncoder", "AutoencoderKL", "VarAutoEncoder"}  # of MONAI
    assert foreign(describe(inference.get_parsed_content("network_def"))) <= known


def test_calibration_is_of_the_shipped_settings(network, inference):
    """Those of before settings were recorded do not say; every one with a healthy atlas is newer."""
    shipped = of_map(network, inference.get_parsed_content("preprocessing"))
    if network.calibration.settings is None:
        assert network.normalisation is None
        return
    assert differences(of_map_alone(network.calibration.settings), shipped, "default") == []
