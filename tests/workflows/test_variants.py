"""Bundles and configs with other settings, as they are named on a command line."""

from __future__ import annotations

import json

import pytest

from common.errors import BundleError, SettingError
from common.workflows.variants import Variant


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "method" / "configs" / "inference.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(dict.fromkeys(["variant", "steps", "known", "sigma", "weights"], 0)), encoding="utf-8")
    return path


def test_items_are_in_the_config(config):
    variant = Variant.parse(f"{config}:variant=c,steps=20,known=null,sigma=2.5,weights=a.pt")
    assert variant.name == "method variant=c steps=20 known=null sigma=2.5"
    values = {"variant": "c", "steps": 20, "known": None, "sigma": 2.5, "weights": "a.pt"}
    parser = variant.parser()
    assert {name: parser[name] for name in values} == values


def test_bundle_has_its_own_config():
    variant = Variant.parse("vae:median_size=5,normalisation::contralateral_weight=0")
    assert (variant.name, variant.config.parts[-3]) == (
        "vae median_size=5 normalisation::contralateral_weight=0",
        "vae",
    )
    assert variant.key == "vae_median_size=5_normalisation_contralateral_weight=0"
    assert variant.parser()["normalisation"]["contralateral_weight"] == 0


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("nothing", BundleError, "no such bundle"),
        ("a.json", BundleError, "no such file"),
        ("dae:variant", SettingError, "is not ITEM=VALUE"),
        ("dae:variannt=c", SettingError, "no such item"),
    ],
)
def test_what_is_not_there_is_refused(text, error, message):
    with pytest.raises(error, match=message):
        Variant.parse(text)
