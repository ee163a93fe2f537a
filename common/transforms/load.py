"""Load images of any kind that a scanner or a researcher writes, with one typed error for each way that it fails."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, cast

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor, NibabelReader
from monai.transforms import EnsureChannelFirst, MapTransform
from monai.utils import ensure_tuple
from nibabel.filebasedimages import ImageFileError as NibabelImageFileError
from nibabel.spatialimages import HeaderDataError, SpatialImage

from ..data.dicom import choose_series, read_series
from ..data.itk_image import ITK_SUFFIXES, MAX_VOXELS, read_itk
from ..data.pointer import check_fetched
from ..errors import CohortError, ImageFileError, ImageGeometryError, ImageIntensityError, ImageShapeError
from ..weights import digest
from .check import check_geometry, check_intensity, check_shape, same_grid
from .registration import align_to


class LoadImageCheckedd(MapTransform):
    """Load NIfTI, NRRD, MetaImage files and folders of a DICOM series; what fails is a `UADError`.

    A list of paths, one a modality, becomes one image with a channel each; those on another grid than the first are
    registered to it rigidly. The name keeps "LoadImage": MONAI Deploy, which brings images from memory, drops
    transforms by that word.

    Args:
        keys: paths; images that are in memory already stay.
        series_key: where the item says which DICOM series of a folder to take, by UID or description.
    """

    def __init__(self, keys: KeysCollection, allow_missing_keys: bool = False, series_key: str = "series") -> None:
        super().__init__(keys, allow_missing_keys)
        self.series_key = series_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add the images, (C, H, W, D) float32 with their affine (RAS, mm), and `<key>_sha256`. Raises UADError."""
        result = dict(data)
        for key in self.key_iterator(result):
            if not isinstance(result[key], torch.Tensor):
                images = [load_image(path, result.get(self.series_key)) for path in ensure_tuple(result[key])]
                result[f"{key}_sha256"] = digest(result[key])
                result[key] = images[0] if len(images) == 1 else stack(images)
        return result


def load_image(path: str | Path, series: str | None = None) -> MetaTensor:
    """(C, H, W, D) float32 with its affine (RAS, mm); C is above 1 where a file holds several volumes.

    Args:
        path: a NIfTI, NRRD or MetaImage file, the folder of a DICOM series, or a multi-frame DICOM file (`.dcm`).
        series: which series of the folder, by UID or description.
    Raises UADError.
    """
    path = Path(path)
    try:
        check_fetched(path)
        if not path.exists():
            raise ImageFileError(path, "no such file", "check the path")
        if path.is_dir() or path.suffix.lower() == ".dcm":
            return read_series(choose_series(path, series))
        return read_itk(path) if path.name.lower().endswith(ITK_SUFFIXES) else read_nifti(path)
    except OSError as error:
        cause = error.strerror or str(error).splitlines()[0]
        raise ImageFileError(path, f"cannot be read ({cause})", "check the file and its permissions") from error


def read_nifti(path: Path) -> MetaTensor:
    """(C, H, W, D) float32 with the affine that the header says. Raises UADError."""
    try:
        affine = read_affine(path)
        reader = NibabelReader()  # MONAI's LoadImage would make all readers that it has, with their warnings
        values, meta = reader.get_data(reader.read(path))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ImageFileError(path, "the compressed file is truncated or damaged", "copy it again") from error
    except (NibabelImageFileError, HeaderDataError) as error:
        raise ImageFileError(path, f"not a NIfTI image ({error})", "convert it to NIfTI") from error
    except (RuntimeError, ValueError) as error:
        cause = str(error).splitlines()[0]
        raise ImageFileError(path, f"cannot be read ({cause})", "check the file and its permissions") from error
    image = MetaTensor(torch.from_numpy(values.astype(np.float32)), meta=meta)
    image = cast(MetaTensor, EnsureChannelFirst()(image))
    # MONAI exchanges an affine that disagrees with the header's voxel sizes, a singular one too
    image.affine = torch.as_tensor(affine)
    image.meta["filename_or_obj"] = str(path)
    return image


def read_affine(path: Path) -> np.ndarray:
    """Voxel to world (RAS, mm), (4, 4), as the header of a file says, which is checked before the voxels are read.

    Raises UADError, and what nibabel raises.
    """
    size = uncompressed_size(path)
    image = nib.load(path)
    if not isinstance(image, SpatialImage):
        raise ImageFileError(path, "not an image of voxels", "convert it to NIfTI")
    dtype = image.get_data_dtype()
    if dtype.fields is not None or dtype.kind == "c":
        raise ImageIntensityError(path, "colour or complex voxels", "convert it to one real number per voxel")
    check_size(path, image.shape, dtype.itemsize, size)
    if isinstance(image, nib.Nifti1Pair):
        check_placement(path, image.header)
    return np.asarray(image.affine, dtype=float)


def uncompressed_size(path: Path) -> int:
    """Bytes of a file, or of what is compressed in it, all of which is read: nibabel does not look at the checksum.

    Raises ImageFileError where the name, which nibabel believes, does not say whether the file is compressed.
    """
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
        size = path.stat().st_size
        if path.suffix == ".gz" and not compressed and size:
            raise ImageFileError(path, "named .gz but not compressed", "rename it to .nii if it is a NIfTI image")
        if path.suffix == ".nii" and compressed:
            raise ImageFileError(path, "compressed but not named .gz", "rename it to .nii.gz")
        if compressed:
            with gzip.open(path) as content:
                size = sum(len(chunk) for chunk in iter(lambda: content.read(2**20), b""))
    return size


def check_size(path: Path, shape: tuple[int, ...], itemsize: int, size: int) -> None:
    """The header promises no more voxels than a scan has and the file holds, before memory is taken for them."""
    voxels = int(np.prod(shape, dtype=object))
    if voxels > MAX_VOXELS:
        raise ImageShapeError(path, f"the header says {voxels} voxels, more than a scan has", "check the header")
    if path.suffix in (".gz", ".nii") and voxels * itemsize > size:
        raise ImageFileError(path, f"truncated: too small for the {voxels} voxels of its header", "copy it again")


def check_placement(path: Path, header: nib.Nifti1Header) -> None:
    """Sform or qform is set, and where both place the same space they agree within a voxel. Raises ImageGeometryError.

    A qform of the scanner beside an sform of a template (codes 3 and 4) may differ, unless one mirrors the other.
    """
    sform, sform_code = header.get_sform(coded=True)
    qform, qform_code = header.get_qform(coded=True)
    if not sform_code and not qform_code:
        fact = "neither sform nor qform is set, so left and right are unknown"
        raise ImageGeometryError(path, fact, "set one of them in the header")
    if not sform_code or not qform_code or not (np.isfinite(sform).all() and np.isfinite(qform).all()):
        return
    mirrored = np.linalg.det(sform[:3, :3]) * np.linalg.det(qform[:3, :3]) < 0
    corners = np.stack(np.meshgrid(*[(0, size - 1) for size in header.get_data_shape()[:3]]), axis=-1).reshape(-1, 3)
    if corners.shape[1] != 3:
        return  # not a volume, which is said of its shape
    apart = np.abs(nib.affines.apply_affine(sform, corners) - nib.affines.apply_affine(qform, corners)).max()
    template = max(sform_code, qform_code) > 2
    if mirrored or (not template and apart > max(header.get_zooms()[:3])):
        fact = f"sform and qform contradict each other by {apart:.3g} mm"
        raise ImageGeometryError(path, fact, "copy the right one over the other")


def stack(images: list[MetaTensor]) -> MetaTensor:
    """Modalities of one subject as the channels of one image, on the grid of the first. Raises UADError."""
    first = images[0]
    aligned = [first.as_tensor()]
    for image in images[1:]:
        if not same_grid(image, first):
            for one in (first, image):
                check_shape(one, channels=1)
                check_geometry(one)
                check_intensity(one)
            image = align_to(first, image)
        aligned.append(image.as_tensor())
    return MetaTensor(torch.cat(aligned), meta=dict(first.meta))


def load_lesion(path: str, image: MetaTensor) -> MetaTensor:
    """A lesion mask (1, H, W, D) on the grid of an image. Raises CohortError where the grid is another."""
    mask = load_image(path)
    if not same_grid(mask, image):
        raise CohortError(path, "the lesion mask is on another grid than the image", "resample it to the image's grid")
    return mask
