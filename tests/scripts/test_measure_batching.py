"""The cost of a slice in batches, measured for the smallest bundle."""

from __future__ import annotations

import json

import numpy as np
import pytest

from common.bundle import BUNDLES_DIR
from common.errors import SettingError
from common.weights import sha256
from common.workflows.variants import Variant


@pytest.fixture
def script(load_script):
    return load_script("measure_batching")


def test_table_and_json(run_script, tmp_path):
    rows = run_script("measure_batching.py", "ae_headct", "-o", str(tmp_path / "result.json")).splitlines()
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    (row,) = result["rows"]
    assert row["name"] == "ae_headct"
    assert row["weights_sha256"] == sha256(BUNDLES_DIR / "ae_headct" / "models" / "model.pt")
    assert row["largest_difference"] < 1e-5
    assert min(min(row[way].values()) for way in ("alone", "together")) > 0
    assert len(rows) == 2 + 1
    assert len({row.count("|") for row in rows}) == 1


def test_maps_that_differ_are_told(script):
    row, maps = Variant.parse("ae_headct"), np.zeros((2, 1, 4, 4))
    assert script.compared(row, ({}, maps), ({}, maps + 0.5))["largest_difference"] == 0.5


def test_bad_row_is_refused(script, tmp_path):
    with pytest.raises(SettingError, match="no such item"):
        script.main(["ae_headct:variannt=1"], tmp_path / "result.json")
