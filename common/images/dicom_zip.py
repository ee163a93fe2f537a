"""A zip archive of DICOM files, as a PACS hands it out: unpacked into a folder of its own for as long as it is needed.

Messages name the archive, not what is in it: names of files are often the patient's.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import weakref
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from ..errors import DicomError

MAX_BYTES, MAX_FILES = 2**33, 2**17  # unpacked: above a study of many series
AGAIN = "export or copy it again"


class Unpacked:
    """The files of an archive in a temporary folder, which is removed when nothing refers to this object any more.

    Raises DicomError where the archive is damaged, encrypted, too large when it is unpacked, or has a path that leads
    out of the folder; OSError where there is no room.
    """

    def __init__(self, archive: Path) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="uad-dicom-"))  # nobody else may look into it
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        try:
            with zipfile.ZipFile(archive) as opened:
                check_members(archive, opened.infolist())
                opened.extractall(self.folder)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise DicomError(archive, "not a zip archive, or a damaged one", AGAIN) from error
        except (RuntimeError, NotImplementedError) as error:  # of a password, and of kinds of compression
            fact = "encrypted, or compressed in a way that Python cannot unpack"
            raise DicomError(archive, fact, "unpack it yourself, and give the folder") from error


def is_archive(path: Path) -> bool:
    """Whether a path is said to be a zip archive, by its name."""
    return path.suffix.lower() == ".zip"


def check_members(archive: Path, members: list[zipfile.ZipInfo]) -> None:
    """Raises DicomError where an archive is larger than any study, or would write outside of its folder."""
    size = sum(member.file_size for member in members)
    if size > MAX_BYTES or len(members) > MAX_FILES:
        fact = f"{len(members)} files of {size / 2**30:.1f} GiB in it, more than a study"
        raise DicomError(archive, fact, "unpack it yourself, and give the folder of one series")
    for number, member in enumerate(members, 1):
        path = PurePosixPath(member.filename.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or re.match("[A-Za-z]:", member.filename):
            raise DicomError(archive, f"its entry {number} leads out of the archive", "do not trust where it is from")
