import csv

import nibabel as nib
import numpy as np
import pytest

from common.data.cohort import read_cohort
from common.transforms.head import head_mask


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """330 heads of one grey value each, two of them twins, in noise."""
    random = np.random.default_rng(0)
    inside = np.hypot(*(np.indices((64, 64)) - 31.5)) < 20
    noise = random.integers(0, 20, (330, 64, 64))
    images = np.where(inside, 60 + np.arange(330)[:, None, None] // 4 + noise, 25).astype(np.uint8)
    images[7] = images[9]
    path = tmp_path_factory.mktemp("archive") / "headct_64.npz"
    np.savez(path, images=images, names=np.array([f"{i:06d}.jpeg" for i in range(len(images))]))
    return path


@pytest.fixture(scope="module")
def cohort(archive, load_script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("headct")
    load_script("make_headct_cohort").main(archive, folder)
    return folder


def volume(path):
    return np.asarray(nib.load(path).dataobj)


def places(folder):
    with (folder / "slices.csv").open(newline="", encoding="utf-8") as file:
        return {row["name"]: (row["subject"], int(row["slice"])) for row in csv.DictReader(file)}


def test_split_is_100_to_validate_200_to_test_and_no_twin_is_kept_aside(cohort):
    found = places(cohort)
    counts = [sum(subject.startswith(split) for subject, _ in found.values()) for split in ("train", "val", "test")]
    assert counts == [30, 100, 200]
    assert found["000007.jpeg"][0].startswith("train")
    assert found["000009.jpeg"][0].startswith("train")


def test_first_100_that_test_have_a_sprite_each_and_nothing_else_is_changed(cohort, archive):
    images, names = (np.load(archive)[key] for key in ("images", "names"))
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


def test_seed_chooses_the_sprites_and_not_the_split(cohort, archive, load_script, tmp_path):
    load_script("make_headct_cohort").main(archive, tmp_path, seed=1, onto="tissue", test_only=True)
    mine, others = places(tmp_path), places(cohort)
    assert mine == {name: place for name, place in others.items() if place[0].startswith("test")}
    sprites = [volume(folder / "test003_lesion.nii.gz") > 0 for folder in (tmp_path, cohort)]
    assert not np.array_equal(*sprites)
    clean = np.load(archive)["images"][[int(name[:6]) for name, place in mine.items() if place[0] == "test003"]]
    assert not sprites[0].transpose(2, 1, 0)[~head_mask(clean, 45.0, axial=0)].any()
    assert sprites[1].transpose(2, 1, 0)[~head_mask(clean, 45.0, axial=0)].any()
    assert (tmp_path / "test015.nii.gz").read_bytes() == (cohort / "test015.nii.gz").read_bytes()
