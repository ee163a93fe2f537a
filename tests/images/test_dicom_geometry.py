"""Headers that are one volume, and those that are not; no pixels are needed to tell."""

from __future__ import annotations

import numpy as np
import pytest
from pydicom.dataset import Dataset

from common.errors import DicomError
from common.images.dicom_geometry import (
    check_contrast,
    check_same,
    check_slices,
    check_spacing,
    check_tags,
    check_twice,
    find_numbers,
    instance,
    integer,
    is_same,
    lps_affine,
    place,
)


def header(k, **tags):
    """The header of an axial slice, 2.5 mm above the one before it."""
    dataset = Dataset()
    values = {
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "ImagePositionPatient": [-90.0, -120.0, 10 + 2.5 * k],
        "PixelSpacing": [1.5, 0.5],
        "Rows": 20,
        "Columns": 30,
        "InstanceNumber": k + 1,
        "SOPInstanceUID": f"1.2.{k + 1}",
        "EchoTime": 3.5,
    }
    for keyword, value in (values | tags).items():
        setattr(dataset, keyword, value)
    return dataset


def headers(count=5):
    return [header(k) for k in range(count)]


def test_one_volume_passes():
    check_slices("folder", "series", headers())


def test_affine_maps_column_row_and_slice():
    affine = lps_affine(headers())
    assert affine @ [0, 0, 0, 1] == pytest.approx([-90, -120, 10, 1])
    assert affine @ [2, 3, 4, 1] == pytest.approx([-90 + 2 * 0.5, -120 + 3 * 1.5, 10 + 4 * 2.5, 1])


def test_affine_of_a_tilted_gantry_is_sheared():
    tilted = [header(k, ImagePositionPatient=[-90.0, -120.0 + k, 10 + 2.5 * k]) for k in range(5)]
    check_spacing("folder", "series", tilted)
    assert lps_affine(tilted)[:3, 2] == pytest.approx([0, 1, 2.5])


@pytest.mark.parametrize(
    ("value", "expected"),
    [([1.5, 0.5], [1.5, 0.5]), ([1.5], None), (None, None), (["a", "b"], None), ([np.nan, 1], None)],
)
def test_numbers_of_a_tag(value, expected):
    found = find_numbers({"PixelSpacing": value}, "PixelSpacing")
    assert found is None if expected is None else found.tolist() == expected


def test_place_is_along_the_normal():
    sagittal = header(0, ImageOrientationPatient=[0, 1, 0, 0, 0, -1], ImagePositionPatient=[7.0, 1.0, 2.0])
    assert [place(header(2)), place(sagittal)] == [15, -7]
    assert place({}) is None


def test_image_without_number_has_a_name():
    assert [instance(header(4)), instance({}), instance({"InstanceNumber": "x"})] == ["5", *["without number"] * 2]
    assert integer({"InstanceNumber": None}, "InstanceNumber") is None


def test_values_are_the_same_to_a_thousandth():
    assert is_same([1, 2.0001], [1, 2])
    assert not is_same([1, 2.1], [1, 2])
    assert not is_same([1, 2], [1, 2, 3])
    assert not is_same("a", "b")
    assert not is_same(None, 1)


@pytest.mark.parametrize(
    ("check", "tags", "fact"),
    [
        (check_slices, {1: {"ImagePositionPatient": None}}, "image 2: no valid ImagePositionPatient"),
        (check_slices, {1: {"PhotometricInterpretation": "RGB"}}, "RGB pixels"),
        (check_slices, {0: {"Rows": 0}}, "differ in Rows"),
        (check_slices, {k: {"Rows": 65535, "Columns": 65535} for k in range(5)}, "no scan has that"),
        (check_slices, {3: {"FrameOfReferenceUID": "1.2.3"}}, "images 1 and 4 differ in FrameOfReferenceUID"),
        (check_twice, {2: {"ImagePositionPatient": [-90, -120, 12.5], "EchoTime": 9}}, "both at 12.5 mm and differ in"),
        (check_twice, {2: {"ImagePositionPatient": [-90, -120, 12.5], "SOPInstanceUID": "1.2.2"}}, "copies of one"),
        (check_contrast, {1: {"EchoTime": 9}, 3: {"EchoTime": 9}}, "images 1 and 2 differ in EchoTime"),
        (check_spacing, {4: {"ImagePositionPatient": [-90, -120, 22.5]}}, r"1 slice\(s\) missing at 20.0 mm"),
        (check_spacing, {2: {"ImagePositionPatient": [-90, -119, 15]}}, "image 3 is 1.00 mm off its place"),
    ],
)
def test_what_is_not_one_volume_is_refused(check, tags, fact):
    series = [header(k, **tags.get(k, {})) for k in range(5)]
    with pytest.raises(DicomError, match=f"series.*{fact}"):
        check("folder", "series", series)


def test_single_image_is_no_volume():
    with pytest.raises(DicomError, match="a single image"):
        check_slices("folder", "series", headers(1))


def test_directions_must_be_at_right_angles():
    with pytest.raises(DicomError, match="not two directions"):
        check_tags("folder", "series", header(0, ImageOrientationPatient=[1, 0, 0, 0.1, 1, 0]))


def test_rounding_of_a_tag_is_no_other_plane():
    check_same("folder", "series", header(0), header(1, PixelSpacing=[1.5004, 0.5]))
    with pytest.raises(DicomError, match="differ in PixelSpacing"):
        check_same("folder", "series", header(0), header(1, PixelSpacing=[1.6, 0.5]))
