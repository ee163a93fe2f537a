"""DICOM in: which series of a folder is the volume, whether it is whole, and its voxels with an affine in RAS mm.

Messages name a series by its number, description and UID and an image by its InstanceNumber; nothing of the patient.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from monai.data import MetaTensor
from monai.utils import optional_import

from ..errors import DicomError
from .dicom_geometry import EXPORT_WHOLE, GEOMETRY, VOLUME_TAGS, check_slices, instance, integer, lps_affine, place
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


@dataclass(frozen=True)
class Series:
    """The files of one SeriesInstanceUID, from the first to the last slice along the normal (row x column).

    `headers` are pydicom datasets of TAGS, none of which tells who the patient is, in the order of `files`.
    """

    folder: Path
    uid: str
    description: str
    number: int | None
    modality: str
    files: tuple[Path, ...]
    headers: tuple[Any, ...] = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"series {'-' if self.number is None else self.number} {self.description!r}"

    @property
    def is_multiframe(self) -> bool:
        """Enhanced DICOM: one file holds the volume."""
        return len(self.files) == 1 and (integer(self.headers[0], "NumberOfFrames") or 1) > 1

    @property
    def not_volume(self) -> str | None:
        """The word of NOT_VOLUMES that its images are said to be."""
        image_type = self.headers[0].get("ImageType") or ()
        return next((kind for kind in NOT_VOLUMES if kind in image_type), None)

    def __str__(self) -> str:
        return f"{self.name} {self.modality} {len(self.files)} image{'s' * (len(self.files) > 1)} {self.uid}"


def find_series(folder: str | Path) -> list[Series]:
    """All series in a folder and its subfolders, or in one file, by number; what is not DICOM is passed over.

    Reads headers only. Raises DicomError where there is no DICOM, or a DICOM file is damaged.
    """
    folder = Path(folder)
    paths = [folder] if folder.is_file() else sorted(path for path in folder.rglob("*") if path.is_file())
    groups = defaultdict(list)
    for count, path in enumerate(paths, 1):
        # not the name of the file, which is often the patient's
        damaged = DicomError(folder, f"DICOM file {count} of {len(paths)}, sorted by name, is damaged", EXPORT_WHOLE)
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=TAGS)
        except pydicom.errors.InvalidDicomError:
            continue
        except OSError as error:
            fact = f"file {count} of {len(paths)}, sorted by name, cannot be read ({error.strerror})"
            raise DicomError(folder, fact, "check its permissions") from error
        except Exception as error:  # whatever pydicom's parser meets
            raise damaged from error
        if header.file_meta.get("MediaStorageSOPClassUID") == DICOMDIR:
            continue
        if not header.get("SeriesInstanceUID"):
            raise damaged
        groups[str(header.SeriesInstanceUID)].append((path, header))
    if not groups:
        fact = "no DICOM files in it" if folder.is_dir() else "no such folder"
        raise DicomError(folder, fact, "give the folder of one DICOM series")
    found = [_series(folder, uid, pairs) for uid, pairs in groups.items()]
    return sorted(found, key=lambda series: (series.number is None, series.number or 0, series.uid))


def _series(folder: Path, uid: str, pairs: list[tuple[Path, Any]]) -> Series:
    pairs.sort(key=lambda pair: (place(pair[1]) or 0.0, integer(pair[1], "InstanceNumber") or 0))
    files, headers = zip(*pairs, strict=True)
    first = headers[0]
    description, modality = str(first.get("SeriesDescription") or ""), str(first.get("Modality") or "unknown")
    return Series(folder, uid, description, integer(first, "SeriesNumber"), modality, files, headers)


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
    if not series.is_multiframe:  # its geometry is checked where it is read
        check_slices(series.folder, series.name, series.headers)


def read_series(series: Series) -> MetaTensor:
    """The volume (1, I, J, K) float32: columns, rows, slices; rescaled by slope and intercept, with its RAS affine.

    `meta["series_uid"]` tells where it came from. Raises DicomError where the pixels cannot be decoded, or the frames
    of an enhanced image are not one volume.
    """
    image = _read_multiframe(series) if series.is_multiframe else _read_slices(series)
    image.meta["series_uid"] = series.uid
    return image


def _read_slices(series: Series) -> MetaTensor:
    slices = [_read_slice(series, path, header) for path, header in zip(series.files, series.headers, strict=True)]
    return to_tensor(np.stack(slices).T, lps_affine(series.headers), series.folder)


def _read_slice(series: Series, path: Path, header: Any) -> np.ndarray:
    """Rows and columns, rescaled; not by ITK's reader of series, which rounds to the type of the first image."""
    try:
        return sitk.GetArrayFromImage(sitk.ReadImage(str(path), sitk.sitkFloat32, imageIO="GDCMImageIO"))[0]
    except RuntimeError as error:
        syntax = header.file_meta.TransferSyntaxUID
        why = "truncated or damaged" + (", or compressed in an unsupported way" if syntax.is_compressed else "")
        fact = f"{series.name}, image {instance(header)} cannot be decoded ({syntax.name}), it is {why}"
        raise DicomError(series.folder, fact, "export the series again, uncompressed") from error


def _read_multiframe(series: Series) -> MetaTensor:
    highdicom, has_highdicom = optional_import("highdicom")
    if not has_highdicom:
        raise DicomError(series.folder, f"{series.name} is multi-frame", "install highdicom, which reads it")
    try:
        volume = highdicom.imread(series.files[0]).get_volume(dtype=np.float32, apply_real_world_transform=False)
    except Exception as error:  # whatever the decoders of pydicom raise
        fact = f"the frames of {series.name} cannot be read as one volume ({type(error).__name__})"
        raise DicomError(series.folder, fact, "convert it to NIfTI with dcm2niix") from error
    axes = [2, 1, 0, 3]  # highdicom has slice, row, column
    return to_tensor(volume.array.T, volume.affine[:, axes], series.folder)
