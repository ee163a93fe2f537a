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

import common
from common import bundle
from common.bundle import BUNDLES_DIR, available_bundles
from common.cli import app
from common.cohorts.table import SAMPLE_DIR
from common.metrics.baselines import QUANTITIES
from common.report.benchmark_table import cell
from common.weights import load_weights, sha256

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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result.json", "result.replicates.json"]
    text = (tmp_path / "result.json").read_text(encoding="utf-8")
    result = json.loads(text)
    assert next(iter(result)) == "auprc"
    assert "replicates" not in text
    assert f"AUPRC {cell(result['auprc'])}" in " ".join(done.stdout.split())
    assert done.stderr.splitlines()[-1].startswith("2 of 2 cases")
    for values in (result, *result["baselines"].values()):
        assert set(values) >= METRICS
        for metric in METRICS - {"psnr", "ssim", "dice_at_threshold", "healthy_fp_share"}:
            assert {*values[metric]} - {"few_subjects"} == {"value", "ci95"}
            assert 0 <= values[metric]["value"] <= 1
        assert (values["n_subjects"], values["n_lesion_subjects"]) == (2, 1)
        assert values["n_lesion_slices"] > 0
    assert set(result["baselines"]) == {"intensity_dark", "intensity_bright", "mean_healthy_image", *QUANTITIES}
    assert result["psnr"]["value"] > 0
    assert result["seed"] == 3
    assert result["weights_sha256"] == sha256(BUNDLES_DIR / "dae" / "models" / "model.pt")
    assert {"torch", "monai", "uad-bundles"} <= set(result["versions"])


AT_ONCE = """
import sys
from typer.testing import CliRunner
import common
from common.cli import app

for arguments in (["--help"], ["detect", "--help"], ["list"], ["list", "--json"]):
    assert CliRunner().invoke(app, arguments).exit_code == 0, arguments
print(*{"torch", "monai", "numpy", "scipy", "nibabel", "SimpleITK"} & sys.modules.keys())
common.detect, common.load_detector
assert "torch" in sys.modules
"""


def test_help_and_list_import_neither_torch_nor_monai():
    done = subprocess.run([sys.executable, "-c", AT_ONCE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")


def test_version_is_that_of_the_package():
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.output) == (0, f"uad {common.__version__}\n")


def test_a_shell_completes_the_keys_of_bundles():
    typed = {"_UAD_COMPLETE": "complete_bash", "COMP_WORDS": "uad detect -m vae", "COMP_CWORD": "3"}
    done = CliRunner().invoke(app, [], env=typed, prog_name="uad")
    assert done.stdout.split() == [key for key in available_bundles() if key.startswith("vae")]


def test_list_is_what_the_metadata_say():
    listed = json.loads(CliRunner().invoke(app, ["list", "--json"]).output)
    assert [about["key"] for about in listed] == available_bundles()
    for about in listed:
        assert {"title", "modalities", "space", "run_time", "weights_license", "weights_mb"} <= set(about)
    text = CliRunner().invoke(app, ["list"]).output
    assert all(key in text for key in available_bundles())


def test_prepare_and_train(cohort, tmp_path, monkeypatch):
    """The stages of a bundle one after the other, shortened, from a cohort that was prepared; slices on disk."""
    prepared, runs, cache = tmp_path / "prepared", tmp_path / "runs", tmp_path / "cache"
    done = uad("prepare", cohort, "-o", prepared)
    assert done.returncode == 0, done.stderr
    short = {"max_epochs": 1, "epoch_length": 2, "batch_size": 2}
    whole = bundle.load_workflow

    def shortened(name, configs, workflow_type="infer", **override):
        return whole(name, configs, workflow_type, **override, **(short if workflow_type == "train" else {}))

    monkeypatch.setattr(bundle, "load_workflow", shortened)
    monkeypatch.setattr(sys, "path", [*sys.path])  # MONAI adds the bundle's folder
    for _ in range(2):
        command = ["train", "mad_ad", prepared / "cohort.csv", "-o", runs, "--cache", cache, "--processes", 2]
        result = CliRunner().invoke(app, [str(part) for part in command])
        assert result.exit_code == 0, result.output
        assert "trained and calibrated" in result.output
        assert not np.isnan(load_weights(runs / "model.pt")["calibration.threshold"])
        written = (runs / "model_autoencoder.pt").stat().st_mtime_ns
    assert (runs / "model_autoencoder.pt").stat().st_mtime_ns == written
    assert len(list(cache.iterdir())) == 2  # a subject to train and one to validate, for both stages
    scan = cohort.parent / "d.nii.gz"
    done = uad(
        "detect", scan, "-m", "mad_ad", "-o", tmp_path / "out", "--weights", runs / "model.pt", "--device", "cpu"
    )
    assert done.returncode == 0, done.stderr
    run = json.loads((tmp_path / "out" / "d" / "run.json").read_text(encoding="utf-8"))
    assert run["weights_sha256"] == sha256(runs / "model.pt")


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
        ["detect", "scan.nii.gz", "-m", "dae", "-o", "out", "--part", "3/2"],
        ["detect", "scan.nii.gz", "-m", "dae", "-o", "out", "--device", "tpu"],
        ["detect", "scan.nii.gz", "-m", "dae", "-o", "out", "--strip", "magic"],
    ],
)
def test_wrong_use_exits_with_2(arguments):
    assert CliRunner().invoke(app, arguments).exit_code == 2


def test_unknown_method_is_told_those_that_there_are(tmp_path):
    result = CliRunner().invoke(app, ["detect", "scan.nii.gz", "-m", "nothing", "-o", str(tmp_path)])
    assert result.exit_code == 2
    words = " ".join(result.output.replace("│", " ").split())
    assert all(method in words for method in available_bundles())
