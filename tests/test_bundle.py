"""Where bundles are found, and from where they run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from common.bundle import BUNDLES_DIR, available_bundles, bundle_root, run_inference
from common.errors import BundleError

DAE = BUNDLES_DIR / "dae"
PLACES = {  # working directory: config as given there
    DAE / "configs": "inference.json",
    DAE: "configs/inference.json",
    BUNDLES_DIR.parent: "bundles/dae/configs/inference.json",
    Path("/"): str(DAE / "configs" / "inference.json"),
}


def make_bundle(folder: Path, name: str) -> Path:
    (folder / "configs").mkdir(parents=True)
    (folder / "configs" / "metadata.json").write_text(json.dumps({"name": name}), encoding="utf-8")
    return folder


def test_bundles_are_found_by_scanning():
    assert available_bundles() == sorted(path.name for path in BUNDLES_DIR.iterdir() if path.is_dir())


def test_root_is_where_one_stands(tmp_path, monkeypatch):
    mine = make_bundle(tmp_path / "mine", "dae")
    for folder in (mine, mine / "configs"):
        monkeypatch.chdir(folder)
        assert bundle_root("dae") == str(mine)
    monkeypatch.chdir(tmp_path)
    assert bundle_root("dae") == str(DAE)


def test_root_is_that_of_the_config_that_is_run(tmp_path, monkeypatch):
    mine = make_bundle(tmp_path / "mine", "new")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(mine)])
    assert bundle_root("new") == str(mine)


def test_root_is_not_another_bundle(tmp_path, monkeypatch):
    monkeypatch.chdir(make_bundle(tmp_path / "mine", "other"))
    assert bundle_root("dae") == str(DAE)
    (tmp_path / "mine" / "configs" / "metadata.json").write_text("[1, 2", encoding="utf-8")
    with pytest.raises(BundleError, match="no such bundle"):
        bundle_root("other")


def test_unknown_bundle():
    with pytest.raises(BundleError, match="choose one of"):
        run_inference("nonsense", ["inference.json"])


def test_the_same_from_everywhere(phantom, save_nifti, tmp_path):
    (height, width, _), affine = phantom.grid()
    affine[2, 3] = phantom.centre_mm[2] - 6
    scan = save_nifti(tmp_path / "scan.nii.gz", phantom.on_grid((height, width, 6), affine)[0], affine)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    runs = []
    for index, (place, config) in enumerate(PLACES.items()):
        settings = [f"--config_file={config}", f"--image={scan}", f"--output_dir={tmp_path / str(index)}"]
        command = [sys.executable, "-m", "monai.bundle", "run", *settings]
        runs.append(subprocess.Popen(command, cwd=place, env=environment, stdout=-1, stderr=-1, text=True))
    maps = []
    for index, run in enumerate(runs):
        _, messages = run.communicate()
        assert run.returncode == 0, messages
        maps.append(np.asarray(nib.load(tmp_path / str(index) / "scan" / "anomaly_map.nii.gz").dataobj))
    assert maps[0].any()
    assert all(np.array_equal(maps[0], other) for other in maps[1:])
