"""The command `uad`, as a user runs it."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from common.bundle import BUNDLES_DIR, available_bundles
from common.cli import app
from common.data.cohort import SAMPLE_DIR
from common.weights import sha256

SAMPLE = SAMPLE_DIR / "mni152_lesions_T1.nii.gz"
METRICS = {
    "auprc",
    "auroc",
    "max_dice_pooled",
    "max_dice_mean",
    "dice_at_threshold",
    "image_auroc",
    "image_auprc",
    "healthy_fp_share",
    "psnr",
    "ssim",
}


def uad(*arguments):
    """The command in a process of its own."""
    command = [sys.executable, "-m", "common", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_detect_writes_six_files(tmp_path):
    done = uad("detect", SAMPLE, "-m", "dae", "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    case = tmp_path / "out" / "mni152_lesions_T1"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {case.name, "status.tsv"}
    assert {path.name for path in case.iterdir()} == {
        "anomaly_map.nii.gz",
        "reconstruction.nii.gz",
        "segmentation.nii.gz",
        "lesions.csv",
        "run.json",
        "preview.png",
    }
    sample, mask = nib.load(SAMPLE), nib.load(case / "segmentation.nii.gz")
    assert np.array_equal(mask.affine, sample.affine)
    assert mask.shape == sample.shape
    run = json.loads((case / "run.json").read_text(encoding="utf-8"))
    with (case / "lesions.csv").open(newline="", encoding="utf-8") as file:
        lesions = list(csv.DictReader(file))
    assert len(lesions) == run["lesions"] > 0
    total_ml = np.asarray(mask.dataobj).sum() * 0.008
    assert sum(float(lesion["volume_ml"]) for lesion in lesions) == pytest.approx(total_ml, rel=1e-3)
    assert (case / "preview.png").read_bytes().startswith(b"\x89PNG")


def test_evaluate_writes_the_metrics(cohort, tmp_path):
    done = uad("evaluate", cohort, "-m", "dae", "-o", tmp_path / "result.json", "--seed", "3")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    for values in (result, *result["baselines"].values()):
        assert set(values) >= METRICS
        for metric in METRICS - {"psnr", "ssim", "dice_at_threshold", "healthy_fp_share"}:
            assert set(values[metric]) == {"value", "ci95"}
            assert 0 <= values[metric]["value"] <= 1
        assert (values["n_subjects"], values["n_lesion_subjects"]) == (2, 1)
        assert values["n_lesion_slices"] > 0
    assert set(result["baselines"]) == {"intensity_dark", "intensity_bright", "mean_healthy_image"}
    assert result["psnr"]["value"] > 0
    assert result["seed"] == 3
    assert result["weights_sha256"] == sha256(BUNDLES_DIR / "dae" / "models" / "model.pt")
    assert {"torch", "monai", "uad-bundles"} <= set(result["versions"])


def test_cohort_that_is_not_there_is_one_line(tmp_path):
    done = uad("evaluate", tmp_path / "none.csv", "-m", "dae", "-o", tmp_path / "result.json")
    assert done.returncode == 3
    assert done.stderr.startswith("CohortError: ")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ["detect", "scan.nii.gz", "-m", "nonsense", "-o", "out"],
        ["detect", "scan.nii.gz", "-o", "out"],
        ["detect", "-m", "dae", "-o", "out"],
        ["nonsense"],
    ],
)
def test_wrong_use_exits_with_2(arguments):
    assert CliRunner().invoke(app, arguments).exit_code == 2


def test_help_names_the_methods():
    result = CliRunner().invoke(app, ["detect", "--help"])
    assert result.exit_code == 0
    assert all(method in result.output for method in available_bundles())
