"""One typed error per kind of input that is not a usable scan. The whole way of bad files: tests/bad_inputs."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from common.errors import ImageFileError, ImageGeometryError, ImageIntensityError, ImageShapeError, UADError
from common.transforms.check import CheckVolumed, LoadImageCheckedd, root_cause, source_name, voxel_volume_ml


def make_image(shape=(1, 6, 7, 8), affine=None, **meta):
    values = torch.arange(np.prod(shape), dtype=torch.float32).reshape(shape)
    return MetaTensor(values, affine=np.diag([1.0, 2.0, 3.0, 1.0]) if affine is None else affine, meta=meta)


def check(image, **settings):
    return CheckVolumed("image", **settings)({"image": image})["image"]


def test_good_image_passes_untouched():
    image = make_image()
    assert check(image) is image
    check(make_image((2, 6, 7, 8)), channels=2)


@pytest.mark.parametrize(
    ("shape", "fact"),
    [((1, 6, 7), "2 spatial"), ((1, 6, 7, 8, 2), "4 spatial"), ((2, 6, 7, 8), "2 volumes"), ((1, 6, 7, 1), "slice")],
)
def test_shape(shape, fact):
    with pytest.raises(ImageShapeError, match=fact):
        check(make_image(shape))


@pytest.mark.parametrize(
    "diagonal", [(1, 0, 1), (1, np.nan, 1), (1, 1, np.inf), (1000, 1000, 1000), (1e-3, 1e-3, 1e-3), (1, 1, 25)]
)
def test_geometry(diagonal):
    with pytest.raises(ImageGeometryError):
        check(make_image(affine=np.diag([*diagonal, 1.0])))


@pytest.mark.parametrize(("value", "fact"), [(np.nan, "1 voxels"), (np.inf, "1 voxels"), (-np.inf, "1 voxels")])
def test_values_that_are_not_finite(value, fact):
    image = make_image()
    image[0, 1, 2, 3] = value
    with pytest.raises(ImageIntensityError, match=fact):
        check(image)


@pytest.mark.parametrize(("value", "fact"), [(0, "zero"), (7, "are 7")])
def test_constant(value, fact):
    with pytest.raises(ImageIntensityError, match=fact):
        check(make_image() * 0 + value)


def test_messages_are_one_line_with_file_fact_and_remedy():
    image = make_image((1, 6, 7, 1))
    image.meta["filename_or_obj"] = "folder/scan.nii.gz"
    with pytest.raises(UADError) as caught:
        check(image)
    error = caught.value
    assert str(error) == f"folder/scan.nii.gz: {error.fact}; {error.remedy}"
    assert "\n" not in str(error)
    assert source_name(make_image()) == "image"


def test_load(tmp_path, save_nifti):
    volume = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    affine = np.array([[0, -2.0, 0, 5], [1.5, 0, 0, 6], [0, 0, 3, 7], [0, 0, 0, 1]])
    path = save_nifti(tmp_path / "image.nii.gz", volume, affine)
    image = LoadImageCheckedd("image")({"image": str(path)})["image"]
    assert image.dtype == torch.float32
    assert np.array_equal(image[0], volume)
    assert np.array_equal(image.affine, affine)
    assert source_name(image) == str(path)
    assert voxel_volume_ml(image) == pytest.approx(0.009)


def test_load_leaves_an_image_in_memory():
    image = make_image()
    assert LoadImageCheckedd("image")({"image": image})["image"] is image


def test_load_refuses_before_it_reads(tmp_path, save_nifti):
    load = LoadImageCheckedd("image")
    with pytest.raises(ImageFileError, match="no such file"):
        load({"image": str(tmp_path / "none.nii.gz")})
    with pytest.raises(ImageFileError, match="folder"):
        load({"image": str(tmp_path)})
    with pytest.raises(ImageIntensityError, match="complex"):
        load({"image": str(save_nifti(tmp_path / "complex.nii", np.ones((3, 3, 3), np.complex64)))})
    nib.save(nib.Nifti1Image(np.ones((3, 3, 3), np.float32), None), tmp_path / "nowhere.nii")
    with pytest.raises(ImageGeometryError, match="sform"):
        load({"image": str(tmp_path / "nowhere.nii")})


def test_root_cause_is_found_under_monais_errors():
    error = ImageFileError("scan", "fact", "remedy")
    with pytest.raises(RuntimeError) as caught:
        try:
            raise error
        except ImageFileError as inner:
            raise RuntimeError("applying transform") from inner
    assert root_cause(caught.value) is error
    other = RuntimeError("another")
    assert root_cause(other) is other
