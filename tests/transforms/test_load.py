"""Images as they come, with the affine that their header says. The whole way of bad files: tests/bad_inputs."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from common.errors import CohortError, DicomError, ImageFileError, ImageGeometryError, ImageIntensityError
from common.transforms.check import source_name, voxel_volume_ml
from common.transforms.load import LoadImageCheckedd, load_image, load_lesion
from common.weights import digest, sha256


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
    image = MetaTensor(torch.ones(1, 2, 2, 2))
    assert LoadImageCheckedd("image")({"image": image})["image"] is image


def test_load_refuses_before_it_reads(tmp_path, save_nifti):
    load = LoadImageCheckedd("image")
    with pytest.raises(ImageFileError, match="no such file"):
        load({"image": str(tmp_path / "none.nii.gz")})
    with pytest.raises(DicomError, match="no DICOM"):
        load({"image": str(tmp_path)})
    with pytest.raises(ImageIntensityError, match="complex"):
        load({"image": str(save_nifti(tmp_path / "complex.nii", np.ones((3, 3, 3), np.complex64)))})
    nib.save(nib.Nifti1Image(np.ones((3, 3, 3), np.float32), None), tmp_path / "nowhere.nii")
    with pytest.raises(ImageGeometryError, match="sform"):
        load({"image": str(tmp_path / "nowhere.nii")})


def test_digest_says_what_was_read(tmp_path, save_nifti):
    one, two = (save_nifti(tmp_path / f"{name}.nii.gz", np.eye(4)[None] + name) for name in (1, 2))
    assert LoadImageCheckedd("image")({"image": str(one)})["image_sha256"] == sha256(one)
    assert digest([one, two]) != digest([two, one])
    assert digest(tmp_path) == digest([one, two])


def test_scale_slope_0_means_unscaled(tmp_path):
    """NIfTI-1: "If scl_slope is 0 then the values are not scaled"."""
    nifti = nib.Nifti1Image(np.arange(60, dtype=np.int16).reshape(3, 4, 5), np.eye(4))
    nifti.header.set_slope_inter(None, None)
    nib.save(nifti, tmp_path / "a.nii")
    content = bytearray((tmp_path / "a.nii").read_bytes())
    content[112:120] = np.array([0, 7], "<f4").tobytes()
    (tmp_path / "a.nii").write_bytes(content)
    assert np.array_equal(load_image(tmp_path / "a.nii")[0], np.arange(60).reshape(3, 4, 5))


def test_a_template_beside_the_scanner_is_no_contradiction(tmp_path):
    nifti = nib.Nifti1Image(np.ones((4, 4, 4), np.float32), None)
    nifti.header.set_sform(np.diag([2.0, 2, 2, 1]), code=4)
    moved = np.diag([1.0, 1, 1, 1])
    moved[:3, 3] = 30
    nifti.header.set_qform(moved, code=1)
    nib.save(nifti, tmp_path / "a.nii")
    assert np.array_equal(load_image(tmp_path / "a.nii").affine, np.diag([2.0, 2, 2, 1]))


def test_modalities_on_one_grid_are_stacked(tmp_path, save_nifti):
    paths = [str(save_nifti(tmp_path / f"{i}.nii.gz", np.full((3, 4, 5), i, np.float32))) for i in (1, 2)]
    image = LoadImageCheckedd("image")({"image": paths})["image"]
    assert image.shape == (2, 3, 4, 5)
    assert [float(channel.mean()) for channel in image] == [1, 2]
    assert source_name(image) == paths[0]


def test_a_lesion_mask_must_be_on_the_grid(tmp_path, save_nifti):
    path = save_nifti(tmp_path / "lesion.nii.gz", np.ones((3, 4, 5), np.uint8))
    image = MetaTensor(torch.ones(1, 3, 4, 5), affine=np.diag([2.0, 2, 2, 1]))
    assert load_lesion(str(path), image).sum() == 60
    with pytest.raises(CohortError, match="another grid"):
        load_lesion(str(path), MetaTensor(torch.ones(1, 3, 4, 5), affine=np.eye(4)))
