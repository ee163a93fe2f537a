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
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import SpaceKeys, ensure_tuple
from nibabel.filebasedimages import ImageFileError as NibabelImageFileError
from nibabel.freesurfer.mghformat import MGHError
from nibabel.spatialimages import HeaderDataError, SpatialImage
from nibabel.wrapstruct import WrapStructError

from ..errors import CohortError, ImageFileError, ImageGeometryError, ImageIntensityError, ImageShapeError
from ..images.check import check_geometry, check_intensity, check_shape, same_grid
from ..images.dicom import choose_series, read_series
from ..images.dicom_zip import is_archive
from ..images.itk_image import ITK_SUFFIXES, MAX_VOXELS, read_itk
from ..images.pointer import check_fetched
from ..weights import digest
from .registration import align_to

SIZE_ERROR = 0.05  # of a voxel's size in the sform to that in `pixdim`: rounding, resampling by a fraction of a voxel
TEMPLATE_SCALE = 0.6  # the same where the sform brings a person's brain to a template, which is larger
QUATERNION_ERROR = 1e-3  # of its length: what float32, or a few decimals of text, leave


class LoadImageCheckedd(MapTransform):
    """Load NIfTI, MGH, NRRD, MetaImage files, folders and zip archives of a DICOM series; what fails is a `UADError`.

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
        path: a NIfTI, MGH, NRRD or MetaImage file, the folder of a DICOM series, a zip archive of one, or a multi-frame
            DICOM file (`.dcm`).
        series: which series of the folder, by UID or description.
    Raises UADError.
    """
    path = Path(path)
    try:
        check_fetched(path)
        if not path.exists():
            raise ImageFileError(path, "no such file", "check the path")
        if path.is_dir() or path.suffix.lower() == ".dcm" or is_archive(path):
            return read_series(choose_series(path, series))
        return read_itk(path) if path.name.lower().endswith(ITK_SUFFIXES) else read_nifti(path)
    except OSError as error:
        cause = error.strerror or str(error).splitlines()[0]
        raise ImageFileError(path, f"cannot be read ({cause})", "check the file and its permissions") from error


def read_nifti(path: Path) -> MetaTensor:
    """(C, H, W, D) float32 of a NIfTI or MGH file with the affine that the header says. Raises UADError."""
    try:
        return from_nibabel(open_image(path), path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ImageFileError(path, "the compressed file is truncated or damaged", "copy it again") from error
    except (NibabelImageFileError, HeaderDataError, WrapStructError, MGHError) as error:
        raise ImageFileError(path, f"not a NIfTI image ({error})", "convert it to NIfTI") from error
    except (RuntimeError, ValueError, TypeError, OverflowError, MemoryError) as error:
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ImageFileError(path, f"cannot be read ({cause})", "check how the file was written") from error


def from_nibabel(image: SpatialImage, source: str | Path) -> MetaTensor:
    """(C, H, W, D) float32 of an image whose header was checked, with the affine that it says."""
    values = np.asanyarray(image.dataobj).astype(np.float32)
    channels = np.moveaxis(values, -1, 0) if values.ndim > 3 else values[None]
    meta = {"filename_or_obj": str(source), "space": SpaceKeys.RAS}
    affine = torch.as_tensor(np.asarray(image.affine, dtype=float))
    return MetaTensor(torch.from_numpy(np.ascontiguousarray(channels)), affine=affine, meta=meta)


def read_affine(path: Path) -> np.ndarray:
    """Voxel to world (RAS, mm), (4, 4), of a file that `open_image` opens. Raises what that raises."""
    return np.asarray(open_image(path).affine, dtype=float)


def open_image(path: Path) -> SpatialImage:
    """A NIfTI or MGH file whose header is checked before its voxels are read. Raises UADError, and what nibabel raises.

    Other formats that nibabel reads do not say where left and right are, or say it in ways that are not checked here.
    """
    size = uncompressed_size(path)
    image = cast(SpatialImage, nib.load(path))
    check_voxels(path, image)
    voxels = Path(image.file_map["image"].filename or path)  # another file where header and voxels are apart
    if not voxels.exists():
        raise ImageFileError(path, f"the file of its voxels, {voxels.name}, is not there", "copy both files")
    itemsize = image.get_data_dtype().itemsize
    check_size(path, image.shape, itemsize, size if voxels == path else uncompressed_size(voxels))
    if isinstance(image, nib.Nifti1Pair):
        check_placement(path, image.header)
    elif not has_placement(path):
        fact = "its header does not say where left and right are (goodRASflag is 0)"
        raise ImageGeometryError(path, fact, "write it again with the orientation of the scan")
    return image


def check_voxels(path: Path, image: SpatialImage) -> None:
    """NIfTI or MGH, with a real number in each voxel. Raises UADError."""
    if not isinstance(image, (nib.Nifti1Pair, nib.MGHImage)):
        if isinstance(image, nib.AnalyzeImage):
            fact = "an Analyze image, which does not say where left and right are"
            raise ImageGeometryError(path, fact, "convert it to NIfTI from the scanner's own files")
        raise ImageFileError(path, f"a {type(image).__name__}, not NIfTI or MGH", "convert it to NIfTI")
    dtype = image.get_data_dtype()
    if dtype.fields is not None or dtype.kind == "c":
        raise ImageIntensityError(path, "colour or complex voxels", "convert it to one real number per voxel")


def uncompressed_size(path: Path) -> int:
    """Bytes of a file, or of what is compressed in it, all of which is read: nibabel does not look at the checksum.

    Raises ImageFileError where the name, which nibabel believes, does not say whether the file is compressed.
    """
    suffix = path.suffix.lower()
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
        size = path.stat().st_size
        if suffix in (".gz", ".mgz") and not compressed and size:
            plain = ".mgh if it is an MGH image" if suffix == ".mgz" else ".nii if it is a NIfTI image"
            raise ImageFileError(path, f"named {suffix} but not compressed", f"rename it to {plain}")
        if suffix in (".nii", ".mgh", ".hdr", ".img") and compressed:
            named, right = (".mgz", ".mgz") if suffix == ".mgh" else (".gz", f"{suffix}.gz")
            raise ImageFileError(path, f"compressed but not named {named}", f"rename it to {right}")
        if compressed:
            with gzip.open(path) as content:
                size = sum(len(chunk) for chunk in iter(lambda: content.read(2**20), b""))
    return size


def check_size(path: Path, shape: tuple[int, ...], itemsize: int, size: int) -> None:
    """The header promises no more voxels than a scan has and the file holds, before memory is taken for them."""
    voxels = int(np.prod(shape, dtype=object))
    if voxels > MAX_VOXELS:
        raise ImageShapeError(path, f"the header says {voxels} voxels, more than a scan has", "check the header")
    if voxels * itemsize > size:
        raise ImageFileError(path, f"truncated: too small for the {voxels} voxels of its header", "copy it again")


def has_placement(path: Path) -> bool:
    """Whether an MGH header says where its voxels are: nibabel invents a place for those that do not."""
    with nib.openers.ImageOpener(str(path)) as file:
        return bool(file.read(30)[28:] == b"\x00\x01")


def check_placement(path: Path, header: nib.Nifti1Header) -> None:
    """Sform or qform is set, the voxels are as large as `pixdim` says, and where both place the same space they agree
    within a voxel. Raises ImageGeometryError.

    A qform of the scanner beside an sform of a template (codes 3 and 4) may differ, unless one mirrors the other.
    """
    sform, sform_code = header.get_sform(coded=True)
    qform, qform_code = read_qform(path, header)
    if not sform_code and not qform_code:
        fact = "neither sform nor qform is set, so left and right are unknown"
        raise ImageGeometryError(path, fact, "set one of them in the header")
    template = max(sform_code, qform_code) > 2
    if sform is not None and np.isfinite(sform).all():
        check_sizes(path, sform, header, TEMPLATE_SCALE if template else SIZE_ERROR)
    if sform is None or qform is None or not (np.isfinite(sform).all() and np.isfinite(qform).all()):
        return
    mirrored = np.linalg.det(sform[:3, :3]) * np.linalg.det(qform[:3, :3]) < 0
    corners = np.stack(np.meshgrid(*[(0, size - 1) for size in header.get_data_shape()[:3]]), axis=-1).reshape(-1, 3)
    if corners.shape[1] != 3:
        return  # not a volume, which is said of its shape
    apart = np.abs(nib.affines.apply_affine(sform, corners) - nib.affines.apply_affine(qform, corners)).max()
    if mirrored or (not template and apart > max(header.get_zooms()[:3])):
        fact = f"sform and qform contradict each other by {apart:.3g} mm"
        raise ImageGeometryError(path, fact, "copy the right one over the other")


def read_qform(path: Path, header: nib.Nifti1Header) -> tuple[np.ndarray | None, int]:
    """The qform and its code; its quaternion, of which rounding may have made more than 1, brought back to 1.

    Raises ImageGeometryError where it is no rotation.
    """
    try:
        return header.get_qform(coded=True)
    except ValueError as error:
        parts = [f"quatern_{name}" for name in "bcd"]
        length = float(np.linalg.norm([float(header[part]) for part in parts]))
        if not length < 1 + QUATERNION_ERROR:
            fact = f"the qform is no rotation (its quaternion is {length:.4g} long, not 1)"
            raise ImageGeometryError(path, fact, "repair it, or set qform_code to 0 if the sform is right") from error
        rounded = header.copy()
        for part in parts:
            rounded[part] = header[part] / length
        return rounded.get_qform(coded=True)


def check_sizes(path: Path, sform: np.ndarray, header: nib.Nifti1Header, tolerance: float) -> None:
    """The columns of an sform are as long as `pixdim` says, where that says anything. Raises ImageGeometryError."""
    columns, sizes = np.linalg.norm(sform[:3, :3], axis=0)[: len(header.get_zooms())], np.array(header.get_zooms()[:3])
    known = np.isfinite(sizes) & (sizes > 0) & (columns > 0)
    if (np.abs(np.log(columns[known] / sizes[known])) > np.log(1 + tolerance)).any():
        here, there = (" x ".join(f"{size:.4g}" for size in values) for values in (columns, sizes))
        fact = f"voxels of {here} mm in its sform, of {there} mm in its pixdim"
        raise ImageGeometryError(path, fact, "set both to the size that the scan had")


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
