"""Many cases: what is finished is kept, what is bad is said, a killed run goes on where it stopped."""

from __future__ import annotations

import csv
import errno
import gc
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from common.cli import app
from common.errors import OutputError
from common.workflows.batch import StatusTable, check_detection, claimed

CASES, KILLED_AT = 12, 4
SOAKED = (30, 120)  # cases after which memory is measured
KILLED = f"""
import os, signal, sys
from common.workflows import batch
from common import cli

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


def table(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def records(folder):
    """When the record of each case was written; not of one that is being written, in a hidden folder."""
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("[!.]*/run.json")}


@pytest.fixture(scope="module")
def thin_brains(thin_brain, save_nifti, tmp_path_factory):
    """A folder of brains of four slices each, which are too thick for a result to be relied on."""
    folder = tmp_path_factory.mktemp("brains")
    image, affine = thin_brain
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


def test_verdict_is_said_and_is_done(tmp_path, capsys):
    with StatusTable(tmp_path / "status.tsv") as table:
        table.add_verdict("a", {"reliability": "ok", "doubts": []}, 1)
        table.add_verdict("b", {"reliability": "unreliable", "doubts": ["one", "two"]}, 1)
        table.add_verdict("c", {}, 0)  # of a record of an earlier version
        assert all(map(table.is_done, "abc"))
    assert capsys.readouterr().err == "unreliable: b: one; two\n"
    rows = {case: (row["status"], row["message"]) for case, row in statuses(tmp_path).items()}
    assert rows == {"a": ("ok", ""), "b": ("unreliable", "one; two"), "c": ("ok", "")}


def test_table_where_nothing_can_be_written(tmp_path):
    (tmp_path / "out").write_text("a file", encoding="utf-8")
    with pytest.raises(OutputError, match="cannot be written"), StatusTable(tmp_path / "out" / "status.tsv"):
        pass


def test_table_of_another_program_is_left_alone(tmp_path):
    path = tmp_path / "status.tsv"
    path.write_text("name\tmine\n", encoding="utf-8")
    with pytest.raises(OutputError, match="not a status table"), StatusTable(path):
        pass
    assert path.read_text(encoding="utf-8") == "name\tmine\n"


def test_tables_of_two_processes_are_one(tmp_path):
    path = tmp_path / "status.tsv"
    with StatusTable(path) as first:
        first.add("a", "ok", 1)
        with StatusTable(path) as second:
            second.add("b", "ok", 1)
            first.add("c", "ImageShapeError", 1)
            second.add("c", "ok", 1)
        first.add("d", "ok", 1)
        assert first.is_done("c")  # which the other has done again
    assert {case: row["status"] for case, row in statuses(tmp_path).items()} == dict.fromkeys("abcd", "ok")
    assert len(path.read_text(encoding="utf-8").splitlines()) == 5
    assert list(tmp_path.iterdir()) == [path]


def test_line_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch, capsys):
    """The disk is full for a while, once in the middle of a line; at the end all lines are there."""
    path, whole = tmp_path / "status.tsv", Path.open
    with StatusTable(path) as table:
        table.add("a", "ok", 1)
        with path.open("a", encoding="utf-8") as file:
            file.write("b\to")  # as far as there was room

        def full(self, mode="r", *arguments, **options):
            if self == path and "a" in mode:
                raise OSError(errno.ENOSPC, "No space left on device")
            return whole(self, mode, *arguments, **options)

        monkeypatch.setattr(Path, "open", full)
        table.add("b", "ok", 1)
        table.add_failure("M\udcfcller", "ValueError", "M\udcfcller: bad", 1)
        monkeypatch.undo()
        table.add("d", "ok", 1)
        assert table.is_done("b")
        assert not table.is_done("M\udcfcller")
    said = capsys.readouterr().err
    assert said.count("cannot be written (No space left on device)") == 2
    assert "ValueError: M\\udcfcller: bad" in said
    assert {case: row["status"] for case, row in statuses(tmp_path).items()} == {
        "a": "ok",
        "b": "ok",
        "M\\udcfcller": "ValueError",
        "d": "ok",
    }


def test_disk_that_stays_full_is_one_line(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    table = StatusTable(tmp_path / "status.tsv")
    with pytest.raises(OutputError, match="No space left"), table:
        monkeypatch.setattr(Path, "write_text", full)
    monkeypatch.undo()
    with pytest.raises(KeyError), table:  # what ended the run is not hidden by what follows from it
        monkeypatch.setattr(Path, "write_text", full)
        raise KeyError


def test_cases_that_another_process_is_at_come_last(tmp_path):
    items = [{"subject": name} for name in "abc"]
    other = claimed(tmp_path, items, dict)
    assert next(other) == {"subject": "a"}
    mine = claimed(tmp_path, items, dict)
    assert next(mine) == {"subject": "b"}
    assert next(other) == {"subject": "c"}
    other.close()
    assert [item["subject"] for item in mine] == ["c", "a"]
    assert list(tmp_path.iterdir()) == []


def test_table_that_is_an_input_or_of_somebody_else_is_not_written_over(tmp_path):
    items = [{"subject": name, "image": str(tmp_path / f"{name}.nii.gz")} for name in "ab"]
    (tmp_path / "cases.csv").write_text("subject,T1\na,a.nii.gz\nb,b.nii.gz\n", encoding="utf-8")
    with pytest.raises(OutputError, match="over the input"):
        check_detection(tmp_path, items, "dae", [tmp_path / "cases.csv"])
    with pytest.raises(OutputError, match="is not a table of uad detect"):
        check_detection(tmp_path, items, "dae", [])
    check_detection(tmp_path, items[:1], "dae", [])  # of one case there are no tables


@pytest.mark.slow
def test_two_processes_share_the_cases(thin_brains, tmp_path):
    """One of them is killed, and the rest is done; each case once, with one line."""
    few, out = sorted(thin_brains.iterdir())[:8], tmp_path / "out"
    command = ("detect", *few, "-m", "dae", "-o", out)
    killed, other = uad(*command), uad(*command)
    seen = {}
    deadline = time.monotonic() + 600
    while other.poll() is None and time.monotonic() < deadline:
        for name, written in records(out).items():
            assert seen.setdefault(name, written) == written, f"{name} was done twice"
        if len(seen) >= 3 and killed.poll() is None:
            killed.send_signal(signal.SIGKILL)
        time.sleep(0.02)
    killed.communicate()
    assert other.communicate() and other.returncode == 0
    assert killed.returncode == -signal.SIGKILL
    assert set(records(out)) == {path.name.split(".")[0] for path in few}
    again = uad(*command)
    assert again.communicate() and again.returncode == 0
    after = records(out)
    assert {name: after[name] for name in seen} == seen
    assert {case: row["status"] for case, row in statuses(out).items()} == dict.fromkeys(after, "unreliable")
    assert len((out / "status.tsv").read_text(encoding="utf-8").splitlines()) == 1 + len(few)
    assert not list(out.glob(".*"))
    assert all(len(list((out / name).iterdir())) == 6 for name in after)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_cases(thin_brains, tmp_path):
    """What a case leaves behind, beyond what the allocator keeps of the first ones, would end a cohort of thousands."""
    source, folder = (thin_brains / "00.nii.gz").read_bytes(), tmp_path / "many"
    folder.mkdir()
    for number in range(SOAKED[-1]):
        (folder / f"{number:04}.nii.gz").write_bytes(source)
    memory, add = {}, StatusTable.add

    def add_and_measure(table, *arguments):
        add(table, *arguments)
        if len(table.rows) in SOAKED:
            gc.collect()
            memory[len(table.rows)] = resident_mb()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StatusTable, "add", add_and_measure)
        assert detect(folder, "-o", tmp_path / "out").exit_code == 0
    assert memory[SOAKED[1]] - memory[SOAKED[0]] < 20


def resident_mb():
    return int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))[1]) / 1000


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
    for case, row in statuses(out).items():  # of the cases that were written before, too
        assert row["status"] == "unreliable", case
        assert "slices of 4.0 mm" in row["message"], case
    assert len((out / "status.tsv").read_text(encoding="utf-8").splitlines()) == 1 + CASES
    assert not list(out.glob(".*"))  # nothing half-written is left
    assert [row["case"] for row in table(out / "cases.csv")] == sorted(after)
    assert {row["status"] for row in table(out / "cases.csv")} == {"unreliable"}


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
    assert [row["case"] for row in table(out / "cases.csv")] == ["00", "01", "02"]  # of both parts
    assert {row["case"] for row in table(out / "lesions_all.csv")} <= {"00", "01", "02"}

    before = records(out)
    assert detect(few[0], "-o", out, "--overwrite").exit_code == 0
    assert {name for name, written in records(out).items() if written != before[name]} == {"00"}

    other = detect(few[1], "-o", out, "--seed", "5")  # another result is not given for this one
    assert other.exit_code == 3
    assert all(words in other.output for words in ("OutputError", "seed: 0 before, 5 now", "--overwrite"))
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
        f"sub-02_ses-1_desc-dae_{name}"
        for name in (
            *("map.nii.gz", "mask.nii.gz", "reconstruction.nii.gz", "map.json", "mask.json", "reconstruction.json"),
            *("lesions.csv", "preview.png", "run.json"),
        )
    }
    names = {"dataset_description.json", ".bidsignore", "status.tsv", "cases.csv", "lesions_all.csv"}
    assert {path.name for path in out.iterdir()} == {"sub-01", "sub-02", *names}
    assert json.loads((out / "dataset_description.json").read_text(encoding="utf-8"))["DatasetType"] == "derivative"
    assert detect(root, "-o", tmp_path / "one", "--participant-label", "02").exit_code == 0
    assert set(statuses(tmp_path / "one")) == {"sub-02_ses-1"}
