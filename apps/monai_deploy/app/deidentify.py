"""Results that say nothing of the patient: their source's headers, with nothing in them but what results need."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pydicom

from common.images.dicom import Series

# where the voxels are, and which images they are of; UIDs are kept, so that results and images find each other
NEEDED = (
    *("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"),
    *("PositionReferenceIndicator", "Modality", "InstanceNumber", "ImageType", "NumberOfFrames"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "SpacingBetweenSlices"),
    *("Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit"),
    *("PixelRepresentation", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
)
OF_FRAMES = ("PixelMeasuresSequence", "PlaneOrientationSequence", "PlanePositionSequence")
METHOD = "patient and study attributes left out, UIDs kept"


@contextmanager
def deidentified(series: Series) -> Iterator[Series]:
    """The series as headers that name nobody, for as long as the block runs; what it was read from stays as it is.

    As the Basic Profile with the Retain UIDs Option of DICOM PS3.15 Annex E wants it of the attributes that results
    take over: those of the modules Patient, General Study, Patient Study and of clinical trials are empty or left out.
    """
    with TemporaryDirectory() as folder:
        files = tuple(Path(folder) / f"{number}.dcm" for number in range(len(series.files)))
        for source, path in zip(series.files, files, strict=True):
            _header(pydicom.dcmread(source, stop_before_pixels=True)).save_as(path, enforce_file_format=True)
        yield dataclasses.replace(series, files=files)


def _header(source: pydicom.Dataset) -> pydicom.Dataset:
    header = _only(source, NEEDED)
    header.file_meta = source.file_meta
    for name in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        if name in header:
            setattr(header, name, [_only(item, OF_FRAMES) for item in header[name].value])
    header.PatientIdentityRemoved, header.DeidentificationMethod = "YES", METHOD
    return header


def _only(source: pydicom.Dataset, keywords: tuple[str, ...]) -> pydicom.Dataset:
    kept = pydicom.Dataset()
    for keyword in keywords:
        if keyword in source:
            kept[keyword] = source[keyword]
    return kept
