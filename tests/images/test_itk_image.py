"""NRRD and MetaImage come in as the same image as NIfTI."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - everyone's name for it
from monai.transforms import LoadImage
from scipy.spatial.transform import Rotation

from common.errors import ImageFileError, ImageGeometryError, ImageIntensityError, ImageShapeError
from common.images.itk_image import ITK_SUFFIXES, read_itk, voxel_files


@pytest.mark.parametrize("rotation", [None, Rotation.from_euler("xyz", (20, -15, 25), degrees=True).as_matrix()])
@pytest.mark.parametrize("suffix", ITK_SUFFIXES)
def test_same_as_nifti(suffix, rotation, phantom, save_nifti, tmp_path):
    shape, affine = phantom.grid((3.0, 4.0, 5.0), rotation)
    volume, _, _ = phantom.on_grid(shape, affine)
    nifti = save_nifti(tmp_path / "scan.nii.gz", volume, affine)
    path = tmp_path / f"scan{suffix}"
    sitk.WriteImage(sitk.ReadImage(str(nifti)), str(path))
    expected = LoadImage("NibabelReader", image_only=True, ensure_channel_first=True)(nifti)
    image = read_itk(path)
    np.testing.assert_array_equal(image, expected)
    np.testing.assert_allclose(image.affine, expected.affine, atol=1e-4)
    assert image.dtype == expected.dtype
    assert image.affine.dtype == expected.affine.dtype
    assert image.meta["filename_or_obj"] == str(path)
    assert image.meta["space"] == expected.meta["space"]


BAD = {
    "4D": (ImageShapeError, "4 dimensions", lambda: sitk.Image([8, 8, 8, 2], sitk.sitkFloat32)),
    "2D": (ImageShapeError, "2 dimensions", lambda: sitk.Image([8, 8], sitk.sitkFloat32)),
    "vectors": (ImageShapeError, "3 channels", lambda: sitk.Image([8, 8, 8], sitk.sitkVectorFloat32, 3)),
}


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_volume_is_refused(kind, suffix, tmp_path):
    error, fact, make = BAD[kind]
    path = tmp_path / f"scan{suffix}"
    sitk.WriteImage(make(), str(path))
    with pytest.raises(error, match=fact):
        read_itk(path)


def test_complex_voxels_are_refused(tmp_path):
    path = tmp_path / "scan.nrrd"
    sitk.WriteImage(sitk.Image([8, 8, 8], sitk.sitkComplexFloat32), str(path))
    with pytest.raises(ImageIntensityError, match="complex"):
        read_itk(path)


def test_voxels_placed_nowhere_are_refused(tmp_path):
    """ITK would give them 1 mm and its own axes."""
    text = "ObjectType = Image\nNDims = 3\nDimSize = 4 4 4\n{}ElementType = MET_UCHAR\nElementDataFile = scan.raw\n"
    (tmp_path / "scan.raw").write_bytes(bytes(range(64)))
    place, size = "TransformMatrix = 1 0 0 0 1 0 0 0 1\n", "ElementSpacing = 2 2 2\n"
    for given, fact in (("", "transformmatrix"), (place, "elementspacing"), (size, "transformmatrix")):
        (tmp_path / "scan.mhd").write_text(text.format(given), encoding="utf-8")
        with pytest.raises(ImageGeometryError, match=fact):
            read_itk(tmp_path / "scan.mhd")
    (tmp_path / "scan.mhd").write_text(text.format(place + size), encoding="utf-8")
    assert read_itk(tmp_path / "scan.mhd").shape == (1, 4, 4, 4)


@pytest.mark.parametrize(
    ("name", "text", "names"),
    [
        ("a.mhd", "NDims = 3\nElementDataFile = a.raw\n", ["a.raw"]),
        ("a.mha", "NDims = 3\nElementDataFile = LOCAL\nElementDataFile = b\n", []),
        ("a.mhd", "ElementDataFile = LIST\ns1.raw\ns2.raw\n", ["s1.raw", "s2.raw"]),
        ("a.mhd", "ElementDataFile = s%02d.raw 1 5 2\n", ["s01.raw", "s03.raw", "s05.raw"]),
        ("a.nhdr", "NRRD0004\ndimension: 3\ndata file: sub/a.raw\nkey:=a: b\n", ["sub/a.raw"]),
        ("a.nhdr", "NRRD0004\ndata file: LIST 2\ns1.raw\ns2.raw\n", ["s1.raw", "s2.raw"]),
        ("a.nrrd", "NRRD0004\ndimension: 3\n\ndata file: a.raw\n", []),
        ("a.nii.gz", "", []),
    ],
)
def test_where_the_voxels_are(name, text, names, tmp_path):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert voxel_files(tmp_path / name) == [tmp_path / file for file in names]


@pytest.mark.parametrize("suffix", ITK_SUFFIXES)
def test_what_is_no_file_of_its_kind_is_refused(suffix, save_nifti, tmp_path):
    path = tmp_path / f"scan{suffix}"
    with pytest.raises(ImageFileError, match="no such file"):
        read_itk(path)
    for content in (b"", b"subject,age\n", save_nifti(tmp_path / "scan.nii", np.ones((8, 8, 8))).read_bytes()):
        path.write_bytes(content)
        with pytest.raises(ImageFileError, match="not a whole") as caught:
            read_itk(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ITK_SUFFIXES)
def test_truncated_voxels_are_refused(suffix, phantom, tmp_path):
    volume, _, _ = phantom.on_grid(*phantom.grid((4.0, 4.0, 4.0)))
    path = tmp_path / f"scan{suffix}"
    sitk.WriteImage(sitk.GetImageFromArray(volume), str(path))
    largest = max(tmp_path.iterdir(), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-2000])
    with pytest.raises(ImageFileError, match="not a whole"):
        read_itk(path)


def test_huge_header_is_refused_before_memory_is_taken(tmp_path):
    path = tmp_path / "scan.mha"
    sitk.WriteImage(sitk.Image([8, 8, 8], sitk.sitkFloat32), str(path))
    path.write_bytes(path.read_bytes().replace(b"DimSize = 8 8 8", b"DimSize = 9000 9000 9000"))
    with pytest.raises(ImageShapeError, match="729000000000 voxels"):
        read_itk(path)


def test_unnamed_space_is_refused(tmp_path):
    path = tmp_path / "scan.nrrd"
    header = "NRRD0004\ntype: float\ndimension: 3\nsizes: 4 4 4\nendian: little\nencoding: raw\nspacings: 1 1 1\n\n"
    path.write_bytes(header.encode() + np.ones(64, "<f4").tobytes())
    with pytest.raises(ImageGeometryError, match="left and right are unknown"):
        read_itk(path)


@pytest.mark.parametrize("space", ["scanner-xyz", "3D-right-handed"])
def test_space_that_is_not_the_patients_is_refused(space, tmp_path):
    path = tmp_path / "scan.nrrd"
    header = "NRRD0004\ntype: float\ndimension: 3\nsizes: 4 4 4\nendian: little\nencoding: raw\n"
    header += f"space: {space}\nspace directions: (2,0,0) (0,3,0) (0,0,4)\nspace origin: (5,6,7)\n\n"
    path.write_bytes(header.encode() + np.ones(64, "<f4").tobytes())
    with pytest.raises(ImageGeometryError, match=space):
        read_itk(path)


def test_ras_nrrd_is_placed_as_it_says(tmp_path):
    path = tmp_path / "scan.nrrd"
    header = "NRRD0004\ntype: float\ndimension: 3\nsizes: 4 4 4\nendian: little\nencoding: raw\n"
    header += "space: right-anterior-superior\nspace directions: (2,0,0) (0,3,0) (0,0,4)\nspace origin: (5,6,7)\n\n"
    path.write_bytes(header.encode() + np.arange(64, dtype="<f4").tobytes())
    image = read_itk(path)
    np.testing.assert_allclose(image.affine, [[2, 0, 0, 5], [0, 3, 0, 6], [0, 0, 4, 7], [0, 0, 0, 1]])
    np.testing.assert_array_equal(image[0, :, 0, 0], [0, 1, 2, 3])
