"""NRRD and MetaImage in, and what SimpleITK reads as the tensor that all transforms here expect."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.utils import orientation_ras_lps
from monai.utils import SpaceKeys, optional_import

from ..errors import ImageFileError, ImageGeometryError, ImageIntensityError, ImageShapeError

sitk, _ = optional_import("SimpleITK")

READERS = {".nrrd": "NrrdImageIO", ".nhdr": "NrrdImageIO", ".mha": "MetaImageIO", ".mhd": "MetaImageIO"}
ITK_SUFFIXES = tuple(READERS)
VOXELS = ("elementdatafile", "data file", "datafile")  # fields that say where the voxels are
NRRD_SPACES = ("right-anterior-superior", "left-anterior-superior", "left-posterior-superior", "ras", "las", "lps")
MAX_VOXELS = 2**29  # 2 GiB as float32, above any scan of a head


def read_itk(path: str | Path) -> MetaTensor:
    """Read NRRD or MetaImage as (1, H, W, D) float32 with its affine in RAS mm.

    Raises ImageFileError (no such file, damaged, other content), ImageShapeError (not 3D, several channels, huge),
    ImageIntensityError (complex voxels) or ImageGeometryError (the file does not say where left and right are).
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise ImageFileError(path, f"not one of {', '.join(READERS)}", "convert it to NIfTI")
    if not path.is_file():
        raise ImageFileError(path, "no such file", "check the path")
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO(READERS[suffix])
    try:
        reader.ReadImageInformation()
        check_header(path, reader)
        image = reader.Execute()
    except RuntimeError as error:
        form = READERS[suffix].removesuffix("ImageIO")
        raise ImageFileError(path, f"not a whole {form} image", "copy it again, with the file of its voxels") from error
    return from_itk(image, path)


def from_itk(image: Any, source: str | Path) -> MetaTensor:
    """A SimpleITK image as (1, H, W, D) float32 with its affine in RAS mm.

    Raises ImageIntensityError (complex voxels) or ImageShapeError (not 3D, several channels).
    """
    if "complex" in image.GetPixelIDTypeAsString():
        raise ImageIntensityError(source, "complex voxels", "convert it to one real number per voxel")
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        fact = f"{image.GetDimension()} dimensions, {image.GetNumberOfComponentsPerPixel()} channels"
        raise ImageShapeError(source, fact, "give one 3D volume")
    lps = np.eye(4)
    lps[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    lps[:3, 3] = image.GetOrigin()
    return to_tensor(sitk.GetArrayFromImage(image).T, lps, source)


def check_header(path: Path, reader: Any) -> None:
    """One real, 3D volume with a known left and right, before memory is taken for it. Raises UADError."""
    channels, size = reader.GetNumberOfComponents(), reader.GetSize()
    if "complex" in sitk.GetPixelIDValueAsString(reader.GetPixelIDValue()):
        raise ImageIntensityError(path, "complex voxels", "convert it to one real number per voxel")
    if channels != 1:
        raise ImageShapeError(path, f"{channels} channels in one file, not 1", "give each 3D volume as a file")
    if len(size) != 3:
        raise ImageShapeError(path, f"{len(size)} dimensions, not 3", "give one 3D volume")
    if math.prod(size) > MAX_VOXELS:
        raise ImageShapeError(path, f"{math.prod(size)} voxels, more than a scan has", "check the header")
    # ITK takes voxels that are placed nowhere to be LPS, 1 mm, whatever they are
    fields, _ = read_fields(path)
    if READERS[path.suffix.lower()] == "NrrdImageIO":
        space = fields.get("space", "")
        if space.lower().removesuffix("-time") not in NRRD_SPACES:
            fact = f"no `space`{' of a patient: ' + repr(space) if space else ''}, so left and right are unknown"
            raise ImageGeometryError(path, fact, "write `space` into the header")
        needed: list[tuple[str, ...]] = [("space directions",)]
    else:
        needed = [("transformmatrix", "rotation", "orientation"), ("elementspacing", "elementsize")]
    for names in needed:
        if not fields.keys() & set(names):
            fact = f"no {names[0]!r} in its header, so the voxels have no place in the patient"
            raise ImageGeometryError(path, fact, "write it again with the geometry of the scan")


def read_fields(path: Path) -> tuple[dict[str, str], list[str]]:
    """Fields of a text header, names in lower case, and the lines after a list of files is announced."""
    fields: dict[str, str] = {}
    with path.open("rb") as file:
        while line := file.readline(2**16).decode("latin-1").strip():
            name, _, value = (part.strip() for part in re.sub(r":=?", "=", line, count=1).partition("="))
            fields[name.lower()] = value
            if name.lower() in VOXELS and value.upper().startswith("LIST"):
                return fields, [text for rest in file if (text := rest.decode("latin-1").strip())]
            if name == "ElementDataFile":
                break
    return fields, []


def voxel_files(path: str | Path) -> list[Path]:
    """The files in which the voxels of a header lie, where they are apart: `.raw` of a `.mhd`, `.img` of a `.hdr`."""
    path = Path(path)
    name, suffix = path.name.lower(), path.suffix.lower()
    for one, other in ((".hdr", ".img"), (".img", ".hdr")):
        for end in (one, f"{one}.gz"):
            if name.endswith(end):
                stem = path.name[: -len(end)]
                there = [path.with_name(stem + other + gz) for gz in ("", ".gz")]
                return [file for file in there if file.is_file()]
    if suffix not in (".mhd", ".mha", ".nhdr", ".nrrd"):
        return []
    fields, listed = read_fields(path)
    value = next((fields[key] for key in VOXELS if key in fields), "LOCAL")
    if value.upper().startswith("LIST"):
        names = listed
    elif "%" in value:  # a pattern, the first and last number, and the step
        pattern, first, last, *step = value.split()
        names = [pattern % number for number in range(int(first), int(last) + 1, int(step[0]) if step else 1)]
    else:
        names = [] if value.upper() == "LOCAL" else [value]
    return [path.parent / name for name in names]


def to_tensor(array: np.ndarray, lps: np.ndarray, source: str | Path) -> MetaTensor:
    """Voxels (H, W, D) and their affine in ITK's and DICOM's axes (left, posterior, superior, mm) as (1, H, W, D)
    float32 with the affine in RAS mm."""
    voxels = torch.as_tensor(np.ascontiguousarray(array, dtype=np.float32))[None]
    meta = {"filename_or_obj": str(source), "space": SpaceKeys.RAS}
    return MetaTensor(voxels, affine=torch.as_tensor(orientation_ras_lps(lps)), meta=meta)
