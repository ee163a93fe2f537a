"""The cohort of IXI: names as downloaded and as at hand, lesions in the test subjects only, the same ones each time."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from common.cli import app
from common.cohorts.ixi_lesions import SPLIT
from common.data.cohort import read_cohort
from common.data.labelled import check_labelled_cohort


def subjects_of(split):
    with SPLIT.open(newline="", encoding="utf-8") as file:
        return [row["subject"] for row in csv.DictReader(file) if row["split"] == split]


TRAIN, VAL, TEST, OTHER = subjects_of("train")[0], subjects_of("val")[0], *subjects_of("test")[:2]


@pytest.fixture(scope="module")
def images(phantom, save_nifti, tmp_path_factory):
    """Four subjects, two of them named as IXI names its files, and one that is not in the split."""
    folder = tmp_path_factory.mktemp("ixi")
    shape, affine = phantom.grid()
    volume = phantom.on_grid(shape, affine)[0]
    names = [f"{TRAIN}_T1", f"{VAL}-HH-1211-T1", f"{TEST}-HH-1312-T1", f"{OTHER}_T1", "IXI999-Guys-0828-T1"]
    for name in names:
        save_nifti(folder / f"{name}.nii.gz", volume, affine)
    return folder


def make(images, output, *options):
    return CliRunner().invoke(app, ["cohort", "ixi-lesions", str(images), "-o", str(output), *options])


@pytest.fixture(scope="module")
def made(images, tmp_path_factory):
    output = tmp_path_factory.mktemp("made")
    done = make(images, output)
    assert done.exit_code == 0, done.output
    assert "147 of 151 subjects of the recorded split are not in" in done.stderr
    return output


def test_rows_are_the_recorded_split_and_the_lesions(made, images):
    items = {item["subject"]: item for item in read_cohort(made / "cohort.csv", ["T1"])}
    assert {name: item["split"] for name, item in items.items()} == {
        TRAIN: "train",
        VAL: "val",
        TEST: "test",
        f"{TEST}-blobs": "test",
        OTHER: "test",
        f"{OTHER}-blobs": "test",
    }
    assert [name for name, item in items.items() if "lesion" in item] == [f"{TEST}-blobs", f"{OTHER}-blobs"]
    assert Path(str(items[TEST]["image"])).resolve() == images / f"{TEST}-HH-1312-T1.nii.gz"
    check_labelled_cohort(made / "cohort.csv", ["T1"])


def test_only_lesions_change_the_image(made, images):
    healthy = nib.load(images / f"{TEST}-HH-1312-T1.nii.gz")
    image, lesion = (nib.load(made / f"{TEST}-blobs_{name}.nii.gz") for name in ("T1", "lesion"))
    assert np.allclose(image.affine, healthy.affine)
    assert np.allclose(lesion.affine, healthy.affine)
    mask = np.asarray(lesion.dataobj) > 0
    changed = ~np.isclose(np.asarray(image.dataobj), np.asarray(healthy.dataobj))
    assert mask.sum() * 0.008 > 1
    assert changed[mask].mean() > 0.95
    assert changed[~mask].mean() < 0.05


def test_the_seed_makes_the_lesions(made, images, tmp_path):
    masks = [made / f"{TEST}-blobs_lesion.nii.gz"]
    for seed in (0, 1):
        assert make(images, tmp_path / str(seed), "--seed", str(seed)).exit_code == 0
        masks.append(tmp_path / str(seed) / f"{TEST}-blobs_lesion.nii.gz")
    first, same, other = (np.asarray(nib.load(mask).dataobj) for mask in masks)
    assert np.array_equal(first, same)
    assert not np.array_equal(first, other)


def test_several_kinds_in_another_split(images, tmp_path):
    options = ["--lesions", "texture", "--lesions", "blobs", "--insert-into", "val"]
    assert make(images, tmp_path, *options).exit_code == 0
    with_lesion = read_cohort(tmp_path / "cohort.csv", ["T1"], healthy=False)
    assert [item["subject"] for item in with_lesion] == [f"{VAL}-texture", f"{VAL}-blobs"]


def test_what_cannot_be_made_is_one_line(images, tmp_path):
    (tmp_path / "empty").mkdir()
    done = make(tmp_path / "empty", tmp_path / "out")
    assert done.exit_code == 3
    assert "CohortError: " in done.stderr
    assert "no image of the recorded split" in done.stderr
    done = make(images, tmp_path / "out", "--lesions", "atlas")
    assert done.exit_code == 3
    assert "give --atlas MASK" in done.stderr
    assert not (tmp_path / "out" / "cohort.csv").exists()
    assert make(tmp_path / "none", tmp_path / "out").exit_code == 2


@pytest.mark.skipif("UAD_TEST_DATA" not in os.environ, reason="UAD_TEST_DATA names a folder with ixi_heads/*_T1.nii.gz")
def test_heads_get_a_mask_of_the_brain(tmp_path):
    head = sorted(Path(os.environ["UAD_TEST_DATA"]).glob("ixi_heads/*_T1.nii.gz"))[0]
    (tmp_path / "heads").mkdir()
    (tmp_path / "heads" / f"{TEST}-HH-1312-T1.nii.gz").symlink_to(head)
    assert make(tmp_path / "heads", tmp_path / "refused").exit_code == 3
    assert make(tmp_path / "heads", tmp_path / "out", "--strip", "atlas").exit_code == 0
    items = read_cohort(tmp_path / "out" / "cohort.csv", ["T1"])
    assert [item["brain"] for item in items] == [str(tmp_path / "out" / f"{TEST}_brain.nii.gz")] * 2
    brain, truth = (
        nib.load(path) for path in (items[0]["brain"], head.with_name(head.name.replace("_T1", "_brain_mask")))
    )
    inside, expected = np.asarray(brain.dataobj) > 0, np.asarray(truth.dataobj) > 0
    assert 2 * (inside & expected).sum() / (inside.sum() + expected.sum()) > 0.95
