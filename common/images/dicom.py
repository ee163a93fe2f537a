"""DICOM in: which series of a folder is the volume, whether it is whole, and its voxels with an affine in RAS mm.

Messages name a series by its number, description and UID and an image by its InstanceNumber; nothing of the patient.
"""

from __future__ import annotations

import mimetypes
import re
import threading
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from monai.data import MetaTensor
from monai.utils import optional_import

from ..errors import DicomError
from .dicom_frames import FUNCTIONAL_GROUPS, split_frames
from .dicom_geometry import EXPORT_WHOLE, GEOMETRY, VOLUME_TAGS, check_slices, instance, integer, lps_affine, place
from .dicom_zip import Unpacked, is_archive
from .itk_image import to_tensor

pydicom, _ = optional_import("pydicom")
sitk, _ = optional_import("SimpleITK")

IMAGE_MODALITIES = ("MR", "CT")
NOT_VOLUMES = ("LOCALIZER", "MOSAIC")  # ImageType of scouts, and of Siemens' slices side by side in one picture
DICOMDIR = "1.2.840.10008.1.3.10"  # SOP class of a directory of a medium
TAGS = [
    *("SOPInstanceUID", "SeriesInstanceUID", "SeriesDescription", "SeriesNumber", "Modality", "InstanceNumber"),
    *("NumberOfFrames", "FrameOfReferenceUID", "PhotometricInterpretation", *GEOMETRY, *VOLUME_TAGS),
]
GIVE_IMAGES = "give the folder of the image series"
CONVERT = "convert it to NIfTI with dcm2niix, and give one volume of it"
KNOWN_TYPES = mimetypes.MimeTypes()  # Python's own table, whatever the system says
IMAGE_GROUPS = (0x0028, 0x5200, 0x7FE0)  # pixels and how they are stored; nothing of the patient
OVERLAY_GROUPS = range(0x6000, 0x6100)
SYSTEM_FILES = ("thumbs.db", "desktop.ini")
_one_thread = threading.RLock()


@dataclass(frozen=True)
class Series:
    """The files of one SeriesInstanceUID, from the first to the last slice along the normal (row x column).

    `headers` are pydicom datasets of TAGS, none of which tells who the patient is, in the order of `files`, or one for
    each frame of a multi-frame file.
    `unread` are the numbers, among all files of `folder` sorted by name, of those beside the images that may be images
    too but cannot be parsed.
    `unpacked` keeps the files of a zip archive, which is the `folder`.
    """

    folder: Path
    uid: str
    description: str
    number: int | None
    modality: str
    files: tuple[Path, ...]
    headers: tuple[Any, ...] = field(repr=False, compare=False)
    unread: tuple[int, ...] = ()
    unpacked: Unpacked | None = field(default=None, repr=False, compare=False)

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"series {'-' if self.number is None else self.number} {self.description!r}"

    @property
    def is_multiframe(self) -> bool:
        """Enhanced DICOM: a file holds many slices."""
        frames = max(integer(header, "NumberOfFrames") or 1 for header in self.headers)
        return frames > 1 or len(self.headers) > len(self.files)

    @property
    def not_volume(self) -> str | None:
        """The word of NOT_VOLUMES that its images are said to be."""
        image_type = self.headers[0].get("ImageType") or ()
        return next((kind for kind in NOT_VOLUMES if kind in image_type), None)

    def __str__(self) -> str:
        return f"{self.name} {self.modality} {len(self.files)} image{'s' * (len(self.files) > 1)} {self.uid}"


def find_series(folder: str | Path) -> list[Series]:
    """All series in a folder and its subfolders, a zip archive, or one file, by number.

    What is clearly not DICOM is passed over.

    Reads headers only. Raises DicomError where there is no DICOM, or a DICOM file is damaged.
    """
    folder = Path(folder)
    unpacked = Unpacked(folder) if is_archive(folder) and folder.is_file() else None
    root = unpacked.folder if unpacked else folder
    paths = [root] if root.is_file() else sorted(path for path in root.rglob("*") if _is_file(path))
    groups: dict[str, list[tuple[Path, Any]]] = defaultdict(list)
    unread: dict[Path, list[int]] = defaultdict(list)
    for count, path in enumerate(paths, 1):
        try:
            frames = _read_headers(path)
            uid = str(frames[0]["SeriesInstanceUID"].value) if frames else None
        except pydicom.errors.InvalidDicomError:
            if not is_other_kind(path):
                unread[path.parent].append(count)
        except OSError as error:
            fact = f"file {count} of {len(paths)}, sorted by name, cannot be read ({error.strerror})"
            raise DicomError(folder, fact, "fetch it if it is a link, or check its permissions") from error
        except Exception as error:  # whatever pydicom's parser meets
            # not the name of the file, which is often the patient's
            fact = f"DICOM file {count} of {len(paths)}, sorted by name, is damaged"
            raise DicomError(folder, fact, EXPORT_WHOLE) from error
        else:
            if uid is not None:
                groups[uid] += [(path, frame) for frame in frames]
    if not groups:
        fact = "no DICOM files in it" if root.is_dir() else "no such folder"
        raise DicomError(folder, fact, "give the folder of one DICOM series")
    found = [_series(folder, uid, pairs, unread, unpacked) for uid, pairs in groups.items()]
    return sorted(found, key=lambda series: (series.number is None, series.number or 0, series.uid))


def _read_headers(path: Path) -> list[Any]:
    """A header for each image in a file; none of a directory of a medium. Raises what pydicom raises."""
    with without_warnings():  # of malformed values, which are left out, or checked where they matter
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=[*TAGS, *FUNCTIONAL_GROUPS])
        if header.file_meta.get("MediaStorageSOPClassUID") == DICOMDIR:
            return []
        return split_frames(header, TAGS)


def _is_file(path: Path) -> bool:
    """Links to nothing count: slices may lie where they have to be fetched from."""
    return path.is_file() or (path.is_symlink() and not path.exists())


def is_other_kind(path: Path) -> bool:
    """Whether a file that is not DICOM is clearly no image: hidden, of another type by its name, or text.

    An empty file, or one of binary content, may be what is left of an image.
    """
    name = path.name.lower()
    if name.startswith(".") or name in SYSTEM_FILES or any(KNOWN_TYPES.guess_type(f"./{name}")):
        return True
    with path.open("rb") as file:
        start = file.read(4096)
    return bool(start) and not re.search(rb"[\x00-\x08\x0e-\x1f]", start)


def _series(
    folder: Path, uid: str, pairs: list[tuple[Path, Any]], unread: dict[Path, list[int]], unpacked: Unpacked | None
) -> Series:
    pairs.sort(key=lambda pair: (place(pair[1]) or 0.0, integer(pair[1], "InstanceNumber") or 0))
    paths, headers = zip(*pairs, strict=True)
    files = tuple(dict.fromkeys(paths))
    first = headers[0]
    description, modality = str(first.get("SeriesDescription") or ""), str(first.get("Modality") or "unknown")
    beside = [count for parent in sorted({path.parent for path in files}) for count in unread.get(parent, ())]
    number = integer(first, "SeriesNumber")
    return Series(folder, uid, description, number, modality, files, headers, tuple(beside), unpacked)


def choose_series(folder: str | Path, series: str | None = None) -> Series:
    """The only volume of a folder, or the one that is called `series`: its UID, or its description in any case.

    Where nothing is named, scouts and what is not MR or CT do not count. Raises DicomError.
    """
    found = find_series(folder)
    if series is None:
        images = [one for one in found if one.modality in IMAGE_MODALITIES]
        # one that is no volume is refused below, with the reason
        chosen = [one for one in images if one.not_volume is None] or images[:1] or found[:1]
    else:
        name = series.strip().casefold()
        chosen = [one for one in found if name in (one.uid, one.description.strip().casefold())]
    if not chosen:
        fact = f"no series is called {series!r}, there are: {', '.join(map(str, found))}"
        raise DicomError(folder, fact, "name one by its UID or description", series="UID")
    if len(chosen) > 1:
        fact = f"{len(chosen)} series: {', '.join(map(str, chosen))}"
        raise DicomError(folder, fact, "give a folder with one series", series="UID_OR_DESCRIPTION")
    check_series(chosen[0])
    return chosen[0]


def check_series(series: Series) -> None:
    """Refuse what is not the slices of one MR or CT volume, all of them, evenly spaced. Raises DicomError."""
    if series.modality not in IMAGE_MODALITIES:
        raise DicomError(series.folder, f"{series.modality} objects, not MR or CT images", GIVE_IMAGES)
    if series.not_volume:
        fact = f"{series.name} is a {series.not_volume.lower()}, not a volume"
        raise DicomError(series.folder, fact, GIVE_IMAGES)
    if series.unread:
        which = ", ".join(map(str, series.unread[:5])) + ", ..." * (len(series.unread) > 5)
        fact = f"{series.name}: {len(series.unread)} file(s) beside its images are empty or damaged ({which} by name)"
        raise DicomError(series.folder, fact, "copy them again, or take away what is no image")
    if not series.is_multiframe:
        check_slices(series.folder, series.name, series.headers)
        return
    if len(series.files) > 1:
        raise DicomError(series.folder, f"{series.name} is {len(series.files)} multi-frame images", CONVERT)
    if len(series.headers) == 1:
        frames = integer(series.headers[0], "NumberOfFrames")
        raise DicomError(series.folder, f"{series.name} is {frames} frames without a place in the patient", CONVERT)
    try:
        check_slices(series.folder, series.name, series.headers)
    except DicomError as error:
        raise DicomError(error.source, error.fact, CONVERT) from error


def read_series(series: Series) -> MetaTensor:
    """The volume (1, I, J, K) float32: columns, rows, slices; rescaled by slope and intercept, with its RAS affine.

    `meta["series_uid"]` tells where it came from. Raises DicomError where the pixels cannot be decoded, or the frames
    of an enhanced image are not one volume.
    """
    with without_warnings():
        image = _read_multiframe(series) if series.is_multiframe else _read_slices(series)
    image.meta["series_uid"] = series.uid
    return image


def _read_slices(series: Series) -> MetaTensor:
    slices = [_read_slice(series, path, header) for path, header in zip(series.files, series.headers, strict=True)]
    return to_tensor(np.stack(slices).T, lps_affine(series.headers), series.folder)


def _read_slice(series: Series, path: Path, header: Any) -> np.ndarray:
    """Rows and columns, rescaled; not by ITK's reader of series, which rounds to the type of the first image."""
    try:
        try:
            return _decode(path)
        except RuntimeError:
            return _decode_without_overlays(path)
    except Exception as error:  # of GDCM, and whatever the parser of pydicom meets
        syntax = pydicom.uid.UID(str(header.file_meta.get("TransferSyntaxUID") or "no transfer syntax"))
        plain = syntax.is_transfer_syntax and not syntax.is_compressed
        why = "truncated or damaged" + ("" if plain else ", or compressed in an unsupported way")
        fact = f"{series.name}, image {instance(header)} cannot be decoded ({syntax.name}), it is {why}"
        raise DicomError(series.folder, fact, "export the series again, uncompressed") from error


def _decode(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path), sitk.sitkFloat32, imageIO="GDCMImageIO"))[0]


def _decode_without_overlays(path: Path) -> np.ndarray:
    """GDCM gives up on an overlay in unused bits of the pixels where these are not a multiple of 8."""
    dataset = pydicom.dcmread(path)
    if not any(element.tag.group in OVERLAY_GROUPS for element in dataset):
        raise ValueError("no overlay")
    _ = dataset.pixel_array  # raises where pixels are missing, which GDCM would fill up
    with TemporaryDirectory() as folder:
        image = Path(folder) / "image.dcm"
        kept = pydicom.dataset.FileDataset(image, {}, file_meta=dataset.file_meta, preamble=bytes(128))
        for element in dataset:
            if element.tag.group in IMAGE_GROUPS or element.keyword in ("SOPClassUID", "SOPInstanceUID"):
                kept.add(element)
        kept.save_as(image)
        return _decode(image)


def _read_multiframe(series: Series) -> MetaTensor:
    highdicom, has_highdicom = optional_import("highdicom")
    if not has_highdicom:
        raise DicomError(series.folder, f"{series.name} is multi-frame", "install highdicom, which reads it")
    try:
        volume = highdicom.imread(series.files[0]).get_volume(dtype=np.float32, apply_real_world_transform=False)
    except Exception as error:  # whatever the decoders of pydicom raise
        fact = f"the frames of {series.name} cannot be read as one volume ({type(error).__name__})"
        raise DicomError(series.folder, fact, CONVERT) from error
    axes = [2, 1, 0, 3]  # highdicom has slice, row, column
    return to_tensor(volume.array.T, volume.affine[:, axes], series.folder)


@contextmanager
def without_warnings() -> Iterator[None]:
    """For a block in which pydicom reads or writes: its warnings quote what the tags say of the patient.

    One thread at a time: Python keeps one list of what is to be warned of, which each thread would put back for itself.
    """
    with _one_thread, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
