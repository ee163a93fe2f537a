"""Content that was not fetched is named as such, for every way that an image is opened."""

from __future__ import annotations

import pytest

from common.cohorts.labelled import check_labelled_cohort
from common.errors import CohortError, ImageFileError
from common.images.pointer import check_fetched
from common.transforms.load import load_image

KEY = "SHA256E-s1234--ab12.nii.gz"
TEXTS = {
    "git-annex": f"/annex/objects/{KEY}\n",
    "Git LFS": "version https://git-lfs.github.com/spec/v1\noid sha256:ab12\nsize 1234\n",
}


def annexed(path):
    path.symlink_to(f".git/annex/objects/x1/y2/{KEY}/{KEY}")
    return path


@pytest.mark.parametrize("name", ["scan.nii.gz", "scan.nii", "scan.mha", "scan.nrrd", "scan.dcm"])
@pytest.mark.parametrize("tool", TEXTS)
def test_pointer_is_named(name, tool, tmp_path):
    path = tmp_path / name
    path.write_text(TEXTS[tool], encoding="utf-8")
    with pytest.raises(ImageFileError, match=f"only a pointer of {tool}.*fetch it with git") as caught:
        load_image(path)
    assert str(path) in str(caught.value)


def test_dead_link_into_the_annex(tmp_path):
    path = annexed(tmp_path / "scan.nii.gz")
    with pytest.raises(ImageFileError, match="only a pointer of git-annex"):
        load_image(path)
    (tmp_path / "dead.nii.gz").symlink_to(tmp_path / "gone.nii.gz")
    with pytest.raises(ImageFileError, match="no such file"):
        load_image(tmp_path / "dead.nii.gz")


def test_slice_of_a_series(write_series, tmp_path):
    series = write_series(tmp_path / "series")
    check_fetched(series.folder)
    series.files[3].unlink()
    annexed(series.files[3])
    with pytest.raises(ImageFileError, match=r"IM0004.*git-annex"):
        load_image(series.folder)


def test_what_was_fetched_is_read(phantom, save_nifti, tmp_path):
    shape, affine = phantom.grid(spacing_mm=(8, 8, 8))
    content = save_nifti(tmp_path / "content.nii.gz", phantom.on_grid(shape, affine)[0], affine)
    link = annexed(tmp_path / "scan.nii.gz")
    target = tmp_path / link.readlink()
    target.parent.mkdir(parents=True)
    content.rename(target)
    assert load_image(link).shape == (1, *shape)


def test_cell_of_a_cohort(tmp_path):
    annexed(tmp_path / "a.nii.gz")
    cohort = tmp_path / "cohort.csv"
    cohort.write_text("subject,split,T1,lesion\na,test,a.nii.gz,\n", encoding="utf-8")
    with pytest.raises(CohortError, match=r"row 2, column T1: .*git-annex"):
        check_labelled_cohort(cohort, ["T1"])
