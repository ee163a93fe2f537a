"""Weights are in the wheel, or the bundle says which belong to it."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from common.bundle import BUNDLES_DIR, LARGE_FILES, available_bundles, large_file

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
PACKED = PROJECT["tool"]["setuptools"]["package-data"]["common._bundles"]


@pytest.mark.parametrize("key", available_bundles())
def test_weights_are_packed_or_pinned(key, load_script):
    """Where this fails after a training, run scripts/pin_weights.py; and see package-data in pyproject.toml."""
    file = BUNDLES_DIR / key / LARGE_FILES
    text = file.read_text(encoding="utf-8") if file.exists() else None
    assert text == load_script("pin_weights").large_files(BUNDLES_DIR / key)
    assert (f"{key}/models/*" in PACKED) == (large_file(key) is None)


def test_every_package_is_in_the_wheel():
    root = Path(__file__).parents[2]
    rooms = {"common", *(f"common.{path.parent.name}" for path in root.glob("common/*/__init__.py"))}
    assert {*PROJECT["tool"]["setuptools"]["packages"]} == rooms | {"common._bundles"}
