"""Images as they come, with the affine that their header says. The whole way of bad files: tests/bad_inputs."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - everyone's name for it
import torch
from monai.data import MetaTensor
from scipy.spatial.transform import Rotation

from common.errors import CohortError, DicomError, ImageFileError, ImageGeometryError, ImageIntensityError
from common.images.check import source_name, voxel_volume_ml
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


def test_digest_covers_the_voxels_of_a_header(phantom, tmp_path):
    volume, _, _ = phantom.on_grid(*phantom.grid((8.0, 8.0, 8.0)))
    image = sitk.GetImageFromArray(volume)
    for name in ("a.mhd", "b.nhdr", "c.hdr"):
        sitk.WriteImage(image, str(tmp_path / name))
    names = ("a.mhd", "b.nhdr", "c.hdr", "c.img")
    before = [digest(tmp_path / name) for name in names]
    for path in tmp_path.iterdir():
        if path.suffix in (".raw", ".img"):
            path.write_bytes(path.read_bytes()[:-4] + bytes([1, 2, 3, 4]))
    assert all(digest(tmp_path / name) != old for name, old in zip(names, before, strict=True))


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
    nifti.header.set_sform(np.diag([1.2, 1.1, 1.3, 1]), code=4)
    moved = np.diag([1.0, 1, 1, 1])
    moved[:3, 3] = 30
    nifti.header.set_qform(moved, code=1)
    nib.save(nifti, tmp_path / "a.nii")
    assert np.array_equal(load_image(tmp_path / "a.nii").affine, nib.load(tmp_path / "a.nii").affine)


@pytest.mark.parametrize("suffix", [".mgz", ".mgh"])
def test_mgh_is_the_same_image_as_nifti(suffix, phantom, tmp_path):
    """Of FreeSurfer: big-endian, and placed by direction cosines and a centre."""
    rotation = Rotation.from_euler("xyz", (20, -15, 25), degrees=True).as_matrix()
    shape, affine = phantom.grid((3.0, 4.0, 5.0), rotation)
    volume, _, _ = phantom.on_grid(shape, affine)
    nifti = nib.Nifti1Image(volume, affine).as_reoriented([[1, -1], [2, -1], [0, 1]])
    nib.save(nib.MGHImage(nifti.get_fdata(dtype=np.float32), nifti.affine), tmp_path / f"scan{suffix}")
    image = LoadImageCheckedd("image")({"image": str(tmp_path / f"scan{suffix}")})["image"]
    assert image.dtype == torch.float32
    assert nib.aff2axcodes(image.affine) == nib.aff2axcodes(nifti.affine)
    np.testing.assert_allclose(image.affine, nifti.affine, atol=1e-3)
    np.testing.assert_array_equal(image[0], nifti.get_fdata(dtype=np.float32))


def test_nifti_pair_is_the_same_image(tmp_path, phantom):
    shape, affine = phantom.grid((3.0, 4.0, 5.0))
    volume, _, _ = phantom.on_grid(shape, affine)
    nib.save(nib.Nifti1Pair(volume, affine), tmp_path / "scan.hdr")
    for name in ("scan.hdr", "scan.img"):
        image = load_image(tmp_path / name)
        np.testing.assert_array_equal(image[0], volume)
        np.testing.assert_array_equal(image.affine, affine)
    (tmp_path / "scan.img").write_bytes((tmp_path / "scan.img").read_bytes()[:1000])
    with pytest.raises(ImageFileError, match="truncated"):
        load_image(tmp_path / "scan.hdr")
    (tmp_path / "scan.img").unlink()
    with pytest.raises(ImageFileError, match=r"scan\.img"):
        load_image(tmp_path / "scan.hdr")


def mgh_without_ras(folder):
    nib.save(nib.MGHImage(np.ones((4, 4, 4), np.float32), np.eye(4)), folder / "scan.mgh")
    content = bytearray((folder / "scan.mgh").read_bytes())
    content[28:30] = bytes(2)
    (folder / "scan.mgh").write_bytes(content)
    return folder / "scan.mgh"


def analyze(kind, folder):
    nib.save(kind(np.ones((4, 4, 4), np.float32), np.diag([2.0, 2, 2, 1])), folder / "scan.img")
    return folder / "scan.img"


UNPLACED = {
    "MGH": mgh_without_ras,
    "Analyze": lambda folder: analyze(nib.AnalyzeImage, folder),
    "SPM": lambda folder: analyze(nib.Spm99AnalyzeImage, folder),
}


@pytest.mark.parametrize("kind", UNPLACED)
def test_a_place_that_a_reader_would_invent_is_refused(kind, tmp_path):
    with pytest.raises(ImageGeometryError, match="left and right"):
        load_image(UNPLACED[kind](tmp_path))


def test_other_formats_of_nibabel_are_refused(tmp_path):
    nib.save(nib.gifti.GiftiImage(), tmp_path / "surface.gii")
    with pytest.raises(ImageFileError, match="GiftiImage, not NIfTI or MGH"):
        load_image(tmp_path / "surface.gii")


@pytest.mark.parametrize(("columns", "code"), [((1, 1, 1), 1), ((2, 2, 1.8), 2), ((1, 1, 1), 4)])
def test_sform_of_other_voxels_than_pixdim_is_refused(columns, code, tmp_path):
    nifti = nib.Nifti1Image(np.ones((4, 4, 4), np.float32), None)
    nifti.header.set_sform(np.diag([*columns, 1.0]), code=code)
    nifti.header["pixdim"][1:4] = 2
    nib.save(nifti, tmp_path / "a.nii")
    with pytest.raises(ImageGeometryError, match=r"in its sform, of 2 x 2 x 2 mm in its pixdim"):
        load_image(tmp_path / "a.nii")


def with_quaternion(path, length, sform=True):
    """A file turned by half a turn about an axis, whose quaternion is as long as it should not be."""
    affine = np.diag([-2.0, 2.0, -2.0, 1.0])
    nifti = nib.Nifti1Image(np.ones((4, 4, 4), np.float32), None)
    nifti.header.set_qform(affine, code=1)
    if sform:
        nifti.header.set_sform(affine, code=1)
    nib.save(nifti, path)
    content = bytearray(path.read_bytes())
    content[256:268] = np.array([0, length, 0], "<f4").tobytes()
    path.write_bytes(content)
    return affine


def test_a_quaternion_that_rounding_made_too_long_is_read(tmp_path):
    affine = with_quaternion(tmp_path / "a.nii", 1.0000006)
    np.testing.assert_allclose(load_image(tmp_path / "a.nii").affine, affine, atol=1e-6)
    with_quaternion(tmp_path / "a.nii", 1.4)
    with pytest.raises(ImageGeometryError, match=r"qform is no rotation .*set qform_code to 0"):
        load_image(tmp_path / "a.nii")


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
