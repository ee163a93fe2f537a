"""The cost of a slice in batches, measured for the smallest bundle; here in this process, which knows the script."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import typer

from common.bundle import BUNDLES_DIR
from common.weights import sha256


@pytest.fixture
def script(load_script, monkeypatch):
    module = load_script("measure_batching")
    monkeypatch.setattr(module, "ProcessPoolExecutor", lambda workers, **_: ThreadPoolExecutor(workers))
    return module


def test_table_and_json(script, tmp_path, capsys):
    script.main(["ae_headct", "ae_headct:network_def::detector::median_size=1"], tmp_path / "result.json")
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    shipped, other = result["rows"]
    assert (shipped["name"], other["name"]) == ("ae_headct", "ae_headct network_def::detector::median_size=1")
    assert shipped["weights_sha256"] == sha256(BUNDLES_DIR / "ae_headct" / "models" / "model.pt")
    for row in result["rows"]:
        assert row["largest_difference"] < 1e-5
        assert min(min(row[way].values()) for way in ("alone", "together")) > 0
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 2 + 2
    assert len({row.count("|") for row in rows}) == 1


def test_maps_that_differ_are_told(script):
    row, maps = script.Row.parse("ae_headct"), torch.zeros(2, 1, 4, 4)
    assert script.compared(row, ({}, maps), ({}, maps + 0.5))["largest_difference"] == 0.5


def test_bad_row_is_refused(script, tmp_path):
    with pytest.raises(typer.BadParameter, match="no such item"):
        script.main(["ae_headct:variannt=1"], tmp_path / "result.json")
