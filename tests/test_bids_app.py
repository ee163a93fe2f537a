"""`uad bids` takes what a BIDS App takes, and writes what the BIDS validator accepts."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from common.bids_app import repeat_option
from common.cli import app

SCANS = (
    "sub-01/anat/sub-01_T1w",
    "sub-02/ses-1/anat/sub-02_ses-1_acq-mprage_run-2_part-mag_T1w",
    "sub-03/anat/sub-03_space-MNI152NLin2009cAsym_res-2_desc-preproc_T1w",
)
MADE = (
    "sub-01/anat/sub-01_desc-dae",
    "sub-02/ses-1/anat/sub-02_ses-1_acq-mprage_run-2_part-mag_desc-dae",
    "sub-03/anat/sub-03_space-MNI152NLin2009cAsym_res-2_desc-dae",
)
NAMELESS = {  # in BIDS
    *("map.nii.gz", "map.json", "reconstruction.nii.gz", "reconstruction.json"),
    *("lesions.csv", "preview.png", "run.json"),
}


def bids(*arguments):
    return CliRunner().invoke(app, ["bids", *map(str, arguments)])


@pytest.mark.parametrize(
    ("given", "parsed"),
    [
        ("a b participant", "a b participant"),
        ("a b participant --participant_label 01 02", "a b participant --participant_label 01 --participant_label 02"),
        (
            "a b participant --participant-label 01 02 -m dae --participant-label 03",
            "a b participant --participant-label 01 --participant-label 02 -m dae --participant-label 03",
        ),
        ("--participant-label=01 a b participant", "--participant-label=01 a b participant"),
        ("a b participant --participant-label", "a b participant --participant-label"),
        ("a b participant --participant-label -m dae", "a b participant --participant-label -m dae"),
    ],
)
def test_labels_in_a_row_are_an_option_each(given, parsed):
    assert repeat_option(given.split()) == parsed.split()


@pytest.mark.parametrize(
    "wrong",
    [
        ["group", "-m", "dae"],
        ["-m", "dae"],
        ["participant"],
        ["participant", "-m", "dae", "--participant-label"],
        ["participant", "-m", "nonsense"],
    ],
)
def test_wrong_use_exits_with_2(wrong, tmp_path):
    assert bids(tmp_path, tmp_path / "out", *wrong).exit_code == 2
    assert not (tmp_path / "out").exists()


def test_what_is_no_dataset_is_one_line(tmp_path):
    done = bids(tmp_path, tmp_path / "out", "participant", "-m", "dae")
    assert (done.exit_code, done.stderr.count("\n")) == (3, 1)
    assert done.stderr.startswith(f"CohortError: {tmp_path}: no BIDS dataset")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def dataset(phantom, save_nifti, tmp_path_factory):
    """Scans of four slices, one of them of another program's derivative."""
    root = tmp_path_factory.mktemp("bids") / "data"
    (height, width, depth), affine = phantom.grid(spacing_mm=(4, 4, 4))
    affine[:3, 3] += affine[:3, :3] @ (0, 0, depth // 2 - 2)
    image = phantom.on_grid((height, width, 4), affine)[0]
    for number, name in enumerate(SCANS):
        (root / name).parent.mkdir(parents=True)
        save_nifti(root / f"{name}.nii.gz", image + number * (image > 0), affine)
    (root / "dataset_description.json").write_text('{"Name": "a", "BIDSVersion": "1.10.0"}', encoding="utf-8")
    return root


def test_participant_who_is_not_there_is_one_line(dataset, tmp_path):
    done = bids(dataset, tmp_path / "out", "participant", "-m", "dae", "--participant_label", "01", "07")
    assert (done.exit_code, done.stderr.count("\n")) == (3, 1)
    assert "no participant 07; check the labels, or give --participant_label LABEL" in done.stderr


@pytest.fixture(scope="module")
def derivative(dataset):
    out = dataset / "derivatives" / "uad-dae"
    done = bids(dataset, out, "participant", "-m", "dae", "--participant_label", "01", "sub-02", "03")
    assert done.exit_code == 0, done.output
    return out


def test_images_name_their_sources(derivative):
    for scan, made in zip(SCANS, MADE, strict=True):
        for name in ("map", "mask", "reconstruction"):
            assert (derivative / f"{made}_{name}.nii.gz").is_file()
            sidecar = json.loads((derivative / f"{made}_{name}.json").read_text(encoding="utf-8"))
            assert sidecar["Sources"] == [f"bids:source:{scan}.nii.gz"]
    description = json.loads((derivative / "dataset_description.json").read_text(encoding="utf-8"))
    assert (derivative / description["DatasetLinks"]["source"] / f"{SCANS[0]}.nii.gz").is_file()


def validator_errors(folder, work):
    """(code, path) of each error that the BIDS validator finds."""
    beside = Path(sys.executable).with_name("bids-validator-deno")  # of an environment that is not activated
    command = str(beside) if beside.is_file() else shutil.which("bids-validator-deno")
    if command is None:
        pytest.skip("no BIDS validator: pip install bids-validator-deno")
    if subprocess.run([command, "--version"], capture_output=True, check=False).returncode:
        pytest.skip("the BIDS validator does not run on this machine")
    subprocess.run([command, folder, "--format", "json", "-o", work / "said.json"], capture_output=True, check=False)
    said = json.loads((work / "said.json").read_text(encoding="utf-8"))
    assert set(said["summary"]["subjects"]) == {"01", "02", "03"}
    return {(issue["code"], issue["location"]) for issue in said["issues"]["issues"] if issue["severity"] == "error"}


def test_validator_accepts_the_derivative(derivative, tmp_path):
    """And nothing is hidden from it but what BIDS has no name for."""
    assert validator_errors(derivative, tmp_path) == set()
    shown = tmp_path / "shown"
    shutil.copytree(derivative, shown, ignore=shutil.ignore_patterns(".bidsignore"))
    wrong = {path for _, path in validator_errors(shown, tmp_path)}
    tables = {"/status.tsv", "/cases.csv", "/lesions_all.csv"}
    assert wrong == tables | {f"/{made}_{name}" for made in MADE for name in NAMELESS}
