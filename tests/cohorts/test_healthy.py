import csv

import numpy as np
import pytest
from typer.testing import CliRunner

from common.cli import app
from common.cohorts.healthy import LAYOUTS, UKB_IMAGE, UKB_LESION
from common.cohorts.table import read_cohort

NUMBER = 10  # of the healthy subjects of each data set below


def ixi(data, save):
    for number in range(NUMBER):
        save(data / f"IXI{number:03d}-HH-{1000 + number}-T1.nii.gz", 0)


def fastmri(data, save):
    rows = [(f"file_brain_AXT1_{n}", "Normal for age") for n in range(NUMBER)]
    rows += [
        ("file_brain_AXT1_90", "Normal for age"),
        ("file_brain_AXT1_90", "Edema"),
        ("file_brain_AXT2_91", "Normal for age"),
    ]
    (data / "Annotations").mkdir(parents=True)
    lines = ["file,slice,study_level,x,y,width,height,label", *(f"{name},,Yes,,,,,{label}" for name, label in rows)]
    (data / "Annotations" / "brain.csv").write_text("\n".join(lines), encoding="utf-8")
    for name, _ in rows:
        save(data / "images" / f"{name}.nii.gz", 0)


def ukb(data, save):
    for number in range(NUMBER + 2):  # the two first have the largest lesions
        save(data / f"{1000 + number}_20253_2_0" / UKB_IMAGE, 0)
        save(data / f"{1000 + number}_20253_2_0" / UKB_LESION, 7 - min(number, 3))


def ct(data, save):
    for number in range(NUMBER + 2):
        save(data / f"patient{number:02d}" / "CT.nii.gz", 0)
    for number in (3, 5):
        save(data / f"patient{number:02d}" / "lesion.nii.gz", 2)


FOLDERS = {"ixi": ixi, "fastmri": fastmri, "ukb": ukb, "ct": ct}
TESTED = {
    "ixi": [],
    "fastmri": [],
    "ukb": ["1000_20253_2_0", "1001_20253_2_0"],
    "ct": ["patient03", "patient05"],
}


@pytest.fixture
def save(save_nifti):
    """Write a small volume of which so many voxels are 1."""

    def write(path, voxels):
        path.parent.mkdir(parents=True, exist_ok=True)
        volume = np.zeros((2, 2, 2), np.uint8)
        volume.ravel()[:voxels] = 1
        return save_nifti(path, volume)

    return write


def make(data, out, layout, *options):
    return CliRunner().invoke(app, ["cohort", "healthy", str(data), "-o", str(out), "--layout", layout, *options])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_healthy_subjects_train_and_validate_and_the_others_test(layout, save, tmp_path):
    (tmp_path / "data").mkdir()
    FOLDERS[layout](tmp_path / "data", save)
    options = ["--healthy", str(NUMBER)] if layout == "ukb" else []
    done = make(tmp_path / "data", tmp_path / "out", layout, *options)
    assert done.exit_code == 0, done.output
    cohort, modality = tmp_path / "out" / "cohort.csv", [LAYOUTS[layout].modality]
    healthy = [item for split in ("train", "val") for item in read_cohort(cohort, modality, split)]
    assert [len(read_cohort(cohort, modality, split)) for split in ("train", "val")] == [NUMBER - 1, 1]
    assert all("lesion" not in item for item in healthy)
    tested = read_cohort(cohort, modality, "test", healthy=False, allow_empty=True)
    assert [item["subject"] for item in tested] == TESTED[layout]
    for item in (*healthy, *tested):
        assert all((tmp_path / "out" / item[key]).is_file() for key in ("image", "lesion") if key in item)
    with cohort.open(newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == len(healthy) + len(tested)


def test_the_seed_chooses_who_validates(save, tmp_path):
    (tmp_path / "data").mkdir()
    ixi(tmp_path / "data", save)
    chosen = set()
    for seed in ("0", "1", "2", "3", "0"):
        assert make(tmp_path / "data", tmp_path / f"out{seed}", "ixi", "--seed", seed).exit_code == 0
        ((item),) = read_cohort(tmp_path / f"out{seed}" / "cohort.csv", ["T1"], "val")
        chosen.add((seed, item["subject"]))
    assert len(chosen) == 4
    assert len({subject for _, subject in chosen}) > 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_folder_is_told_what_was_expected(layout, tmp_path):
    (tmp_path / "data").mkdir()
    done = make(tmp_path / "data", tmp_path / "out", layout)
    assert done.exit_code == 3
    assert done.stderr.startswith("CohortError: ")
    assert LAYOUTS[layout].expected in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_participant_without_a_mask_is_named(save, tmp_path):
    ukb(tmp_path / "data", save)
    (tmp_path / "data" / "1004_20253_2_0" / UKB_LESION).unlink()
    done = make(tmp_path / "data", tmp_path / "out", "ukb")
    assert done.exit_code == 3
    assert "1004_20253_2_0/T2_FLAIR/lesions/final_mask.nii.gz: no such file" in done.stderr


def test_labels_of_another_table_are_refused(save, tmp_path):
    fastmri(tmp_path / "data", save)
    (tmp_path / "data" / "Annotations" / "brain.csv").write_text("name,finding\na,b\n", encoding="utf-8")
    done = make(tmp_path / "data", tmp_path / "out", "fastmri")
    assert done.exit_code == 3
    assert "no columns file and label" in done.stderr
