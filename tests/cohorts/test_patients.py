"""Cohorts of public data where they lie after unpacking."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from common.cli import app
from common.cohorts.patients import LAYOUTS, LayoutName
from common.cohorts.table import cohort_modalities, read_cohort

SPACE = "ses-1_space-MNI152NLin2009aSym"
FILES = {  # as published: two patients each
    "brats": [
        f"{name}/{name}_{part}.nii.gz"
        for name in ("BraTS2021_00000", "BraTS2021_00002")
        for part in ("t1", "t1ce", "t2", "flair", "seg")
    ],
    "atlas2": [
        f"Training/R001/{name}/ses-1/anat/{name}_{SPACE}_{part}.nii.gz"
        for name in ("sub-r001s001", "sub-r001s002")
        for part in ("T1w", "label-L_desc-T1lesion_mask")
    ],
    "mslub": [
        *(
            f"coregistered/patient01/{part}.nii.gz"
            for part in ("T1W", "T1WKS", "T2W", "FLAIR", "brainmask", "consensus_gt")
        ),
        *(f"patient02/patient02_{part}.nii.gz" for part in ("T1W", "T2W", "FLAIR", "brainmask", "consensus_gt")),
    ],
    "wmh": [
        f"training/{name}/{part}.nii.gz"
        for name in ("Utrecht/0", "Amsterdam/GE3T/100")
        for part in ("pre/T1", "pre/FLAIR", "orig/FLAIR", "wmh")
    ],
}
SUBJECTS = {
    "brats": ["BraTS2021_00000", "BraTS2021_00002"],
    "atlas2": ["Training-R001-sub-r001s001-ses-1-anat", "Training-R001-sub-r001s002-ses-1-anat"],
    "mslub": ["coregistered-patient01", "patient02"],
    "wmh": ["training-Amsterdam-GE3T-100", "training-Utrecht-0"],
}


def unpack(folder, files):
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    return folder


def make(data, output, layout):
    return CliRunner().invoke(app, ["cohort", "patients", str(data), "-o", str(output), "--layout", layout])


def test_every_layout_has_a_name():
    assert {name.value for name in LayoutName} == set(LAYOUTS) == set(FILES)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_patients_are_found(layout, tmp_path):
    data = unpack(tmp_path / "data", FILES[layout])
    done = make(data, tmp_path / "out", layout)
    assert done.exit_code == 0, done.output
    cohort = tmp_path / "out" / "cohort.csv"
    modalities = cohort_modalities(cohort)
    assert modalities == list(LAYOUTS[layout].modalities)
    items = read_cohort(cohort, modalities, split="test", healthy=False)
    assert [item["subject"] for item in items] == SUBJECTS[layout]
    for item in items:
        images = [item["image"]] if isinstance(item["image"], str) else item["image"]
        files = [cohort.parent / path for path in (*images, item["lesion"])]
        assert all(file.is_file() for file in files)
        assert len({file.resolve() for file in files}) == len(modalities) + 1
        assert ("brain" in item) == (layout == "mslub")


def test_uncompressed_files_are_found_too(tmp_path):
    files = [file.removesuffix(".gz") for file in FILES["brats"][:5]]
    assert make(unpack(tmp_path / "data", files), tmp_path / "out", "brats").exit_code == 0


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "no lesion masks wmh.nii*; the layout wmh has T1, FLAIR beside each"),
        (FILES["wmh"][1:4], "T1.nii.gz: no such file beside the lesion mask"),
    ],
)
def test_what_is_not_there_is_one_line(files, message, tmp_path):
    (tmp_path / "data").mkdir()
    done = make(unpack(tmp_path / "data", files), tmp_path / "out", "wmh")
    assert done.exit_code == 3
    assert done.stderr.startswith("CohortError: ")
    assert message in done.stderr
    assert not (tmp_path / "out").exists()
