"""Enhanced DICOM is read like the classic images that it holds, however its functional groups are arranged."""

from __future__ import annotations

from copy import deepcopy

import highdicom
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from common.errors import DicomError
from common.images.dicom import choose_series, read_series


def enhance(files, path, change=None, series=None):
    """Write classic images as one enhanced file, after a change."""
    sources = [pydicom.dcmread(file) for file in files]
    enhanced = highdicom.legacy.LegacyConvertedEnhancedMRImage(
        sources, series or generate_uid(), 1, generate_uid(), 1, strict=False
    )
    if change:
        change(enhanced)
    path.parent.mkdir(exist_ok=True)
    enhanced.save_as(path)
    return path.parent


def read(folder):
    return read_series(choose_series(folder))


def assert_same_place(image, phantom):
    expected, _, _ = phantom.on_grid(tuple(image.shape[1:]), image.affine.numpy())
    assert (np.abs(image[0].numpy() - expected) > 0.26).sum() <= 2  # at the edge of the brain
    assert expected.any()


def measures_per_frame(enhanced):
    shared = enhanced.SharedFunctionalGroupsSequence[0]
    for keyword in ("PixelMeasuresSequence", "PlaneOrientationSequence"):
        for frame in enhanced.PerFrameFunctionalGroupsSequence:
            setattr(frame, keyword, deepcopy(shared[keyword].value))
        del shared[keyword]


@pytest.mark.parametrize("change", [None, measures_per_frame], ids=["shared", "per frame"])
def test_multiframe_is_read(change, write_series, phantom, tmp_path):
    written = write_series(tmp_path / "single", "oblique", is_reversed=True)
    image = read(enhance(written.files, tmp_path / "multi" / "IM1", change))
    assert image.shape == (1, *written.image.shape)
    assert_same_place(image, phantom)


def test_a_file_a_frame_is_read(write_series, phantom, tmp_path):
    written, uid = write_series(tmp_path / "single", "oblique"), generate_uid()
    for number, file in enumerate(written.files):
        enhance([file], tmp_path / "frames" / f"IM{number}", series=uid)
    image = read(tmp_path / "frames")
    assert image.shape == (1, *written.image.shape)
    assert_same_place(image, phantom)


def echoes(enhanced):
    for number, frame in enumerate(enhanced.PerFrameFunctionalGroupsSequence):
        echo = Dataset()
        echo.EffectiveEchoTime = 5.0 + 10 * (number % 2)
        frame.MREchoSequence = [echo]


def gap(enhanced):
    for frame in enhanced.PerFrameFunctionalGroupsSequence[20:]:
        frame.PlanePositionSequence[0].ImagePositionPatient[2] -= 8  # the frames go down


def no_groups(enhanced):
    del enhanced.SharedFunctionalGroupsSequence, enhanced.PerFrameFunctionalGroupsSequence


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        (echoes, "images 36 and 35 differ in EffectiveEchoTime"),
        (gap, "2 slice(s) missing"),
        (no_groups, "36 frames without a place"),
    ],
)
def test_frames_that_are_not_one_volume_are_refused(change, fact, write_series, tmp_path):
    folder = enhance(write_series(tmp_path / "single").files, tmp_path / "multi" / "IM1", change)
    with pytest.raises(DicomError, match="dcm2niix") as caught:
        read(folder)
    assert fact in caught.value.fact
    assert "\n" not in str(caught.value)


def test_several_multiframe_files_are_refused(write_series, tmp_path):
    files, uid = write_series(tmp_path / "single").files, generate_uid()
    enhance(files[:18], tmp_path / "multi" / "IM1", series=uid)
    enhance(files[18:], tmp_path / "multi" / "IM2", series=uid)
    with pytest.raises(DicomError, match="is 2 multi-frame images; convert it"):
        read(tmp_path / "multi")


def test_value_of_another_type_is_as_if_it_were_not_there(write_series, tmp_path):
    """As a damaged file has it: a number where DICOM says words, or words where it says numbers."""

    def garble(dataset, k):
        del dataset.ImageType
        dataset.add_new("ImageType", "US", 0)

    series = write_series(tmp_path)
    series.edit(garble)
    assert read(tmp_path).shape == (1, *series.image.shape)
    series.edit(lambda dataset, k: dataset.add_new("PixelSpacing", "LO", "wide"), [3])
    with pytest.raises(DicomError, match="image 4: no valid PixelSpacing"):
        read(tmp_path)
