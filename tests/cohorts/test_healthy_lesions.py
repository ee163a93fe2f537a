"""Healthy subjects with simulated lesions: names as downloaded and as at hand, lesions in the test subjects only."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from common.cli import app
from common.cohorts.healthy_lesions import IXI, NOVOSIBIRSK
from common.cohorts.labelled import check_labelled_cohort
from common.cohorts.table import read_cohort
from common.images.mni import TEMPLATE
from common.transforms.intensity import CorrectBiasFieldd
from common.transforms.load import LoadImageCheckedd


def subjects_of(split, site=IXI):
    with site.split.open(newline="", encoding="utf-8") as file:
        return [row["subject"] for row in csv.DictReader(file) if row["split"] == split]


TRAIN, VAL, TEST, OTHER = subjects_of("train")[0], subjects_of("val")[0], *subjects_of("test")[:2]


@pytest.fixture(scope="module")
def images(phantom, save_nifti, tmp_path_factory):
    """Four subjects, two of them named as IXI names its files, and one that is not in the split.

    Folds of 25 mm, bright and dark, under a coil that makes the front half as bright again as the middle.
    """
    folder = tmp_path_factory.mktemp("ixi")
    shape, affine = phantom.grid()
    points, _ = phantom.points(shape, affine)
    folds = 1 + 0.35 * np.sin(points[..., 0] / 4)
    volume = np.where(phantom.on_grid(shape, affine)[1], 200 * folds * np.exp(points[..., 1] / 100), 0)
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


def test_blobs_are_no_brighter_than_tissue_once_the_bias_field_is_gone(made):
    """Of an image as it is the brightest place of the coil allowed a blob anywhere to be as bright."""
    for subject in (TEST, OTHER):
        files = {"image": made / f"{subject}-blobs_T1.nii.gz", "lesion": made / f"{subject}-blobs_lesion.nii.gz"}
        item = LoadImageCheckedd(("image", "lesion"))({name: str(path) for name, path in files.items()})
        item["brain"] = item["image"] > 0
        image = CorrectBiasFieldd("image", "brain")(item)["image"].numpy()
        lesion, brain = item["lesion"].numpy() > 0, item["brain"].numpy()
        assert lesion.any()
        assert np.percentile(image[lesion], 95) < 1.1 * np.percentile(image[brain], 98)


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
    assert "give --atlas MASK_OR_FOLDER" in done.stderr
    assert not (tmp_path / "out" / "cohort.csv").exists()
    assert make(tmp_path / "none", tmp_path / "out").exit_code == 2


def test_the_split_of_novosibirsk_is_by_subject():
    counts = {split: len(subjects_of(split, NOVOSIBIRSK)) for split in ("train", "val", "test")}
    assert counts == {"train": 16, "val": 10, "test": 26}
    everyone = [subject for split in counts for subject in subjects_of(split, NOVOSIBIRSK)]
    assert len(set(everyone)) == 52


@pytest.fixture(scope="module")
def strokes(tmp_path_factory, save_nifti):
    """Novosibirsk as downloaded, one subject of the split `test`, with strokes of a folder of masks in MNI152."""
    folder = tmp_path_factory.mktemp("ds002748")
    subject = subjects_of("test", NOVOSIBIRSK)[0]
    (folder / subject / "anat").mkdir(parents=True)
    (folder / "masks").mkdir()
    brain = nib.load(TEMPLATE)
    nib.save(brain, folder / subject / "anat" / f"{subject}_T1w.nii.gz")
    for name, half in (("large", 9), ("small", 2)):
        mask = np.zeros((91, 109, 91), np.uint8)
        mask[tuple(slice(c - half, c + half) for c in (26, 54, 50))] = 1
        affine = nib.affines.from_matvec(np.eye(3) * 2, (-90, -126, -72))
        save_nifti(folder / "masks" / f"{name}.nii.gz", mask, affine)
    options = ["--lesions", "chronic_stroke", "--lesions", "acute_stroke", "--min-ml", "1"]
    options += ["--chronic-stroke", str(folder / "masks"), "--acute-stroke", str(folder / "masks" / "large.nii.gz")]
    output = tmp_path_factory.mktemp("strokes") / "out"
    done = CliRunner().invoke(app, ["cohort", "novosibirsk-lesions", str(folder), "-o", str(output), *options])
    assert done.exit_code == 0, done.output
    return subject, output, folder / "masks"


def test_each_kind_of_stroke_is_a_row_with_its_site(strokes):
    subject, output, _ = strokes
    items = read_cohort(output / "cohort.csv", ["T1"], "test")
    assert [item["subject"] for item in items] == [subject, f"{subject}-chronic_stroke", f"{subject}-acute_stroke"]
    assert {item["site"] for item in items} == {"novosibirsk"}
    check_labelled_cohort(output / "cohort.csv", ["T1"])


def test_masks_go_where_they_are_in_mni(strokes):
    """The subject is the template: after the registration the large mask lies where it was, and is much darker."""
    subject, output, _ = strokes
    image, label = (nib.load(output / f"{subject}-chronic_stroke_{name}.nii.gz") for name in ("T1", "lesion"))
    mask = np.asarray(label.dataobj) > 0
    assert mask.sum() * abs(np.linalg.det(label.affine)) / 1000 == pytest.approx(46.7, rel=0.25)
    centre = nib.affines.apply_affine(label.affine, np.argwhere(mask).mean(axis=0))
    assert np.allclose(centre, (-39, -19, 27), atol=4)
    values, healthy = np.asarray(image.dataobj), np.asarray(nib.load(TEMPLATE).dataobj)
    assert np.median(values[mask]) < 0.6 * np.median(healthy[mask])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--lesions", "acute_stroke"], "give --acute-stroke MASK_OR_FOLDER"),
        (["--lesions", "atlas", "--atlas", "none.nii"], "none.nii: no such lesion mask"),
        (
            ["--lesions", "atlas", "--atlas", "MASKS", "--min-ml", "900"],
            "none of 2 lesion masks has 900 ml; give larger masks, or give --min-ml 0",
        ),
    ],
)
def test_masks_that_cannot_be_used_are_one_line(images, strokes, tmp_path, options, said):
    masks = strokes[2]
    done = make(images, tmp_path / "out", *[str(masks) if option == "MASKS" else option for option in options])
    assert done.exit_code == 3 and said in done.stderr and len(done.stderr.strip().splitlines()) <= 2
    assert not (tmp_path / "out").exists()


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
