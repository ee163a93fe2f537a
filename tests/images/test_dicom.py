"""A series of any plane comes in where it lies in the patient; what is not one whole volume is refused."""

from __future__ import annotations

import os
import threading
import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813 - everyone's name for it
from monai.transforms import Orientation
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, JPEGLSLossless, RLELossless, generate_uid

from common.errors import DicomError
from common.images.dicom import choose_series, find_series, read_series, without_warnings

PLANES = ["axial", "sagittal", "coronal", "oblique"]


def read(folder, series=None):
    return read_series(choose_series(folder, series))


def assert_same_place(image, phantom, tolerance):
    """The phantom, which no mirror or swap of axes fits, on the grid that the affine says is the image."""
    expected, _, _ = phantom.on_grid(tuple(image.shape[1:]), image.affine.numpy())
    different = np.abs(image[0].numpy() - expected) > tolerance
    assert different.sum() <= 2  # voxels that rounded positions take over the edge of the brain
    assert expected.any()


@pytest.mark.parametrize("is_reversed", [False, True], ids=["forward", "reversed"])
@pytest.mark.parametrize("plane", PLANES)
def test_volume_lies_where_the_tags_say(plane, is_reversed, write_series, phantom, tmp_path):
    written = write_series(tmp_path, plane, is_reversed)
    image = read(tmp_path)
    assert image.shape == (1, *written.image.shape)
    assert image.dtype.is_floating_point
    assert image.meta["filename_or_obj"] == str(tmp_path)
    assert_same_place(image, phantom, tolerance=0.26)  # half a step of the stored integers, whose slope is 0.5
    # the grid is that of the file, maybe from the last slice to the first
    flip = np.eye(4)
    if image.affine[:3, 2].numpy() @ written.affine[:3, 2] < 0:
        flip[2, 2], flip[2, 3] = -1, image.shape[3] - 1
    np.testing.assert_allclose(image.affine.numpy() @ flip, written.affine, atol=1e-5)


def test_each_slice_is_rescaled_by_its_own_tags(write_series, phantom, tmp_path):
    write_series(tmp_path, slope=lambda k: 1.0 if k < 18 else 0.25, intercept=lambda k: -float(k), modality="CT")
    assert_same_place(read(tmp_path), phantom, tolerance=0.51)
    assert np.abs(read(tmp_path)[..., 20:] % 1 - 0.5).min() < 0.3  # not rounded to the integers of the first slice


def test_tilted_gantry_gives_a_sheared_affine(write_series, tmp_path):
    written = write_series(tmp_path)

    def tilt(dataset, k):
        dataset.ImagePositionPatient[1] += 0.5 * k

    written.edit(tilt)
    np.testing.assert_allclose(read(tmp_path).affine[:3, 2], (0, -0.5, 4), atol=1e-6)


def encode(dataset, how, folder):
    """Compress with pydicom, or with GDCM what it cannot."""
    if isinstance(how, UID):
        dataset.compress(how)
        return
    writer = sitk.ImageFileWriter()
    writer.UseCompressionOn()
    writer.SetCompressor(how)
    writer.SetFileName(str(folder / "gdcm.dcm"))
    writer.Execute(sitk.GetImageFromArray(dataset.pixel_array[None]))
    encoded = pydicom.dcmread(folder / "gdcm.dcm")
    assert encoded.file_meta.TransferSyntaxUID.is_compressed
    dataset["PixelData"] = encoded["PixelData"]
    for keyword in ("BitsStored", "HighBit", "PixelRepresentation"):
        setattr(dataset, keyword, encoded[keyword].value)
    dataset.file_meta.TransferSyntaxUID = encoded.file_meta.TransferSyntaxUID


@pytest.mark.parametrize("how", [RLELossless, JPEGLSLossless, "JPEG", "JPEG2000"], ids=["RLE", "LS", "JPEG", "2000"])
def test_compressed_pixels_are_read(how, write_series, tmp_path):
    plain, packed = write_series(tmp_path / "plain"), write_series(tmp_path / "packed")
    packed.edit(lambda dataset, k: encode(dataset, how, tmp_path))
    np.testing.assert_array_equal(read(packed.folder), read(plain.folder))


def test_series_are_found_among_other_files(write_series, tmp_path):
    write_series(tmp_path / "b" / "deep", SeriesNumber=7, SeriesDescription="T2 tra")
    write_series(tmp_path / "a", SeriesNumber=3, is_reversed=True)
    (tmp_path / "README").write_text("no DICOM", encoding="utf-8")
    (tmp_path / "empty").touch()
    directory = Dataset()
    directory.file_meta = FileMetaDataset()
    directory.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.1.3.10"
    directory.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    directory.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    directory.FileSetID = "SET"
    directory.save_as(tmp_path / "DICOMDIR", enforce_file_format=True)
    first, second = find_series(tmp_path)
    assert (first.number, first.description, first.modality, len(first.files)) == (3, "t1 phantom", "MR", 36)
    assert (second.number, second.description) == (7, "T2 tra")
    assert first.files[0].name == "IM0036"  # sorted by position, not by name or number


def test_series_is_chosen_by_uid_or_description(write_series, tmp_path):
    write_series(tmp_path / "a")
    write_series(tmp_path / "b", SeriesNumber=7, SeriesDescription="T2 tra")
    write_series(tmp_path / "c", SeriesNumber=9, SeriesDescription="scout", ImageType=["ORIGINAL", "LOCALIZER"])
    chosen = choose_series(tmp_path, "t2 TRA")
    assert chosen.number == 7
    assert choose_series(tmp_path, chosen.uid) == chosen
    with pytest.raises(
        DicomError, match=r"2 series: .*'t1 phantom' MR 36 images.*'T2 tra'.*; give a folder with one series.*::series"
    ):
        choose_series(tmp_path)
    with pytest.raises(DicomError, match=r"no series is called 'FLAIR', there are: .*'T2 tra'"):
        choose_series(tmp_path, "FLAIR")
    with pytest.raises(DicomError, match="'scout' is a localizer"):
        choose_series(tmp_path, "scout")


def test_scout_beside_a_volume_is_passed_over(write_series, tmp_path):
    write_series(tmp_path / "a")
    write_series(tmp_path / "c", SeriesNumber=1, ImageType=["ORIGINAL", "LOCALIZER"])
    assert choose_series(tmp_path).number == 5


def put(keyword, value):
    return lambda dataset, k: setattr(dataset, keyword, value)


def without(keyword):
    return lambda dataset, k: delattr(dataset, keyword)


def shift(mm):
    def change(dataset, k):
        dataset.ImagePositionPatient[2] += mm

    return change


def echo(dataset, k):
    """Two echoes of every second position."""
    dataset.EchoTime = k % 2
    dataset.ImagePositionPatient[2] -= 4.0 * (k % 2)


def cut(series, index, size):
    path = series.files[index]
    path.rename(path.with_name("PLANTED^NAME"))
    content = path.with_name("PLANTED^NAME").read_bytes()
    path.with_name("PLANTED^NAME").write_bytes(content[:size])


def drop(series, *slices):
    for k in slices:
        series.files[k].unlink()


def copy(series):
    (series.folder / "copy").write_bytes(series.files[3].read_bytes())


def undecodable(dataset, k):
    dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.100"  # MPEG2, which is not for volumes
    dataset.PixelData = pydicom.encaps.encapsulate([dataset.PixelData])
    dataset["PixelData"].is_undefined_length = True


def in_turn(keyword, first, second):
    """Two volumes at places in turn, each of which has an image of one of them alone."""
    return lambda s: s.edit(lambda dataset, k: setattr(dataset, keyword, second if k % 2 else first))


def leave(series, content):
    """Six images of which this is left; the first and last slices, without which there is a smaller volume."""
    for path in (*series.files[:3], *series.files[-3:]):
        path.write_bytes(content)


def lost_link(series):
    series.files[-1].rename(series.folder.parent / "elsewhere")
    series.files[-1].symlink_to(series.folder / "not fetched")


IN_TURN = {
    "EchoTime": (5, 15),
    "ImageType": (["ORIGINAL", "PRIMARY", "M"], ["ORIGINAL", "PRIMARY", "P"]),
    "TemporalPositionIdentifier": (1, 2),
    "DiffusionBValue": (0.0, 1000.0),
    "InversionTime": (400, 900),
    "SequenceName": ("*ep_b0", "*ep_b1000#1"),
}
BAD = {  # what is done to a series, and what is said
    "structure set": (lambda s: s.edit(put("Modality", "RTSTRUCT")), "RTSTRUCT objects, not MR or CT"),
    "scout": (lambda s: s.edit(put("ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER"])), "is a localizer"),
    "mosaic": (lambda s: s.edit(put("ImageType", ["ORIGINAL", "PRIMARY", "M", "MOSAIC"])), "is a mosaic"),
    "single image": (lambda s: drop(s, *range(1, 36)), "is a single image"),
    "no position": (lambda s: s.edit(without("ImagePositionPatient"), [4]), "image 5: no valid ImagePositionPatient"),
    "no orientation": (lambda s: s.edit(without("ImageOrientationPatient")), "no valid ImageOrientationPatient"),
    "no pixel spacing": (lambda s: s.edit(without("PixelSpacing")), "no valid PixelSpacing"),
    "degenerate orientation": (lambda s: s.edit(put("ImageOrientationPatient", [1, 0, 0, 1, 0, 0])), "two directions"),
    "colour": (lambda s: s.edit(put("PhotometricInterpretation", "RGB")), "RGB pixels"),
    "other spacing": (lambda s: s.edit(put("PixelSpacing", [3, 2.1]), [7]), "images 1 and 8 differ in PixelSpacing"),
    "other size": (lambda s: s.edit(put("Rows", 49), [7]), "images 1 and 8 differ in Rows"),
    "other frame": (
        lambda s: s.edit(put("FrameOfReferenceUID", "1.2.3"), [7]),
        "images 1 and 8 differ in FrameOfReferenceUID",
    ),
    "other plane": (
        lambda s: s.edit(put("ImageOrientationPatient", [1, 0, 0, 0, 0, -1]), range(18, 36)),
        "differ in ImageOrientationPatient",
    ),
    "two echoes": (lambda s: s.edit(echo), "images 1 and 2 of 36 are both at -63.0 mm and differ in EchoTime"),
    "copied image": (copy, "images 4 and 4 of 37 are both at -51.0 mm, copies of one image"),
    "missing slice": (lambda s: drop(s, 10), "1 slice(s) missing at -23.0 mm, between images 10 and 12"),
    "missing slices": (
        lambda s: drop(s, 10, 11, 20),
        "3 slice(s) missing at -23.0, -19.0, 17.0 mm, between images 10 and 13, 20 and 22",
    ),
    "uneven slices": (lambda s: s.edit(shift(1.0), [9]), "image 10 is 1.00 mm off its place"),
    "truncated": (lambda s: cut(s, 5, -100), "image 6 cannot be decoded (Explicit VR Little Endian), it is truncated"),
    "truncated header": (lambda s: cut(s, 5, 500), "DICOM file 36 of 36, sorted by name, is damaged"),
    "magic alone": (lambda s: cut(s, 5, 132), "DICOM file 36 of 36, sorted by name, is damaged"),
    "empty files": (lambda s: leave(s, b""), "6 file(s) beside its images are empty or damaged (1, 2, 3, 34, 35, ..."),
    "files cut short": (lambda s: leave(s, bytes(100)), "6 file(s) beside its images are empty or damaged"),
    "zero-filled files": (lambda s: leave(s, bytes(9000)), "6 file(s) beside its images are empty or damaged"),
    "link to nothing": (lost_link, "file 36 of 36, sorted by name, cannot be read (No such file or directory)"),
    **{f"{k} in turn": (in_turn(k, *two), f"images 1 and 2 differ in {k}") for k, two in IN_TURN.items()},
    "undecodable": (lambda s: s.edit(undecodable), "cannot be decoded (MPEG2 Main Profile / Main Level)"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_volume_is_refused(kind, write_series, tmp_path):
    spoil, fact = BAD[kind]
    spoil(write_series(tmp_path))
    with pytest.raises(DicomError) as caught:
        read(tmp_path)
    assert fact in caught.value.fact
    assert caught.value.source == str(tmp_path)
    assert caught.value.remedy
    assert "\n" not in str(caught.value)
    assert not [word for word in ("PLANTED", "19010203") if word in str(caught.value)]


def test_what_is_clearly_no_image_is_passed_over(write_series, tmp_path):
    written = write_series(tmp_path)
    others = {
        "README": b"text",
        "notes.txt": b"",
        "IM0001.jpg": b"\xff\xd8\x00",
        ".DS_Store": b"\0\0",
        "Thumbs.db": b"\0",
    }
    for name, content in others.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "program").mkdir()
    (tmp_path / "program" / "viewer").write_bytes(b"\x7fELF\0\0")  # in a folder without images
    assert read(tmp_path).shape == (1, *written.image.shape)


def test_values_that_are_rounded_differently_are_one_volume(write_series, tmp_path):
    write_series(tmp_path).edit(lambda dataset, k: setattr(dataset, "EchoTime", 4.6 + 1e-6 * k))
    assert read(tmp_path).shape[-1] == 36


@pytest.mark.parametrize("columns", [72, 71])
def test_overlay_in_unused_bits_is_no_tissue(columns, write_series, tmp_path):
    """Of 50 x 71 pixels, not a multiple of 8, which GDCM does not read."""
    plain, drawn = write_series(tmp_path / "plain"), write_series(tmp_path / "drawn")

    def crop(dataset, k):
        dataset.PixelData = np.ascontiguousarray(dataset.pixel_array[:, :columns]).tobytes()
        dataset.Columns = columns

    def draw(dataset, k):
        crop(dataset, k)
        dataset.PixelData = (np.frombuffer(dataset.PixelData, "<u2") | 0x1000 * (k > 5)).astype("<u2").tobytes()
        for element, vr, value in (
            *((0x10, "US", 50), (0x11, "US", columns), (0x40, "CS", "G")),
            *((0x50, "SS", [1, 1]), (0x100, "US", 16), (0x102, "US", 12)),
        ):
            dataset.add_new(0x60000000 + element, vr, value)

    plain.edit(crop)
    drawn.edit(draw)
    np.testing.assert_array_equal(read(drawn.folder), read(plain.folder))
    content = drawn.files[20].read_bytes()
    drawn.files[20].write_bytes(content[:-100])
    with pytest.raises(DicomError, match="image 21 cannot be decoded"):
        read(drawn.folder)


def test_folder_without_dicom_is_refused(tmp_path):
    (tmp_path / "README").write_text("no DICOM", encoding="utf-8")
    with pytest.raises(DicomError, match="no DICOM files in it"):
        find_series(tmp_path)
    with pytest.raises(DicomError, match="no such folder"):
        find_series(tmp_path / "none")


def test_headers_hold_nothing_of_the_patient(write_series, tmp_path):
    write_series(tmp_path)
    for series in find_series(tmp_path):
        assert "PLANTED" not in str(series)
        assert not [header for header in series.headers if "PLANTED" in str(header)]


@pytest.mark.skipif("UAD_TEST_DATA" not in os.environ, reason="UAD_TEST_DATA names a folder with dicom/t1_sagittal")
def test_real_sagittal_series():
    folder = Path(os.environ["UAD_TEST_DATA"]) / "dicom" / "t1_sagittal"
    image = read(folder)
    assert image.shape == (1, 256, 256, 35)
    # columns run to posterior and rows to inferior (0 1 0, 0 0 -1 in LPS), their normal and so the slices to the right
    expected = [[0, 0, 4.8, -81.6], [-1.015625, 0, 0, 130], [0, -1.015625, 0, 130], [0, 0, 0, 1]]
    np.testing.assert_allclose(image.affine, expected, atol=1e-3)
    ras = Orientation("RAS", labels=None)(image)
    assert ras.shape == (1, 35, 256, 256)
    stored = pydicom.dcmread(choose_series(folder).files[0])
    assert stored.ImagePositionPatient[0] > 81  # at the left, in LPS
    np.testing.assert_array_equal(ras[0, 0].numpy()[::-1, ::-1].T, stored.pixel_array)


def test_two_threads_leave_the_warnings_as_they_were():
    """The next case may be read while the present one is written; Python keeps one list of filters for all threads."""
    before, first_is_in, second_is_in, may_leave = list(warnings.filters), *(threading.Event() for _ in range(3))

    def first():
        with without_warnings():
            first_is_in.set()
            second_is_in.wait(0.2)  # it comes in where nothing keeps it out
        may_leave.set()

    def second():
        first_is_in.wait(30)
        with without_warnings():
            second_is_in.set()
            may_leave.wait(30)

    threads = [threading.Thread(target=do) for do in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert second_is_in.is_set()
    assert list(warnings.filters) == before
