from pathlib import Path

import pytest

from common.cohorts.cases import case_name, find_cases
from common.cohorts.table import sample_dir
from common.errors import CohortError, ImageFileError


def subjects(datalist):
    return [item["subject"] for item in datalist]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a/sub-01_T1w.nii.gz", "sub-01_T1w"),
        ("b.nii", "b"),
        ("scan.v2.NII.GZ", "scan.v2"),
        ("c.nrrd", "c"),
        ("d.mha", "d"),
        ("enhanced.dcm", "enhanced"),
        ("series 7", "series 7"),
        ("visit.2", "visit.2"),
    ],
)
def test_case_name(path, expected):
    assert case_name(path) == case_name(Path(path)) == expected


def test_files_and_folders(tmp_path):
    for name in ("b.nii.gz", "a.nii", "c.mha", ".hidden.nii.gz", "notes.txt"):
        (tmp_path / name).touch()
    a, b, c = [{"subject": n[0], "image": str(tmp_path / n)} for n in ("a.nii", "b.nii.gz", "c.mha")]
    assert find_cases(tmp_path) == find_cases(str(tmp_path)) == [a, b, c]
    assert find_cases(tmp_path / "b.nii.gz") == [b]
    assert find_cases([tmp_path / "b.nii.gz", str(tmp_path / "a.nii")]) == [b, a]
    assert subjects(find_cases("missing.nii.gz")) == ["missing"]  # opened, and refused, later
    assert {"mni152_lesions_T1", "head_lesions_CT_mask"} < set(subjects(find_cases(sample_dir())))


def test_a_folder_of_other_files_is_a_dicom_series(tmp_path):
    (tmp_path / "t1").mkdir()
    (tmp_path / "t1" / "IM0001").touch()
    assert find_cases(tmp_path / "t1", series="T1 sag") == [
        {"subject": "t1", "image": str(tmp_path / "t1"), "series": "T1 sag"}
    ]


def test_a_cohort_and_a_file(tmp_path):
    (tmp_path / "cohort.csv").write_text("subject,T1\ns1,x/1.nii\n", encoding="utf-8")
    items = find_cases([tmp_path / "cohort.csv", tmp_path / "two.nii"])
    assert subjects(items) == ["s1", "two"]
    assert items[0]["image"] == str(tmp_path / "x/1.nii")


def test_a_brain_mask_is_of_one_image():
    assert find_cases("scan.nii", brain="mask.nii")[0]["brain"] == "mask.nii"
    with pytest.raises(CohortError, match="one brain mask for 2 images"):
        find_cases(["a.nii", "b.nii"], brain="mask.nii")


def test_two_cases_of_one_name_are_refused():
    with pytest.raises(CohortError, match="another image is named 'T1' too"):
        find_cases(["a/T1.nii.gz", "b/T1.nii.gz"])


@pytest.mark.parametrize("inputs", ["scan.nii", ["a.nii", "b.nii", "c.nii"], ["a.nii", "series"]])
def test_several_modalities_need_a_table_or_a_file_each(inputs):
    with pytest.raises(CohortError, match="needs T1, FLAIR"):
        find_cases(inputs, modalities=("T1", "FLAIR"))


@pytest.mark.parametrize(
    ("names", "subject"),
    [
        (("sub-01_T1.nii.gz", "sub-01_FLAIR.nii.gz"), "sub-01"),
        (("T1.nii", "FLAIR.nii"), "T1"),
        (("x.mha", "y.mha"), "x"),
    ],
)
def test_a_file_per_modality_is_one_case(names, subject):
    (item,) = find_cases([Path(name) for name in names], modalities=("T1", "FLAIR"), brain="mask.nii")
    assert item == {"subject": subject, "image": list(names), "brain": "mask.nii"}
    assert subjects(find_cases(names, modalities=("T1",))) == [case_name(name) for name in names]


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ImageFileError, match="an empty folder"):
        find_cases(tmp_path)
