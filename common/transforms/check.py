"""Load and check: one typed error for each kind of input that is not a usable scan."""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import ImageReader, MetaTensor
from monai.transforms import LoadImaged, MapTransform
from monai.utils import ensure_tuple
from nibabel.filebasedimages import ImageFileError as NibabelImageFileError
from nibabel.spatialimages import HeaderDataError, SpatialImage

from ..errors import ImageFileError, ImageGeometryError, ImageIntensityError, ImageShapeError, UADError

VOXEL_SIZE_MM = (0.1, 20.0)


def source_name(image: MetaTensor) -> str:
    """The file that an image came from, for messages; "image" if it came from memory."""
    return str(image.meta.get("filename_or_obj", "image"))


def voxel_volume_ml(image: MetaTensor) -> float:
    """Volume of one voxel in millilitres."""
    return float(abs(np.linalg.det(np.asarray(image.affine, dtype=float)[:3, :3]))) / 1000


def root_cause(error: BaseException) -> BaseException:
    """The `UADError` inside the RuntimeErrors that MONAI wraps around whatever a transform raises, or the error."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UADError):
            return cause
        cause = cause.__cause__
    return error


class LoadImageCheckedd(LoadImaged):
    """`LoadImaged` for NIfTI whose failures are `ImageFileError`s. The name keeps "LoadImage": MONAI Deploy, which
    brings images from memory, drops transforms by that word."""

    def __init__(self, keys: KeysCollection, allow_missing_keys: bool = False) -> None:
        super().__init__(
            keys,
            reader="NibabelReader",
            image_only=True,
            ensure_channel_first=True,
            allow_missing_keys=allow_missing_keys,
        )

    def __call__(self, data: Mapping[Hashable, Any], reader: ImageReader | None = None) -> dict[Hashable, Any]:
        """Add the images, (C, H, W, D) float32 with their affine; images in memory stay. Raises UADError."""
        result = dict(data)
        for key in self.key_iterator(result):
            path = result[key]
            if isinstance(path, torch.Tensor):
                continue
            try:
                affines = [read_affine(name) for name in ensure_tuple(path)]
                result[key] = self._loader(path, reader)
                # MONAI exchanges an affine that disagrees with the header's voxel sizes, a singular one too
                result[key].affine = affines[0]
            except FileNotFoundError as error:
                raise ImageFileError(path, "no such file", "check the path") from error
            except (EOFError, zlib.error) as error:
                raise ImageFileError(path, "the compressed file is truncated or damaged", "copy it again") from error
            except (NibabelImageFileError, HeaderDataError) as error:
                raise ImageFileError(path, f"not a NIfTI image ({error})", "convert it to NIfTI") from error
            except (OSError, RuntimeError, ValueError) as error:
                cause = str(error).splitlines()[0]
                raise ImageFileError(path, f"cannot be read ({cause})", "check the file and its permissions") from error
        return result


def read_affine(path: str | Path) -> np.ndarray:
    """Voxel to world (RAS, mm), (4, 4), as the header of a file says, which is checked before the voxels are read.

    Raises ImageFileError, ImageGeometryError or ImageIntensityError, and what nibabel raises.
    """
    if Path(path).is_dir():
        raise ImageFileError(path, "a folder without NIfTI files", "give .nii or .nii.gz files, or a folder of them")
    image = nib.load(path)
    if not isinstance(image, SpatialImage):
        raise ImageFileError(path, "not an image of voxels", "convert it to NIfTI")
    dtype = image.get_data_dtype()
    if dtype.fields is not None or dtype.kind == "c":
        raise ImageIntensityError(path, "colour or complex voxels", "convert it to one real number per voxel")
    if isinstance(image, nib.Nifti1Pair) and not (image.header["sform_code"] or image.header["qform_code"]):
        fact = "neither sform nor qform is set, so left and right are unknown"
        raise ImageGeometryError(path, fact, "set one of them in the header")
    return np.asarray(image.affine, dtype=float)


class CheckVolumed(MapTransform):
    """Refuse what is not one finite, non-constant 3D volume with an affine in millimetres.

    Args:
        channels: number of channels expected (images that are stored with 4 dimensions bring more).
    """

    def __init__(self, keys: KeysCollection, channels: int = 1) -> None:
        super().__init__(keys)
        self.channels = channels

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the data as they are. Raises ImageShapeError, ImageGeometryError or ImageIntensityError."""
        for key in self.key_iterator(dict(data)):
            image = data[key]
            check_shape(image, self.channels)
            check_geometry(image)
            check_intensity(image)
        return dict(data)


def check_shape(image: MetaTensor, channels: int) -> None:
    """Three spatial dimensions of at least 2 voxels each, and the expected number of channels."""
    name, shape = source_name(image), tuple(image.shape)
    if image.ndim != 4:
        raise ImageShapeError(name, f"{image.ndim - 1} spatial dimensions, not 3", "give one 3D volume")
    if shape[0] != channels:
        raise ImageShapeError(name, f"{shape[0]} volumes in one file, not {channels}", "give each 3D volume as a file")
    if min(shape[1:]) < 2:
        raise ImageShapeError(name, f"a single slice, shape {shape[1:]}", "give the whole 3D volume")


def check_geometry(image: MetaTensor) -> None:
    """A finite, invertible affine with voxels between 0.1 and 20 mm."""
    name = source_name(image)
    affine = np.asarray(image.affine, dtype=float)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise ImageGeometryError(name, "the affine is singular or not finite", "repair the header's sform or qform")
    size = np.linalg.norm(affine[:3, :3], axis=0)
    if size.min() < VOXEL_SIZE_MM[0] or size.max() > VOXEL_SIZE_MM[1]:
        raise ImageGeometryError(
            name, f"voxels of {np.round(size, 4).tolist()} mm", "repair the header: voxel sizes must be in millimetres"
        )


def check_intensity(image: MetaTensor) -> None:
    """Finite values, not all the same."""
    name = source_name(image)
    if not torch.isfinite(image).all():
        count = int((~torch.isfinite(image)).sum())
        raise ImageIntensityError(name, f"{count} voxels are NaN or infinite", "replace them before detection")
    if image.max() == image.min():
        fact = "all voxels are zero" if image.max() == 0 else f"all voxels are {float(image.max()):g}"
        raise ImageIntensityError(name, fact, "check how the file was written")
