"""Speed of a case, before and after, measured of this state beside itself."""

from __future__ import annotations

import json

import numpy as np
import pytest

from common.bundle import BUNDLES_DIR
from common.errors import ImageFileError


@pytest.fixture
def script(load_script):
    return load_script("measure_speed")


def test_this_state_beside_itself(script, phantom, save_nifti, tmp_path, capsys):
    (height, width, depth), affine = phantom.grid(spacing_mm=(4, 4, 4))
    affine[:3, 3] += affine[:3, :3] @ (0, 0, depth // 2 - 2)
    scan = save_nifti(tmp_path / "scan.nii.gz", phantom.on_grid((height, width, 4), affine)[0], affine)
    script.main([scan], BUNDLES_DIR.parent, tmp_path / "out", repeats=1)
    result = json.loads((tmp_path / "out" / "speed.json").read_text(encoding="utf-8"))
    (row,) = result["rows"]
    assert row["spacing_mm"] == [4, 4, 4]
    for state in ("before", "after"):
        figures = row[state]
        assert 0 < figures["imports_s"] < figures["start_s"]
        assert figures["case_s"] > 0
        assert 100 < figures["peak_mb"] < 5000
    assert row["difference"]["anomaly_map_share_of_maximum"] == 0
    assert row["difference"]["segmented_otherwise"] == 0
    assert row["difference"]["same_lesions"]
    text = (tmp_path / "out" / "speed.md").read_text(encoding="utf-8")
    assert text.strip() == capsys.readouterr().out.strip()
    assert len({line.count("|") for line in text.splitlines()}) == 1


def test_results_that_differ_are_told(script, save_nifti, tmp_path):
    folders = [tmp_path / "one", tmp_path / "other"]
    for number, folder in enumerate(folders):
        folder.mkdir()
        values = np.zeros((4, 4, 4), np.float32)
        values[0, 0, 0], values[1, 1, 1] = 2, number
        for name in ("anomaly_map", "reconstruction", "segmentation"):
            save_nifti(folder / f"{name}.nii.gz", values, np.eye(4))
        (folder / "lesions.csv").write_text("lesion\n" + "1\n" * number, encoding="utf-8")
    found = script.difference_of(*folders)
    assert found["anomaly_map_share_of_maximum"] == found["reconstruction_share_of_maximum"] == 0.5
    assert found["segmented_otherwise"] == 1
    assert not found["same_lesions"]


def test_scan_that_cannot_be_measured_is_named(script, tmp_path):
    with pytest.raises(ImageFileError, match="no such file"):
        script.main([tmp_path / "none.nii.gz"], BUNDLES_DIR.parent, tmp_path / "out", repeats=1)
    assert not (tmp_path / "out").exists()
