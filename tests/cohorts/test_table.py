from pathlib import Path

import pytest

from common.cohorts.table import (
    SAMPLE_DIR,
    check_subjects,
    cohort_modalities,
    healthy_subjects,
    read_cohort,
    write_cohort,
    write_sample,
)
from common.errors import CohortError, OutputError

COHORT = """subject,split,T1,T2,brain,lesion
sub-01,train,a/1_T1.nii.gz,a/1_T2.nii.gz,a/1_brain.nii.gz,
sub-02,val,a/2_T1.nii.gz,a/2_T2.nii.gz,,
sub-03,test,a/3_T1.nii.gz,,,a/3_lesion.nii.gz
sub-04,test,/far/4_T1.nii.gz,a/4_T2.nii.gz,,
"""


def write(folder, text=COHORT, encoding="utf-8"):
    path = folder / "cohort.csv"
    path.write_bytes(text.encode(encoding))
    return path


def subjects(datalist):
    return [item["subject"] for item in datalist]


def test_rows_become_items_with_paths_relative_to_the_csv(tmp_path):
    items = read_cohort(write(tmp_path), ["T1"])
    assert items[0] == {
        "subject": "sub-01",
        "split": "train",
        "image": str(tmp_path / "a/1_T1.nii.gz"),
        "brain": str(tmp_path / "a/1_brain.nii.gz"),
    }
    assert "brain" not in items[1]
    assert items[2]["lesion"] == str(tmp_path / "a/3_lesion.nii.gz")
    assert items[3]["image"] == "/far/4_T1.nii.gz"


def test_several_modalities_become_a_list_in_their_order(tmp_path):
    items = read_cohort(write(tmp_path), ["T2", "T1"], split="train")
    assert items[0]["image"] == [str(tmp_path / "a/1_T2.nii.gz"), str(tmp_path / "a/1_T1.nii.gz")]


@pytest.mark.parametrize(
    ("split", "healthy", "expected"),
    [
        (None, None, ["sub-01", "sub-02", "sub-03", "sub-04"]),
        ("train", None, ["sub-01"]),
        ("test", None, ["sub-03", "sub-04"]),
        ("test", True, ["sub-04"]),
        (None, False, ["sub-03"]),
    ],
)
def test_rows_are_chosen_by_split_and_health(tmp_path, split, healthy, expected):
    assert subjects(read_cohort(write(tmp_path), ["T1"], split, healthy)) == expected


def test_a_method_is_trained_and_validated_on_healthy_subjects(tmp_path):
    ill = "sub-05,train,a/5_T1.nii.gz,,,a/5_lesion.nii.gz\nsub-06,val,a/6_T1.nii.gz,,,a/6_lesion.nii.gz\n"
    found = healthy_subjects(write(tmp_path, COHORT + ill), ["T1"])
    assert {split: subjects(items) for split, items in found.items()} == {"train": ["sub-01"], "val": ["sub-02"]}
    with pytest.raises(CohortError, match="no row with split=val, healthy=True"):
        healthy_subjects(write(tmp_path, COHORT.replace("sub-02,val", "sub-02,test")), ["T1"])


def test_optional_columns_may_be_missing(tmp_path):
    path = write(tmp_path, "subject,split,T1\ns1,train,1.nii\n")
    assert set(read_cohort(str(path), ["T1"])[0]) == {"subject", "split", "image"}
    assert subjects(read_cohort(path, ["T1"], healthy=True)) == ["s1"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_spreadsheets_of_all_kinds(tmp_path, encoding, newline):
    path = write(tmp_path, COHORT.replace("sub-01", "Jürgen").replace("\n", newline) + newline, encoding)
    assert subjects(read_cohort(path, ["T1"]))[0] == "Jürgen"
    assert len(read_cohort(path, ["T1"])) == 4


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        (COHORT, {"modalities": ["FLAIR"]}, "no column FLAIR"),
        (COHORT, {"modalities": ["FLAIR", "T1", "CT"]}, "no column FLAIR, CT"),
        (COHORT.replace("split", "fold"), {"split": "train"}, "no column split"),
        ("", {}, "no column subject, T1"),
        ("subject,split,T1\n", {}, "no row"),
        (COHORT, {"split": "validation"}, "no row with split=validation"),
        (COHORT, {"split": "train", "healthy": False}, "no row with split=train, healthy=False"),
        (COHORT.replace("sub-04", "sub-01"), {}, "'sub-01' appears more than once"),
        (COHORT, {"modalities": ["T1", "T2"]}, "row 4, column T2: subject 'sub-03' lacks an image"),
        ("subject,split,T1\ns1,train\n", {}, "'s1' lacks an image"),
        ("subject,split,T1\n,train,1.nii\n", {}, "'' cannot name a folder"),
        ("subject,split,T1\n../s1,train,1.nii\n", {}, "cannot name a folder"),
    ],
)
def test_bad_cohorts_are_refused_with_the_reason(tmp_path, text, arguments, message):
    path = write(tmp_path, text)
    with pytest.raises(CohortError, match=message) as error:
        read_cohort(path, **{"modalities": ["T1"], **arguments})
    assert str(error.value).startswith(str(path))


def test_subject_in_two_splits_is_refused(tmp_path):
    text = "subject,split,T1\ns1,train,1.nii\n\ns1,test,2.nii\n"
    expected = r"row 4, column subject: .*'s1' appears more than once \(row 2, in the splits test and train\)"
    with pytest.raises(CohortError, match=expected):
        read_cohort(write(tmp_path, text), ["T1"], split="train")


@pytest.mark.parametrize("name", ["missing.csv", "."])
def test_missing_cohort_is_refused(tmp_path, name):
    with pytest.raises(CohortError, match="no such cohort CSV"):
        read_cohort(tmp_path / name, ["T1"])


@pytest.mark.parametrize(
    "content",
    ["subject,split,T1\nJürgen,train,1.nii\n".encode("latin-1"), b"\x1f\x8b\x08\x00\x80\xff"],
    ids=["latin-1", "gzip"],
)
def test_cohort_that_is_no_utf8_is_refused(tmp_path, content):
    path = tmp_path / "cohort.csv"
    path.write_bytes(content)
    with pytest.raises(CohortError, match="UTF-8"):
        read_cohort(path, ["T1"])


@pytest.mark.parametrize(
    "name", ["", ".", "..", "/", "a/b", "/a", "a/", "../a", "..a", ".partial-a", "a\\b", "a\nb", "a\x1bb", "a\udcfcb"]
)
def test_names_that_leave_the_folder_are_refused(name):
    with pytest.raises(CohortError, match="cannot name a folder"):
        check_subjects(Path("cohort.csv"), {2: {"subject": "ok"}, 3: {"subject": name}})


@pytest.mark.parametrize("name", ["sub-01", "IXI012-HH-1211-T1", "a.b", "a..", "Jürgen 2", "脳"])
def test_names_that_are_allowed(name):
    check_subjects(Path("cohort.csv"), {2: {"subject": name}, 3: {"subject": "other"}})


def test_nothing_left_may_be_allowed(tmp_path):
    assert read_cohort(write(tmp_path), ["T1"], split="val", healthy=False, allow_empty=True) == []


def test_a_split_is_needed_only_where_one_is_asked_for(tmp_path):
    path = write(tmp_path, "subject,T1\ns1,1.nii\n")
    assert subjects(read_cohort(path, ["T1"])) == ["s1"]
    with pytest.raises(CohortError, match="no column split"):
        read_cohort(path, ["T1"], split="train")


def test_modalities_are_the_other_columns(tmp_path):
    assert cohort_modalities(write(tmp_path)) == ["T1", "T2"]
    with pytest.raises(CohortError, match="no column of a modality"):
        cohort_modalities(write(tmp_path, "subject,split,lesion\n"))


def test_the_site_is_kept_where_it_is_known_and_is_no_modality(tmp_path):
    rows = [
        {"subject": "a", "split": "test", "site": "north", "T1": "a.nii.gz"},
        {"subject": "b", "split": "test", "T1": "b.nii.gz"},
    ]
    write_cohort(tmp_path / "cohort.csv", ["T1"], rows)
    assert cohort_modalities(tmp_path / "cohort.csv") == ["T1"]
    first, second = read_cohort(tmp_path / "cohort.csv", ["T1"])
    assert first["site"] == "north" and "site" not in second
    write_cohort(tmp_path / "none.csv", ["T1"], rows[1:])
    assert (tmp_path / "none.csv").read_text(encoding="utf-8").splitlines()[0] == "subject,split,T1,brain,lesion"


def test_sample_is_copied_and_replaces_nothing_else(tmp_path):
    paths = write_sample(tmp_path / "new" / "sample")
    assert sorted(path.name for path in paths) == sorted(path.name for path in SAMPLE_DIR.iterdir())
    assert all(path.read_bytes() == (SAMPLE_DIR / path.name).read_bytes() for path in paths)
    assert sorted(paths[0].parent.iterdir()) == sorted(paths)
    assert write_sample(paths[0].parent) == paths  # again
    own = tmp_path / "own" / "LICENSE"
    own.parent.mkdir()
    own.write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match="LICENSE: is there already and is not a file of the sample"):
        write_sample(own.parent)
    assert [path.read_text(encoding="utf-8") for path in own.parent.iterdir()] == ["mine"]
    with pytest.raises(OutputError, match=r"own/LICENSE/none: cannot be written"):
        write_sample(own / "none")
