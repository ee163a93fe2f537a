"""A labelled cohort that can be measured passes; `bad_inputs/test_bad_cohorts.py` has those that cannot."""

from __future__ import annotations

import csv
import shutil

import nibabel as nib
import numpy as np
import pytest

from common.cohorts.labelled import check_labelled_cohort
from common.errors import CohortError


@pytest.fixture
def table(cohort, tmp_path):
    """The rows of a copy of the good cohort, and a function that writes them back and returns the file."""
    shutil.copytree(cohort.parent, tmp_path / "data")
    path = tmp_path / "data" / "cohort.csv"
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))

    def write():
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        return path

    return rows, write


def test_good_cohort_passes(cohort):
    check_labelled_cohort(cohort, ["T1"])


@pytest.mark.parametrize("column", ["T1", "lesion"])
def test_file_that_was_cut_is_found_by_its_header(column, table):
    rows, write = table
    plain = write().parent / "cut.nii"
    nib.save(nib.load(plain.with_name(rows[3][column])), plain)
    rows[3][column] = plain.name
    check_labelled_cohort(write(), ["T1"])
    plain.write_bytes(plain.read_bytes()[: plain.stat().st_size // 2])
    with pytest.raises(CohortError, match=rf"row 5, column {column}: .*truncated"):
        check_labelled_cohort(write(), ["T1"])


def test_validation_images_may_be_missing(table):
    """Methods are neither fitted nor measured on them."""
    rows, write = table
    rows[1]["T1"] = "none.nii.gz"
    check_labelled_cohort(write(), ["T1"])
    rows[0]["T1"] = "none.nii.gz"
    with pytest.raises(CohortError, match="row 2, column T1: no such file"):
        check_labelled_cohort(write(), ["T1"])


def test_lesion_mask_may_be_off_by_rounding(table):
    rows, write = table
    path = write()
    mask = nib.load(path.parent / rows[3]["lesion"])
    rows[3]["lesion"] = "moved.nii.gz"

    def move(shift_mm):
        affine = mask.affine.copy()
        affine[0, 3] += shift_mm
        nib.save(nib.Nifti1Image(np.asarray(mask.dataobj), affine), path.parent / "moved.nii.gz")
        return write()

    check_labelled_cohort(move(1e-4), ["T1"])
    with pytest.raises(CohortError, match=r"row 5, column lesion: .* on another grid"):
        check_labelled_cohort(move(0.5), ["T1"])


def test_healthy_subjects_are_needed_where_they_are_asked_for(table):
    rows, write = table
    rows.pop(2)
    path = write()
    check_labelled_cohort(path, ["T1"], needs_healthy=False)
    with pytest.raises(CohortError, match="no test subject is healthy"):
        check_labelled_cohort(path, ["T1"])
