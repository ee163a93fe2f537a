"""A cohort on which methods cannot be measured is refused with its row and column, before the first method runs."""

from __future__ import annotations

import csv
import shutil

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from common.cli import app
from common.cohorts.labelled import check_labelled_cohort
from common.errors import CohortError
from common.workflows import benchmark


@pytest.fixture
def folder(cohort, tmp_path):
    """A copy of the good cohort: rows 2 to 5 are a (train), b (val), c (test, healthy), d (test, with a lesion)."""
    shutil.copytree(cohort.parent, tmp_path / "data")
    return tmp_path / "data"


def change(folder, row, column, value):
    """Write another value into a cell, rows counted as in the messages."""
    path = folder / "cohort.csv"
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.reader(file))
    lines[row - 1][lines[0].index(column)] = value
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(lines)


def rename_column(folder, old, new):
    path = folder / "cohort.csv"
    path.write_text(path.read_text(encoding="utf-8").replace(old, new, 1), encoding="utf-8")


def on_other_grid(folder, change_affine=False):
    lesion = nib.load(folder / "d_lesion.nii.gz")
    values, affine = np.asarray(lesion.dataobj), lesion.affine.copy()
    if change_affine:
        affine[0, 3] += 5
    else:
        values = values[:-1]
    nib.save(nib.Nifti1Image(values, affine), folder / "d_lesion.nii.gz")


BAD = {
    "no modality": (lambda f: rename_column(f, "T1", "T9"), "no bundle works on T9"),
    "no split": (lambda f: rename_column(f, "split", "fold"), "no column split"),
    "missing image": (lambda f: (f / "c.nii.gz").unlink(), "row 4, column T1: no such file"),
    "missing lesion mask": (lambda f: (f / "d_lesion.nii.gz").unlink(), "row 5, column lesion: no such file"),
    "missing training image": (lambda f: (f / "a.nii.gz").unlink(), "row 2, column T1: no such file"),
    "missing brain mask": (lambda f: change(f, 4, "brain", "none.nii.gz"), "row 4, column brain: no such file"),
    "empty cell": (lambda f: change(f, 4, "T1", ""), "row 4, column T1: subject 'c' lacks an image"),
    "mask of another shape": (on_other_grid, "row 5, column lesion: the lesion mask"),
    "mask in another place": (lambda f: on_other_grid(f, True), "row 5, column lesion: the lesion mask"),
    "mask is text": (
        lambda f: (f / "d_lesion.nii.gz").write_text("hello", encoding="utf-8"),
        "row 5, column lesion: .*not compressed",
    ),
    "subject in two splits": (
        lambda f: change(f, 4, "subject", "a"),
        r"row 4, column subject: subject 'a' appears more than once \(row 2, in the splits test and train\)",
    ),
    "image in two splits": (
        lambda f: change(f, 4, "T1", "a.nii.gz"),
        "row 4, column T1: the image of row 2, which is in split train",
    ),
    "unknown split": (lambda f: change(f, 3, "split", "validation"), "row 3, column split: no such split 'validation'"),
    "no healthy subject": (lambda f: change(f, 4, "split", "train"), "column lesion: no test subject is healthy"),
    "no lesion": (lambda f: change(f, 5, "lesion", ""), "column lesion: no test subject has a lesion"),
    "no test subject": (lambda f: [change(f, row, "split", "val") for row in (4, 5)], "no row with split=test"),
}


@pytest.mark.parametrize("kind", BAD)
def test_refused_before_a_method_runs(kind, folder, monkeypatch):
    def not_run(*_):
        raise AssertionError("a method was run")

    monkeypatch.setattr(benchmark, "evaluate_apart", not_run)
    monkeypatch.setattr(benchmark, "run_baselines", not_run)
    damage, fact = BAD[kind]
    damage(folder)
    with pytest.raises(CohortError, match=fact) as caught:
        benchmark.run_benchmark(folder / "cohort.csv", folder.parent / "out")
    error = caught.value
    assert str(error) == f"{folder / 'cohort.csv'}: {error.fact}; {error.remedy}"
    assert "\n" not in str(error)
    assert not (folder.parent / "out").exists()


def test_command_says_one_line_and_exits_with_3(folder):
    (folder / "c.nii.gz").unlink()
    done = CliRunner().invoke(app, ["benchmark", str(folder / "cohort.csv"), "-o", str(folder.parent / "out")])
    assert done.exit_code == 3
    assert done.stderr.startswith(f"CohortError: {folder / 'cohort.csv'}: row 4, column T1: no such file")
    assert done.stderr.count("\n") == 1


def test_what_is_not_used_may_be_bad(folder):
    (folder / "b.nii.gz").unlink()  # validation subjects are not measured
    check_labelled_cohort(folder / "cohort.csv", ["T1"])
    change(folder, 4, "split", "train")
    check_labelled_cohort(folder / "cohort.csv", ["T1"], needs_healthy=False)
