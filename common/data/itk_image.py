"""NRRD and MetaImage in, and what SimpleITK reads as the tensor that all transforms here expect."""

from __future__ import annotations

import math
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
    lps = np.eye(4)
    lps[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    lps[:3, 3] = image.GetOrigin()
    return to_tensor(sitk.GetArrayFromImage(image).T, lps, path)


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
    # ITK takes voxels without a named space to be LPS, whatever they are
    if READERS[path.suffix.lower()] == "NrrdImageIO" and not reader.HasMetaDataKey("NRRD_space"):
        raise ImageGeometryError(path, "no `space`, so left and right are unknown", "write `space` into the header")


def to_tensor(array: np.ndarray, lps: np.ndarray, source: str | Path) -> MetaTensor:
    """Voxels (H, W, D) and their affine in ITK's and DICOM's axes (left, posterior, superior, mm) as (1, H, W, D)
    float32 with the affine in RAS mm."""
    voxels = torch.as_tensor(np.ascontiguousarray(array, dtype=np.float32))[None]
    meta = {"filename_or_obj": str(source), "space": SpaceKeys.RAS}
    return MetaTensor(voxels, affine=torch.as_tensor(orientation_ras_lps(lps)), meta=meta)
