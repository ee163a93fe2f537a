import numpy as np
import pytest

from common.cohorts.joined import join_cohorts
from common.cohorts.table import read_cohort, write_cohort
from common.errors import CohortError


@pytest.fixture
def cohorts(tmp_path, save_nifti):
    """Healthy subjects of one data set; one that tests and one that validates of another, in folders of their own."""
    for folder, names in (("a", ("h1", "h2")), ("b", ("p1", "p2", "lesion"))):
        (tmp_path / folder).mkdir()
        for name in names:
            save_nifti(tmp_path / folder / f"{name}.nii.gz", np.ones((2, 2, 2), np.uint8))
    rows = [
        {"subject": "h1", "split": "train", "T1": "h1.nii.gz"},
        {"subject": "h2", "split": "val", "T1": "h2.nii.gz"},
    ]
    write_cohort(tmp_path / "a" / "cohort.csv", ["T1"], rows)
    rows = [
        {"subject": "p1", "split": "test", "T1": "p1.nii.gz", "T2": "p1.nii.gz", "lesion": "lesion.nii.gz"},
        {"subject": "p2", "split": "val", "T1": "p2.nii.gz", "T2": "p2.nii.gz"},
    ]
    write_cohort(tmp_path / "b" / "cohort.csv", ["T1", "T2"], rows)
    return [tmp_path / "a" / "cohort.csv", tmp_path / "b" / "cohort.csv"]


def test_rows_of_all_with_files_that_are_found(cohorts, tmp_path):
    output = tmp_path / "deep" / "er" / "cohort.csv"
    join_cohorts(cohorts, output, ["T1"])
    items = read_cohort(output, ["T1"])
    assert [item["subject"] for item in items] == ["h1", "h2", "p1", "p2"]
    assert all((output.parent / item["image"]).is_file() for item in items)
    (patient,) = (item for item in items if "lesion" in item)
    assert patient["subject"] == "p1"
    assert (output.parent / patient["lesion"]).is_file()


def test_only_the_splits_that_are_asked_for(cohorts, tmp_path):
    join_cohorts(cohorts, tmp_path / "joined.csv", ["T1"], ["test"])
    assert [item["subject"] for item in read_cohort(tmp_path / "joined.csv", ["T1"])] == ["p1"]


def test_a_modality_that_one_of_them_lacks(cohorts, tmp_path):
    with pytest.raises(CohortError, match="no column T2"):
        join_cohorts(cohorts, tmp_path / "joined.csv", ["T1", "T2"])
