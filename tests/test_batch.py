"""Many cases: what is finished is kept, what is bad is said, a killed run goes on where it stopped."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from common.batch import StatusTable
from common.cli import app
from common.errors import OutputError

CASES, KILLED_AT = 12, 4
KILLED = f"""
import os, signal, sys
from common import batch, cli

add = batch.StatusTable.add
def add_or_be_killed(table, *arguments):
    if len(table.rows) == {KILLED_AT - 1}:
        os.kill(os.getpid(), signal.SIGKILL)
    add(table, *arguments)

batch.StatusTable.add = add_or_be_killed
cli.app(sys.argv[1:])
"""


def uad(*arguments, **settings):
    return subprocess.Popen([sys.executable, "-m", "common", *map(str, arguments)], stderr=-1, text=True, **settings)


def detect(*arguments):
    """The command in this process."""
    return CliRunner().invoke(app, ["detect", "-m", "dae", *map(str, arguments)])


def statuses(folder, name="status.tsv"):
    with (folder / name).open(newline="", encoding="utf-8") as file:
        return {row["case"]: row for row in csv.DictReader(file, delimiter="\t")}


def records(folder):
    """When the record of each case was written."""
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("*/run.json")}


@pytest.fixture(scope="module")
def thin_brains(phantom, save_nifti, tmp_path_factory):
    """A folder of brains of four slices each."""
    folder = tmp_path_factory.mktemp("brains")
    (height, width, depth), affine = phantom.grid(spacing_mm=(4, 4, 4))
    affine[:3, 3] += affine[:3, :3] @ (0, 0, depth // 2 - 2)
    image = phantom.on_grid((height, width, 4), affine)[0]
    for index in range(CASES):
        save_nifti(folder / f"{index:02}.nii.gz", image + (image > 0) * np.float32(index), affine)
    return folder


def test_table_appends_and_keeps_the_last_line_of_a_case(tmp_path):
    path = tmp_path / "out" / "status.tsv"
    with StatusTable(path) as table:
        table.add("a", "ImageShapeError", 1.234, "one\ttwo\nthree")
        table.add("b", "ok", 0.5)
        assert len(path.read_text(encoding="utf-8").splitlines()) == 3  # each line is there at once
    with path.open("a", encoding="utf-8") as file:
        file.write("a\tok\t2.00\t\n")
    with StatusTable(path) as table:
        assert table.rows["a"][1] == "ok"
    assert path.read_text(encoding="utf-8") == "case\tstatus\tseconds\tmessage\na\tok\t2.00\t\nb\tok\t0.50\t\n"
    assert [file.name for file in path.parent.iterdir()] == ["status.tsv"]


def test_table_where_nothing_can_be_written(tmp_path):
    (tmp_path / "out").write_text("a file", encoding="utf-8")
    with pytest.raises(OutputError, match="cannot be written"), StatusTable(tmp_path / "out" / "status.tsv"):
        pass


def test_killed_run_goes_on(thin_brains, tmp_path):
    """Killed at the worst moment: the results of a case are there, its line is not."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, "detect", thin_brains, "-m", "dae", "-o", out]
    run = subprocess.run(command, check=False)
    assert run.returncode == -signal.SIGKILL
    before = records(out)
    assert len(before) == KILLED_AT
    for name in before:  # what is there is whole
        assert len(list((out / name).iterdir())) == 6
    assert len(statuses(out)) == KILLED_AT - 1
    assert set(statuses(out)) <= set(before)

    assert detect(thin_brains, "-o", out).exit_code == 0
    after = records(out)
    assert len(after) == CASES
    assert {name: after[name] for name in before} == before  # nothing was done twice
    assert {row["status"] for row in statuses(out).values()} == {"ok"}
    assert len((out / "status.tsv").read_text(encoding="utf-8").splitlines()) == 1 + CASES
    assert not list(out.glob(".*"))  # nothing half-written is left


def test_parts_and_overwrite(thin_brains, tmp_path):
    few = sorted(thin_brains.iterdir())[:3]
    out = tmp_path / "out"
    environment = {**os.environ, "SLURM_ARRAY_TASK_ID": "12", "SLURM_ARRAY_TASK_MIN": "11"}
    environment |= {"SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_STEP": "1"}
    runs = [
        uad("detect", *few, "-m", "dae", "-o", out, "--part", "1/2"),
        uad("detect", *few, "-m", "dae", "-o", out, env=environment),
    ]
    assert [run.communicate() and run.returncode for run in runs] == [0, 0]
    assert set(statuses(out, "status_1-of-2.tsv")) == {"00", "02"}
    assert set(statuses(out, "status_2-of-2.tsv")) == {"01"}

    before = records(out)
    assert detect(few[0], "-o", out, "--overwrite").exit_code == 0
    assert {name for name, written in records(out).items() if written != before[name]} == {"00"}

    other = detect(few[1], "-o", out, "--seed", "5")  # another result is not given for this one
    assert other.exit_code == 3
    assert all(words in other.output for words in ("OutputError", "another seed", "--overwrite"))
    assert records(out)["01"] == before["01"]


def test_bids_dataset_gives_derivatives(thin_brains, tmp_path):
    root, out = tmp_path / "data", tmp_path / "derivatives"
    for index, name in enumerate(("sub-01/anat/sub-01_T1w", "sub-02/ses-1/anat/sub-02_ses-1_T1w")):
        (root / name).parent.mkdir(parents=True)
        (root / f"{name}.nii.gz").write_bytes((thin_brains / f"{index:02}.nii.gz").read_bytes())
    (root / "dataset_description.json").write_text("{}", encoding="utf-8")
    for _ in range(2):
        assert detect(root, "-o", out).exit_code == 0
    anat = out / "sub-02" / "ses-1" / "anat"
    assert {path.name for path in anat.iterdir()} == {
        f"sub-02_ses-1_desc-{name}"
        for name in (
            "anomaly_map.nii.gz",
            "anomaly_mask.nii.gz",
            "reconstruction_map.nii.gz",
            "anomaly_lesions.csv",
            "anomaly_preview.png",
            "anomaly_run.json",
        )
    }
    assert {path.name for path in out.iterdir()} == {"sub-01", "sub-02", "status.tsv", "dataset_description.json"}
    assert json.loads((out / "dataset_description.json").read_text(encoding="utf-8"))["DatasetType"] == "derivative"
    assert detect(root, "-o", tmp_path / "one", "--participant-label", "02").exit_code == 0
    assert set(statuses(tmp_path / "one")) == {"sub-02_ses-1"}
