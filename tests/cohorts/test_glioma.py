import csv
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from common.cli import app
from common.cohorts.glioma import LAYOUTS, SPLIT, at_random
from common.cohorts.table import read_cohort


def rows_of(folder):
    with (folder / "cohort.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def patient_of(row):
    return row["subject"].removesuffix("_healthy")


def slices_of(path):
    """Which slices of the patient a stack of its first modality holds."""
    return np.asarray(nib.load(path).dataobj)[14, 14] - 100


def tumour_slices(path):
    return np.flatnonzero(np.asarray(nib.load(path).dataobj).any(axis=(0, 1)))


@pytest.fixture(scope="module")
def tcga_lgg(tmp_path_factory, write_patient, make_cohort):
    data, out = tmp_path_factory.mktemp("tcga"), tmp_path_factory.mktemp("tcga_cohort")
    recorded = list(csv.DictReader(SPLIT.read_text(encoding="utf-8").splitlines()))
    names = {split: [row["subject"] for row in recorded if row["split"] == split] for split in ("train", "val", "test")}
    chosen = [*names["train"][:12], *names["val"][:3], *names["test"][:4], "TCGA_XX_0001"]
    for number, name in enumerate(chosen):
        write_patient(data / name, ("T1", "FLAIR", "T1CE"), 24, range(6, 10 + number // 2))
    make_cohort("glioma", data, out, "--layout", "tcga_lgg")
    return data, out


def test_recorded_split_and_patients_beyond_it_test(tcga_lgg):
    recorded = {row["subject"]: row["split"] for row in csv.DictReader(SPLIT.read_text(encoding="utf-8").splitlines())}
    found = {patient_of(row): row["split"] for row in rows_of(tcga_lgg[1])}
    assert found.pop("TCGA_XX_0001") == "test"
    assert found == {name: recorded[name] for name in found}


@pytest.mark.parametrize(("layout", "counts"), [("brats2020", (4, 1, 1)), ("tcga_lgg", (12, 3, 5))])
def test_patients_are_split_without_overlap(layout, counts, request):
    """Two of the six of BraTS that train have no two slices without tumour, which would be a volume."""
    _, out = request.getfixturevalue(layout)
    splits = {}
    for row in rows_of(out):
        splits.setdefault(patient_of(row), set()).add(row["split"])
    assert all(len(split) == 1 for split in splits.values())
    found = Counter(next(iter(split)) for split in splits.values())
    assert tuple(found[split] for split in ("train", "val", "test")) == counts


@pytest.mark.parametrize(("layout", "counts"), [("brats2020", (286, 47, 36)), ("brats2021", (295, 37, 37))])
def test_shares_are_those_of_the_papers(layout, counts):
    patients = [Path(f"{number:03d}") for number in range(369)]
    parts = at_random(patients, LAYOUTS[layout].shares)
    assert tuple(len(parts[split]) for split in ("train", "val", "test")) == counts
    assert sorted(patient for part in parts.values() for patient in part) == patients


@pytest.mark.parametrize("count", [3, 4, 5, 10])
def test_of_few_patients_each_split_has_one(count):
    parts = at_random([Path(str(number)) for number in range(count)], LAYOUTS["brats2021"].shares)
    assert min(map(len, parts.values())) == 1


def test_brats_2021_is_the_twenty_middle_slices(tmp_path, write_patient, make_cohort):
    for number in range(1, 5):
        name = f"BraTS2021_{number:05d}"
        write_patient(tmp_path / "data" / name / name, ("flair", "t1", "t1ce", "t2"), 155, range(80, 80 + number))
    make_cohort("glioma", tmp_path / "data", tmp_path / "out", "--layout", "brats2021")
    rows = rows_of(tmp_path / "out")
    depths = {row["subject"]: nib.load(tmp_path / "out" / row["T2"]).shape[2] for row in rows}
    assert {depths[row["subject"]] for row in rows if row["lesion"]} == {20}
    assert all(depths[row["subject"]] == 20 - int(patient_of(row)[-1]) for row in rows if not row["lesion"])


def test_patients_with_a_copied_modality_are_left_out(brats2020):
    data, out = brats2020
    assert list(data.rglob("BraTS20_Training_009_seg.nii.gz"))
    assert "BraTS20_Training_009" not in {patient_of(row) for row in rows_of(out)}


@pytest.mark.parametrize(
    ("layout", "modality", "used", "margin"), [("brats2020", "T1", range(80, 129), 0), ("tcga_lgg", "T1", range(24), 1)]
)
def test_healthy_stacks_hold_no_tumour_and_all_slices_without(layout, modality, used, margin, request):
    data, out = request.getfixturevalue(layout)
    stacks = [row for row in rows_of(out) if not row["lesion"]]
    assert stacks
    for row in stacks:
        assert row["split"] != "test"
        (seg,) = data.rglob(f"{patient_of(row)}_seg.nii.gz")
        # grey values of BraTS's second and third modality are doubled: its T1 is not the first file
        image = np.asarray(nib.load(out / row[modality]).dataobj)[14, 14]
        slices = (image - 200) / 2 - 100 if layout == "brats2020" else image - 100
        near = {s + d for s in tumour_slices(seg) for d in range(-margin, margin + 1)}
        assert slices.tolist() == [s for s in used if s not in near]


def test_brats_volumes_are_slices_80_to_128_with_their_lesion(brats2020):
    data, out = brats2020
    volumes = [row for row in rows_of(out) if row["lesion"]]
    assert {row["split"] for row in volumes} == {"val", "test"}
    for row in volumes:
        assert slices_of(out / row["FLAIR"]).shape == (49,)
        (seg,) = data.rglob(f"{row['subject']}_seg.nii.gz")
        expected = np.asarray(nib.load(seg).dataobj)[..., 80:129] > 0
        assert np.array_equal(np.asarray(nib.load(out / row["lesion"]).dataobj), expected)


def test_columns_are_in_the_order_of_the_paper_and_the_cohort_can_be_read(brats2020, tcga_lgg):
    assert list(rows_of(brats2020[1])[0]) == ["subject", "split", "T1", "T1CE", "T2", "FLAIR", "brain", "lesion"]
    assert list(rows_of(tcga_lgg[1])[0]) == ["subject", "split", "T1", "FLAIR", "T1CE", "brain", "lesion"]
    (healthy,) = read_cohort(brats2020[1] / "cohort.csv", ("T1", "T1CE", "T2", "FLAIR"), "val", healthy=True)
    assert healthy["subject"].endswith("_healthy")
    assert nib.load(healthy["image"][3]).shape[2] > 1


def test_a_patient_who_lacks_a_modality_is_named(tmp_path, write_patient):
    write_patient(tmp_path / "TCGA_XX_0001", ("T1", "FLAIR"), 6, range(2))
    done = CliRunner().invoke(
        app, ["cohort", "glioma", str(tmp_path), "-o", str(tmp_path.with_suffix(".out")), "--layout", "tcga_lgg"]
    )
    assert done.exit_code != 0
    assert "TCGA_XX_0001_T1CE.nii.gz: no such file" in done.stderr
    assert not tmp_path.with_suffix(".out").exists()


def test_a_folder_without_patients(tmp_path):
    done = CliRunner().invoke(
        app, ["cohort", "glioma", str(tmp_path), "-o", str(tmp_path.with_suffix(".out")), "--layout", "brats2020"]
    )
    assert done.exit_code != 0
    assert "no <patient>_seg.nii.gz" in done.stderr
