import csv

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from common.cli import app
from common.cohorts.headct_sprites import SPLIT
from common.cohorts.table import read_cohort
from common.transforms.head import head_mask

KEPT = [row["name"] for row in csv.DictReader(SPLIT.read_text(encoding="utf-8").splitlines())]
OTHERS = [f"other{i:02d}.jpeg" for i in range(30)]


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """330 heads of one grey value each, in noise."""
    random = np.random.default_rng(0)
    inside = np.hypot(*(np.indices((64, 64)) - 31.5)) < 20
    noise = random.integers(0, 20, (330, 64, 64))
    images = np.where(inside, 60 + np.arange(330)[:, None, None] // 4 + noise, 25).astype(np.uint8)
    folder = tmp_path_factory.mktemp("archive")
    np.savez(folder / "headct_64.npz", images=images, names=np.array(OTHERS + KEPT[::-1]))
    return folder


@pytest.fixture(scope="module")
def cohort(archive, make_cohort, tmp_path_factory):
    folder = tmp_path_factory.mktemp("headct")
    make_cohort("headct-sprites", archive, folder)
    return folder


def volume(path):
    return np.asarray(nib.load(path).dataobj)


def places(folder):
    with (folder / "slices.csv").open(newline="", encoding="utf-8") as file:
        return {row["name"]: (row["subject"], int(row["slice"])) for row in csv.DictReader(file)}


def test_split_is_the_recorded_one(cohort):
    found = places(cohort)
    counts = [sum(subject.startswith(split) for subject, _ in found.values()) for split in ("train", "val", "test")]
    assert counts == [30, 100, 200]
    assert {found[name][0][:5] for name in OTHERS} == {"train"}
    assert found[KEPT[0]] == ("val000", 0)
    assert found[KEPT[111]] == ("test001", 1)


def test_first_100_that_test_have_a_sprite_each_and_nothing_else_is_changed(cohort, archive):
    images, names = (np.load(archive / "headct_64.npz")[key] for key in ("images", "names"))
    original = dict(zip(names, images, strict=True))
    lesions = {item["subject"]: item.get("lesion") for item in read_cohort(cohort / "cohort.csv", ["CT"])}
    assert [name for name, lesion in lesions.items() if lesion] == [f"test{i:03d}" for i in range(10)]
    for name, (subject, place) in places(cohort).items():
        image = volume(cohort / f"{subject}.nii.gz")[..., place].T
        if lesions[subject]:
            sprite = volume(lesions[subject])[..., place].T > 0
            assert 20 < sprite.sum() < 200
            assert len(np.unique(image[sprite])) == 1
            assert np.array_equal(image[~sprite], original[name][~sprite])
        else:
            assert np.array_equal(image, original[name])


def test_seed_chooses_the_sprites_and_not_the_split(cohort, archive, make_cohort, tmp_path):
    make_cohort("headct-sprites", archive, tmp_path, "--seed", "1", "--onto", "tissue", "--test-only")
    mine, others = places(tmp_path), places(cohort)
    assert mine == {name: place for name, place in others.items() if place[0].startswith("test")}
    sprites = [volume(folder / "test003_lesion.nii.gz") > 0 for folder in (tmp_path, cohort)]
    assert not np.array_equal(*sprites)
    with np.load(archive / "headct_64.npz") as data:
        clean = np.stack([data["images"][list(data["names"]).index(KEPT[100 + 30 + i])] for i in range(10)])
    assert not sprites[0].transpose(2, 1, 0)[~head_mask(clean, 45.0, axial=0)].any()
    assert sprites[1].transpose(2, 1, 0)[~head_mask(clean, 45.0, axial=0)].any()
    assert (tmp_path / "test015.nii.gz").read_bytes() == (cohort / "test015.nii.gz").read_bytes()


def test_jpeg_images_as_mednist_unpacks(tmp_path, archive, cohort, make_cohort):
    (tmp_path / "HeadCT").mkdir()
    with np.load(archive / "headct_64.npz") as data:
        for image, name in zip(data["images"], data["names"], strict=True):
            Image.fromarray(image).save(tmp_path / "HeadCT" / name, quality=100, subsampling=0)
    make_cohort("headct-sprites", tmp_path / "HeadCT", tmp_path / "cohort")
    expected = {name: place for name, place in places(cohort).items() if name in KEPT}
    assert {name: place for name, place in places(tmp_path / "cohort").items() if name in KEPT} == expected
    difference = volume(tmp_path / "cohort" / "val004.nii.gz").astype(int) - volume(cohort / "val004.nii.gz")
    assert np.abs(difference).max() <= 3  # JPEG


def test_too_few_of_the_recorded_images(tmp_path):
    np.savez(tmp_path / "some.npz", images=np.zeros((40, 64, 64), np.uint8), names=np.array(OTHERS + KEPT[:10]))
    done = CliRunner().invoke(app, ["cohort", "headct-sprites", str(tmp_path), "-o", str(tmp_path.with_suffix(".out"))])
    assert done.exit_code != 0
    assert "10 of val, 0 of test, 30 of train" in done.stderr
    assert not tmp_path.with_suffix(".out").exists()


def test_a_folder_without_images(tmp_path):
    done = CliRunner().invoke(app, ["cohort", "headct-sprites", str(tmp_path), "-o", str(tmp_path.with_suffix(".out"))])
    assert done.exit_code != 0
    assert "no JPEG images, and no npz" in done.stderr
    assert not tmp_path.with_suffix(".out").exists()
