"""The table of docs/export.md is that of the kept rows; what differs too much is noticed."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from common.bundle import BUNDLES_DIR
from common.weights import sha256

SCRIPT = Path(__file__).parents[2] / "apps" / "compare.py"


@pytest.fixture(scope="module")
def compare():
    spec = importlib.util.spec_from_file_location("compare", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(key="dae", **roads):
    """A row of the shipped weights, each way with its largest difference and share of voxels."""
    return {
        "weights_sha256": sha256(BUNDLES_DIR / key / "models" / "model.pt"),
        "highest": 2.0,
        "roads": {road: {"largest": largest, "share": share} for road, (largest, share) in roads.items()},
        "versions": {"here": list("12345"), **{road: list("12345") for road in roads if road != "last_bit"}},
    }


def test_page_says_what_was_measured_and_of_which_weights(compare):
    """After new weights or rows: `python apps/compare.py --table`."""
    rows = compare.read_rows()
    assert rows
    assert compare.PAGE.read_text(encoding="utf-8") == compare.page(rows)


def test_rows_of_older_weights_are_marked(compare):
    rows = {"dae": row(last_bit=(0, 0)), "vae": row("vae") | {"weights_sha256": "0" * 64}}
    lines = compare.as_table(rows).splitlines()
    assert lines[2] == "| dae | 2 | - | - | - | - | 0 |"
    assert lines[3].startswith("| vae (measured with older weights) | 2 |")


def test_cells(compare):
    assert compare.cell(None) == "-"
    assert compare.cell({"largest": 0.0, "share": 0.0}) == "0"
    assert compare.cell({"largest": 1.25e-7, "share": 0.0}) == "1.2e-07"
    assert compare.cell({"largest": 0.5, "share": 0.0012}) == "0.5 (0.12 % of the voxels)"


def test_what_was_not_measured_again_stays_while_the_weights_are_the_same(compare):
    kept = {"dae": row(label=(0, 0), oldest=(0.1, 0.5))}
    new = compare.joined(kept, {"dae": row(oldest=(0, 0)), "ae_headct": row("ae_headct")})
    assert list(new) == ["ae_headct", "dae"]
    assert {road: found["largest"] for road, found in new["dae"]["roads"].items()} == {"label": 0, "oldest": 0}
    assert new["dae"]["versions"].keys() == {"here", "label", "oldest"}
    old = {"dae": kept["dae"] | {"weights_sha256": "0" * 64}}
    assert compare.joined(old, {"dae": row(oldest=(0, 0))})["dae"]["roads"].keys() == {"oldest"}


def test_methods_that_decide_may_differ_in_few_voxels(compare):
    rows = {
        "dae": row(oldest=(1e-5, 0), label=(0.1, 1e-6)),
        "mad_ad": row("mad_ad", oldest=(0.1, 0.001), label=(0.1, 0.5), last_bit=(1, 1)),
    }
    assert compare.above_tolerance(rows) == [("dae", "label"), ("mad_ad", "label")]


def test_methods_that_decide_are_known_and_explained(compare):
    """A bundle in which a last bit of the image carried far is among them."""
    page = compare.PAGE.read_text(encoding="utf-8").split(compare.MARKERS[1])[1]
    assert [key for key in compare.DECIDING if f"`{key}`" not in page] == []
    assert set(compare.DECIDING) <= {path.name for path in BUNDLES_DIR.iterdir()}
    carried_far = {key for key, row in compare.read_rows().items() if row["roads"]["last_bit"]["share"] > 0}
    assert carried_far <= set(compare.DECIDING)


def test_difference_of_maps_is_that_of_places(compare):
    """The order of the axes does not matter; other grids are refused."""
    values = np.zeros((4, 5, 6), np.float32)
    values[1:3, 1:4, 2:5] = 1
    other = values.copy()
    other[1, 1, 2] += 0.25
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    one, two = (nib.Nifti1Image(x, affine) for x in (values, other))
    flipped = two.as_reoriented(np.array([[0, -1], [2, 1], [1, 1]]))
    assert compare.difference(one, flipped) == {"largest": 0.25, "share": 1 / 18}
    assert compare.difference(one, one) == {"largest": 0, "share": 0}
    with pytest.raises(ValueError, match="grids differ"):
        compare.difference(one, nib.Nifti1Image(values, np.diag([2.0, 2.0, 3.0, 1.0])))


def test_nudge_changes_the_last_bit_of_all_but_the_background(compare):
    image = torch.tensor([0.0, 1 / 255, 0.5, 1.0])
    for given in (image, MetaTensor(image)):
        changed = compare.nudged(given)
        assert type(changed) is type(given)  # with its place in the world
        assert changed[0] == 0
        relative = (image[1:] - changed[1:]) / image[1:]
        assert (relative > 0).all()
        assert (relative < 2e-7).all()


def test_rows_are_kept_and_the_page_is_written(compare, tmp_path, monkeypatch):
    before = "before\n{}\nof another day\n{}\nafter\n".format(*compare.MARKERS)
    (tmp_path / "export.md").write_text(before, encoding="utf-8")
    monkeypatch.setattr(compare, "PAGE", tmp_path / "export.md")
    monkeypatch.setattr(compare, "measure", lambda keys, environments: ((key, row(key)) for key in keys))
    compare.main(["dae"], write=True)
    text = (tmp_path / "export.md").read_text(encoding="utf-8")
    assert "of another day" not in text
    assert text.startswith("before\n")
    assert "\n| dae | 2 |" in text
    assert json.loads((tmp_path / "export.json").read_text(encoding="utf-8")).keys() == {"dae"}
    monkeypatch.setattr(compare, "measure", lambda keys, environments: [("vae", row("vae", oldest=(1, 0.5)))])
    with pytest.raises(SystemExit, match="vae by oldest versions"):
        compare.main(["vae"])
    assert json.loads((tmp_path / "export.json").read_text(encoding="utf-8")).keys() == {"dae"}


def test_oldest_versions_are_the_lower_bounds_of_the_project(capsys, monkeypatch):
    monkeypatch.chdir(SCRIPT.parents[1])
    program = SCRIPT.with_name("oldest.sh").read_text(encoding="utf-8").split("<<'END'\n")[1].split("\nEND\n")[0]
    exec(program, {})  # noqa: S102 - a part of the script
    pinned = dict(line.split("==") for line in capsys.readouterr().out.splitlines())
    project = Path("pyproject.toml").read_text(encoding="utf-8")
    assert {name.lower() for name in pinned} == {"numpy", "scipy", "simpleitk", "monai", "torch"}
    assert all(re.search(rf'"{name}(\[.*\])?>={version}[",]', project) for name, version in pinned.items())
