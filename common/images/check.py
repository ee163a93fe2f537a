"""Check what was loaded: one typed error for each kind of image that is not a usable scan."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

from ..errors import ImageGeometryError, ImageIntensityError, ImageShapeError, UADError
from ..type_check import setting_error
from .background import background

VOXEL_SIZE_MM = (0.1, 20.0)
MAX_SHEAR = 0.02  # cosine between axes: about 1 degree, above what rounding in a header does
# a mask has 1 grey value beside its background, brains of 8 bit have 90 and more; of the neighbours in label maps of 18
# to 52 labels 76 to 100 % are the same, of those in scans (T1, FLAIR, CT, 8 bit and more) 0 to 32 %
MIN_GREYS = 8
MAX_SAME = 0.7


def source_name(image: MetaTensor) -> str:
    """The file that an image came from, for messages; "image" if it came from memory."""
    return str(image.meta.get("filename_or_obj", "image"))


def voxel_volume_ml(image: MetaTensor) -> float:
    """Volume of one voxel in millilitres."""
    return float(abs(np.linalg.det(np.asarray(image.affine, dtype=float)[:3, :3]))) / 1000


def same_grid(a: MetaTensor, b: MetaTensor) -> bool:
    """Whether two images (C, H, W, D) have the same voxels, whatever their channels."""
    return a.shape[1:] == b.shape[1:] and np.allclose(a.affine, b.affine, atol=1e-3)


def root_cause(error: BaseException) -> BaseException:
    """The `UADError` inside the RuntimeErrors that MONAI wraps around whatever a transform raises, or the error.

    A SettingError where a config holds what its objects cannot be made of.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UADError):
            return cause
        cause = cause.__cause__
    return setting_error(error) or error


@contextmanager
def typed_errors() -> Iterator[None]:
    """Raise the UADError inside MONAI's RuntimeErrors, where an input is to blame."""
    try:
        yield
    except Exception as error:
        cause = root_cause(error)
        if cause is error:
            raise
        raise cause from None


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
        raise ImageShapeError(name, f"{shape[0]} volumes, not {channels}", "give one 3D volume for each modality")
    if min(shape[1:]) < 2:
        raise ImageShapeError(name, f"a single slice, shape {shape[1:]}", "give the whole 3D volume")


def check_geometry(image: MetaTensor) -> None:
    """A finite, invertible affine with axes at right angles and voxels between 0.1 and 20 mm."""
    name = source_name(image)
    affine = np.asarray(image.affine, dtype=float)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise ImageGeometryError(name, "the affine is singular or not finite", "repair the header's sform or qform")
    size = np.linalg.norm(affine[:3, :3], axis=0)
    if size.min() < VOXEL_SIZE_MM[0] or size.max() > VOXEL_SIZE_MM[1]:
        raise ImageGeometryError(
            name, f"voxels of {np.round(size, 4).tolist()} mm", "repair the header: voxel sizes must be in millimetres"
        )
    axes = affine[:3, :3] / size
    shear = np.abs(axes.T @ axes - np.eye(3)).max()
    if shear > MAX_SHEAR:
        angle = np.degrees(np.arccos(min(shear, 1)))
        fact = f"the axes are sheared, {angle:.0f} degrees apart"
        raise ImageGeometryError(name, fact, "resample it to axes at right angles")


def check_intensity(image: MetaTensor) -> None:
    """Finite values, not all the same, and grey values of a scan rather than numbers of labels."""
    name = source_name(image)
    if not torch.isfinite(image).all():
        count = int((~torch.isfinite(image)).sum())
        raise ImageIntensityError(name, f"{count} voxels are NaN or infinite", "replace them before detection")
    if image.max() == image.min():
        fact = "all voxels are zero" if image.max() == 0 else f"all voxels are {float(image.max()):g}"
        raise ImageIntensityError(name, fact, "check how the file was written")
    for channel in image.as_tensor().cpu().numpy():
        check_greys(channel, name)


def check_greys(channel: np.ndarray, name: str) -> None:
    """Refuse a mask or a label map, (H, W, D): in a scan, few neighbours have the same grey value."""
    inside = channel != background(channel[None])[0]
    if not inside.any():
        return  # an empty channel beside others is spoken of where it matters
    greys, same, pairs = len(np.unique(channel[inside])), 0, 0
    for axis in range(channel.ndim):
        here, there = (np.moveaxis(x, axis, 0) for x in (channel, inside))
        both = there[1:] & there[:-1]
        pairs += int(both.sum())
        same += int((both & (here[1:] == here[:-1])).sum())
    remedy = "give the scan itself"
    if greys < MIN_GREYS:
        fact = f"{greys} grey values beside the background: a mask or a label map"
        raise ImageIntensityError(name, fact, remedy)
    if same > MAX_SAME * pairs:
        fact = f"{same / pairs:.0%} of the neighbouring voxels have the same grey value, as in a mask or a label map"
        raise ImageIntensityError(name, fact, remedy)
