"""A DICOM series in a zip archive is read as from its folder; what an archive may do to a disk is refused."""

from __future__ import annotations

import gc
import re
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from common.cohorts.cases import find_cases
from common.errors import DicomError
from common.images import dicom_zip
from common.images.dicom import choose_series
from common.images.dicom_zip import Unpacked
from common.transforms.load import load_image
from common.workflows.inference import source_series


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """Where archives are unpacked."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def pack(path, files, place="study/series 1/{}"):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("study/", "")
        archive.writestr("study/README.txt", "exported")
        for file in files:
            archive.write(file, place.format(file.name))
    return path


@pytest.fixture
def series(write_series, tmp_path):
    return write_series(tmp_path / "in")


def test_archive_is_read_as_its_folder_is(series, temporary, tmp_path):
    path = pack(tmp_path / "Scan 1.ZIP", series.files)
    expected, found = load_image(series.folder), load_image(path)
    assert np.array_equal(found.numpy(), expected.numpy())
    assert np.array_equal(found.affine, expected.affine)
    assert found.meta["filename_or_obj"] == str(path)
    gc.collect()
    assert list(temporary.iterdir()) == []


def test_files_are_there_as_long_as_the_series_is(series, temporary, tmp_path):
    chosen = choose_series(pack(tmp_path / "scan.zip", series.files))
    gc.collect()
    assert all(path.is_file() and path.is_relative_to(temporary) for path in chosen.files)
    assert chosen.folder == tmp_path / "scan.zip"
    del chosen
    gc.collect()
    assert list(temporary.iterdir()) == []


def test_results_as_dicom_find_the_images_again(series, tmp_path):
    found = source_series(load_image(pack(tmp_path / "scan.zip", series.files)))
    assert [path.name for path in found.files] == [path.name for path in series.files]
    assert all(path.is_file() for path in found.files)


def test_series_of_a_study_is_chosen(write_series, series, tmp_path):
    other = write_series(tmp_path / "other", SeriesDescription="t2")
    with zipfile.ZipFile(tmp_path / "study.zip", "w") as archive:
        for folder in (series, other):
            for file in folder.files:
                archive.write(file, f"{folder.folder.name}/{file.name}")
    with pytest.raises(DicomError, match="2 series"):
        choose_series(tmp_path / "study.zip")
    assert choose_series(tmp_path / "study.zip", "T2").description == "t2"


def test_case_has_the_name_of_the_archive(tmp_path):
    path = tmp_path / "scan.zip"
    assert find_cases(path) == [{"subject": "scan", "image": str(path)}]


def refused(path, temporary):
    with pytest.raises(DicomError) as caught:
        choose_series(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    caught = None
    gc.collect()
    assert list(temporary.iterdir()) == []
    return message


@pytest.mark.parametrize("name", ["../IM1", "study/../../IM1", "/IM1", "C:/IM1", "..\\IM1"])
def test_path_that_leads_out_is_refused(name, series, temporary, tmp_path):
    path = pack(tmp_path / "scan.zip", series.files)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(zipfile.ZipInfo(name), series.files[0].read_bytes())
    assert "leads out of the archive" in refused(path, temporary)
    assert not Path("/IM1").exists()
    assert {file.name for file in tmp_path.iterdir()} == {"in", "scan.zip", "temporary"}


def test_link_in_an_archive_is_not_followed(series, temporary, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(series.files[0].read_bytes())
    link = zipfile.ZipInfo("IM1")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "scan.zip", "w") as archive:
        archive.writestr(link, str(secret))
    assert "no DICOM files in it" in refused(tmp_path / "scan.zip", temporary)


@pytest.mark.parametrize(("limit", "value"), [("MAX_BYTES", 10_000), ("MAX_FILES", 10)])
def test_archive_that_is_too_large_is_refused_unread(limit, value, series, temporary, tmp_path, monkeypatch):
    monkeypatch.setattr(dicom_zip, limit, value)
    monkeypatch.setattr(zipfile.ZipFile, "extractall", None)
    assert "more than a study" in refused(pack(tmp_path / "scan.zip", series.files), temporary)


def cut(content):
    return content[: len(content) // 2]


def damage(content):
    middle = len(content) // 2
    return content[:middle] + bytes(200) + content[middle + 200 :]


def encrypt(content):
    """Set the flag in each header, of the files and of the table at the end."""
    changed = bytearray(content)
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        for header in re.finditer(re.escape(mark), content):
            changed[header.start() + place] |= 1
    return bytes(changed)


@pytest.mark.parametrize(
    ("spoil", "fact"),
    [(cut, "a damaged one"), (damage, "a damaged one"), (encrypt, "encrypted"), (lambda _: b"", "not a zip archive")],
)
def test_broken_archive_is_one_line(spoil, fact, series, temporary, tmp_path):
    path = pack(tmp_path / "scan.zip", series.files)
    path.write_bytes(spoil(path.read_bytes()))
    assert fact in refused(path, temporary)


def test_archive_without_dicom(temporary, tmp_path):
    assert "no DICOM files in it" in refused(pack(tmp_path / "scan.zip", []), temporary)


def test_what_was_unpacked_is_private(series, tmp_path):
    unpacked = Unpacked(pack(tmp_path / "scan.zip", series.files))
    assert unpacked.folder.stat().st_mode & 0o077 == 0
