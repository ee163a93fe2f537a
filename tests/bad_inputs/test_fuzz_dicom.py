"""Whatever the tags of a DICOM series say, and however a file is damaged: a volume, or one line that says why not."""

from __future__ import annotations

import hashlib
import struct
import warnings
from copy import deepcopy
from io import BytesIO

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataset import FileMetaDataset
from pydicom.filewriter import write_file_meta_info
from pydicom.uid import EnhancedMRImageStorage, ExplicitVRLittleEndian, MRImageStorage

from common.errors import UADError
from common.transforms.load import load_image

SLICES, ROWS, COLUMNS = 3, 6, 5
TAGS = [
    *("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "SeriesDescription", "SeriesNumber", "InstanceNumber"),
    *("Modality", "ImageType", "FrameOfReferenceUID", "SpecificCharacterSet", "NumberOfFrames", "AcquisitionNumber"),
    *("ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing", "Rows", "Columns", "EchoTime", "FrameType"),
    *("PhotometricInterpretation", "SamplesPerPixel", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
    *("RescaleSlope", "RescaleIntercept", "DiffusionBValue", "TemporalPositionIdentifier", "PixelData"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "PlanePositionSequence"),
    *("PlaneOrientationSequence", "PixelMeasuresSequence", "OverlayRows", "OverlayBitPosition", "ConvolutionKernel"),
]
NUMBERS = [0, 1, -1, 2, 3, 12, 16, 1e-9, 1e9, 65535, 2**31, 1e40, float("nan"), float("inf")]
VALUES = st.one_of(
    st.none(),  # not there
    st.sampled_from([b"", b" ", b"\\", b"1\\0\\0\\0\\1\\0", b"MR", b"CT", b"RGB", b"M\\P", b"\x1b$B", b"1.2.3", b"-"]),
    st.lists(st.sampled_from(NUMBERS) | st.floats(width=16), min_size=1, max_size=6).map(
        lambda values: "\\".join(f"{value:g}" for value in values).encode()
    ),
    st.integers(0, 65535).map(lambda value: value.to_bytes(2, "little")),
    st.sampled_from(NUMBERS).map(lambda value: np.float64(value).tobytes()),
    st.binary(max_size=40),
)
TYPES = st.none() | st.sampled_from(["US", "DS", "IS", "FD", "LO", "UI", "CS", "SQ", "UN", "OB", "XX"])
WHICH = st.sampled_from([range(SLICES), range(1), range(1, 3), range(SLICES - 1, SLICES)])
CHANGES = st.lists(st.tuples(st.sampled_from(TAGS), VALUES, TYPES, WHICH), max_size=3)
DAMAGES = st.lists(
    st.tuples(
        st.integers(0, SLICES - 1),
        st.sampled_from(["cut", "flip", "insert", "empty"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(1, 255),
    ),
    max_size=1,
)


def make_image(number):
    """The elements of an image, bytes by keyword, those of a sequence in a list; as they stand in the file."""
    return {
        "SOPClassUID": MRImageStorage.encode(),
        "SOPInstanceUID": f"1.2.3.{number}".encode(),
        "SeriesInstanceUID": b"1.2.4",
        "StudyInstanceUID": b"1.2.6",
        "FrameOfReferenceUID": b"1.2.5",
        "SeriesDescription": b"t1",
        "Modality": b"MR",
        "InstanceNumber": str(number + 1).encode(),
        "ImageType": b"ORIGINAL\\PRIMARY\\M",
        "EchoTime": b"5",
        "ImagePositionPatient": f"0\\0\\{4 * number}".encode(),
        "ImageOrientationPatient": b"1\\0\\0\\0\\1\\0",
        "PixelSpacing": b"2\\3",
        "PhotometricInterpretation": b"MONOCHROME2",
        "RescaleSlope": b"1",
        "RescaleIntercept": b"0",
        "PixelData": np.arange(ROWS * COLUMNS, dtype="<u2").tobytes(),
    } | {
        keyword: value.to_bytes(2, "little")
        for keyword, value in {
            **{"Rows": ROWS, "Columns": COLUMNS, "SamplesPerPixel": 1, "PixelRepresentation": 0},
            **{"BitsAllocated": 16, "BitsStored": 12, "HighBit": 11},
        }.items()
    }


def make_enhanced():
    image = make_image(0)
    shared = {
        "PlaneOrientationSequence": [{"ImageOrientationPatient": image.pop("ImageOrientationPatient")}],
        "PixelMeasuresSequence": [{"PixelSpacing": image.pop("PixelSpacing")}],
        "PixelValueTransformationSequence": [
            {keyword: image.pop(keyword) for keyword in ("RescaleIntercept", "RescaleSlope")}
        ],
    }
    frames = [
        {
            "MREchoSequence": [{"EffectiveEchoTime": np.float64(5).tobytes()}],
            "PlanePositionSequence": [{"ImagePositionPatient": f"0\\0\\{4 * number}".encode()}],
        }
        for number in range(SLICES)
    ]
    return image | {
        "SOPClassUID": EnhancedMRImageStorage.encode(),
        "NumberOfFrames": str(SLICES).encode(),
        "SharedFunctionalGroupsSequence": [shared],
        "PerFrameFunctionalGroupsSequence": frames,
        "PixelData": image["PixelData"] * SLICES,
    }


SERIES = {"classic": [make_image(number) for number in range(SLICES)], "enhanced": [make_enhanced()]}
OVERLAY = {"OverlayRows": (0x60000010, "US"), "OverlayBitPosition": (0x60000102, "US")}
LONG = ("OB", "OW", "SQ", "UN")  # types with four bytes for their length


def change(images, keyword, value, vr, which):
    """Put a value, of another type where `vr` is given, in the place of those of a keyword, or into the image."""
    places = [inner for image in images for inner in walk(image) if keyword in inner]
    for place in [places[index] for index in which if index < len(places)] or images[:1]:
        place.pop(keyword, None)
        if value is not None:
            place[keyword] = value if vr is None else (vr, value)


def walk(image):
    yield image
    for value in list(image.values()):
        for item in value if isinstance(value, list) else ():
            yield from walk(item)


def encode(image):
    """Elements in explicit little endian, in the order of their tags."""
    elements = []
    for keyword, value in image.items():
        tag, vr = OVERLAY.get(keyword) or (tag_for_keyword(keyword), dictionary_VR(keyword)[:2])
        vr, value = value if isinstance(value, tuple) else (vr, value)
        if isinstance(value, list):
            items = [encode(item) for item in value]
            value = b"".join(struct.pack("<HHI", 0xFFFE, 0xE000, len(item)) + item for item in items)
        value += b" " * (len(value) % 2)
        length = struct.pack("<HI", 0, len(value)) if vr in LONG else struct.pack("<H", len(value))
        elements.append((tag, struct.pack("<HH", tag >> 16, tag & 0xFFFF) + vr.encode() + length + value))
    return b"".join(element for _, element in sorted(elements))


def write_file(path, image, damages=()):
    meta, head = FileMetaDataset(), BytesIO()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = MRImageStorage, "1.2.3"
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    write_file_meta_info(head, meta)
    content = bytes(128) + b"DICM" + head.getvalue() + encode(image)
    for how in damages:
        content = damage(content, *how)
    path.write_bytes(content)


def damage(content, how, place, byte):
    index = int(place * len(content))
    if how == "flip":
        return content[:index] + bytes([content[index] ^ byte]) + content[index + 1 :]
    return {"cut": content[:index], "insert": content[:index] + bytes([byte]) + content[index:], "empty": b""}[how]


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("PLANTED series")


@pytest.mark.parametrize("kind", SERIES)
def test_untouched_series_is_read(kind, tmp_path):
    for index, image in enumerate(SERIES[kind]):
        write_file(tmp_path / f"IM{index}", image)
    volume = load_image(tmp_path)
    assert volume.shape == (1, COLUMNS, ROWS, SLICES)
    assert volume.numpy()[0, :, :, 2].T.tolist() == np.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS).tolist()


@pytest.mark.parametrize("kind", SERIES)
@settings(  # no example is made simpler, which takes minutes
    max_examples=500,
    phases=[Phase.explicit, Phase.generate],
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(changes=CHANGES, damages=DAMAGES)
def test_only_typed_errors(kind, changes, damages, folder):
    images = deepcopy(SERIES[kind])
    for one in changes:
        change(images, *one)
    for index, image in enumerate(images):
        write_file(folder / f"IM{index}", image, [how for number, *how in damages if number % len(images) == index])
    for path in sorted(folder.iterdir())[len(images) :]:
        path.unlink()  # of the other kind of series
    before = digests(folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of pydicom, on stderr, which would quote the tags
            volume = load_image(folder)
    except UADError as error:
        assert str(error).startswith(f"{folder}: ") and str(error).endswith(f"; {error.remedy}")
        assert len(str(error).splitlines()) == 1
    else:
        assert volume.ndim == 4 and min(volume.shape) >= 1
        assert volume.affine.shape == (4, 4) and np.isfinite(volume.affine.numpy()).all()
    assert digests(folder) == before
