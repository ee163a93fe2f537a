"""Settings of a bundle compared on slices: the smallest bundle, and one subject with a lesion beside one without."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from common.bundle import BUNDLES_DIR
from common.weights import sha256

SCRIPT = Path(__file__).parents[2] / "scripts" / "evaluate_slices.py"
OPTIONS = ("--split", "test", "--max-slices", "8")


def test_table_and_json(cohort, run_script, tmp_path):
    arguments = ["--row", "vae", "--row", "vae:median_size=1", *OPTIONS]
    found = []
    for name in ("first", "again"):
        path = tmp_path / f"{name}.json"
        rows = run_script("evaluate_slices.py", str(cohort), "-o", str(path), *arguments).splitlines()
        found.append(json.loads(path.read_text(encoding="utf-8"))["rows"])
        assert len(rows) == 2 + 2
        assert len({row.count("|") for row in rows}) == 1
    shipped, other = found[0]
    assert (shipped["name"], other["name"]) == ("vae", "vae median_size=1")
    assert shipped["weights_sha256"] == sha256(BUNDLES_DIR / "vae" / "models" / "model.pt")
    assert (shipped["n_slices"], shipped["n_lesion_slices"]) == (8, 4)
    assert shipped["auprc"]["value"] != other["auprc"]["value"]
    assert shipped["ssim"] == other["ssim"]  # the median is one of the map
    assert 0 < shipped["ssim"]["value"] < 1 < shipped["psnr"]["value"]
    assert [row["auprc"] for row in found[0]] == [row["auprc"] for row in found[1]]


@pytest.mark.parametrize(
    ("row", "cohort_name", "message"),
    [("vae:nonsense=1", "cohort.csv", "no such item"), ("vae", "none.csv", "CohortError: ")],
)
def test_bad_input_is_told_and_nothing_is_written(row, cohort_name, message, cohort, tmp_path):
    command = [sys.executable, SCRIPT, cohort.with_name(cohort_name), "-o", tmp_path / "result.json", "--row", row]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert message in done.stderr
    assert not list(tmp_path.iterdir())
