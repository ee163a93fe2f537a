"""Brains to MNI152 and back, and the modalities of a subject to each other: SimpleITK estimates, MONAI resamples.

ITK never sees the header of a scan: what it compares lies on upright grids of 2 mm, so that any order of axes, rotation
or shear of a header is exact. World coordinates are RAS in mm all along, for ITK does not ask what its axes mean.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import InvertibleTransform, MapTransform, SpatialCrop, SpatialResample
from monai.utils import ensure_tuple_rep, optional_import
from scipy import ndimage

from ..errors import RegistrationError
from ..images.check import same_grid, source_name, voxel_volume_ml
from ..images.mni import (
    GRID_MM,
    MASK_SIGMA_MM,
    MASK_STEP_MM,
    MIN_DICE,
    Grid,
    as_affine,
    as_matrix,
    centre_of,
    dice,
    mni_grid,
    register,
    template,
    to_itk,
)
from .resample import resample_foreground, smooth

sitk, _ = optional_import("SimpleITK")

# the middle of the grids of FSL at 1 and 2 mm and of the template's versions 2009a and c: who writes there means MNI152
MNI_CENTRES_MM = {
    (182, 218, 182): (0, -17.5, 18.5),
    (91, 109, 91): (0, -18, 18),
    (197, 233, 189): (0, -18, 22),
    (193, 229, 193): (0, -18, 18),
}
RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])

MARGIN_MM = 10.0  # of background, so that the rim of the brain guides the estimate
RIM_VOXELS = 2
INFORMATION_STEP_MM = 2.0  # longest first step
# plausible: adult brains are 0.8 to 1 times as large as the template's along an axis, infants' 0.6
SCALES = (0.6, 1.6)
# already in MNI152: the estimate moves nothing by more than a voxel, or the grid is a usual one and the brains overlap
RECOGNISED_MM = 2.0
# plausible between scans of one session, in which the patient may have moved
MAX_ROTATION_DEG = 45.0
MAX_SHIFT_MM = 60.0
MIN_INFORMATION = 0.1  # nats; 0.2 and more where two scans match, see scripts/measure_registration.py


def mni_transform(image: MetaTensor, brain: MetaTensor) -> np.ndarray:
    """Estimate the affine from the world of a brain to MNI152, (4, 4), RAS mm; the same one every time.

    The masks, which have no contrast, are matched by mean squares, first similar, then affine; then the intensities
    inside by mutual information (Mattes et al., 2003), so that any modality will do.

    image: (C, H, W, D), of which the first channel counts. brain: (1, H, W, D), above 0 inside, on the same grid.
    Raises RegistrationError where the brains do not overlap afterwards or the scale is none of a brain.
    """
    target, target_brain = template()
    inside, tissue = upright_brain(image, brain)
    to_scan = sitk.Similarity3DTransform()
    to_scan.SetCenter(centre_of(target_brain).tolist())
    to_scan.SetTranslation((centre_of(brain) - to_scan.GetCenter()).tolist())
    to_scan.SetScale(np.cbrt(brain_ml(brain) / brain_ml(target_brain)).item())
    rim = sitk.BinaryDilate(sitk.Cast(to_itk(target_brain), sitk.sitkUInt8), [RIM_VOXELS] * 3)
    try:
        masks = to_itk(target_brain, MASK_SIGMA_MM), to_itk(inside, MASK_SIGMA_MM)
        register(*masks, to_scan, shrink=(4,), step_mm=MASK_STEP_MM, information=False)
        to_scan = as_affine(to_scan)
        register(*masks, to_scan, shrink=(4, 2), step_mm=MASK_STEP_MM, information=False)
        _check_mni(as_matrix(to_scan), image, inside)  # what is no brain takes the next step long
        register(to_itk(target), to_itk(tissue), to_scan, shrink=(3, 2, 1), step_mm=INFORMATION_STEP_MM, mask=rim)
    except RuntimeError as error:
        raise _failed(image, "MNI152", str(error).strip().splitlines()[-1]) from error
    _check_mni(as_matrix(to_scan), image, inside)
    return np.linalg.inv(as_matrix(to_scan))


def is_mni(image: MetaTensor, brain: MetaTensor, to_mni: np.ndarray) -> bool:
    """Whether a brain is in MNI152 as it is: the estimate hardly moves it, or it was written on the template's grid.

    Registered by another program it may differ by more than a voxel: its grid says what was meant, but not if it was
    registered rigidly and is as small as it was.
    """
    points = world_points(brain)
    if np.linalg.norm(nib.affines.apply_affine(to_mni, points) - points, axis=1).max() <= RECOGNISED_MM:
        return True
    affine, shape = np.asarray(image.affine, dtype=float), tuple(image.shape[1:])
    upright_axes = np.allclose(np.abs(affine[:3, :3]), np.eye(3) * voxel_volume_ml(image) ** (1 / 3) * 10, atol=1e-3)
    if not upright_axes or shape not in MNI_CENTRES_MM:
        return False
    centre = nib.affines.apply_affine(affine, (np.array(shape) - 1) / 2)
    there, here = onto(template()[1], (affine, shape)).as_tensor() >= 0.5, brain.as_tensor() > 0
    return bool(np.abs(centre - MNI_CENTRES_MM[shape]).max() <= GRID_MM and dice(there, here) >= MIN_DICE)


def align_to(first: MetaTensor, other: MetaTensor) -> MetaTensor:
    """Bring another scan of the same session onto the grid of the first: rigidly, by mutual information.

    first: (C, H, W, D), of which the first channel counts; other: (1, h, w, d); with or without skull.
    Returns (1, H, W, D) float32, in the units of `other` and 0 where it saw nothing, by one resampling; `other` itself
    if on the same grid. Raises RegistrationError where they do not match, or only by an implausible movement.
    """
    grid = np.asarray(first.affine, dtype=float), tuple(first.shape[1:])
    if same_grid(other, first):
        return other
    fixed, moving = (to_itk(upright(image)) for image in (first, other))
    to_other = sitk.Euler3DTransform()  # starts where the headers say: scans of one session nearly agree
    to_other.SetCenter(nib.affines.apply_affine(grid[0], (np.array(grid[1]) - 1) / 2).tolist())
    try:
        information = -register(fixed, moving, to_other, shrink=(4, 2), step_mm=INFORMATION_STEP_MM)
    except RuntimeError as error:
        raise _failed(other, source_name(first), str(error).strip().splitlines()[-1]) from error
    turn = np.degrees(np.arccos(np.clip((np.trace(as_matrix(to_other)[:3, :3]) - 1) / 2, -1, 1)))
    shift = np.linalg.norm(to_other.GetTranslation())
    if turn > MAX_ROTATION_DEG or shift > MAX_SHIFT_MM:
        raise _failed(other, source_name(first), f"it would have to move by {turn:.0f} degrees and {shift:.0f} mm")
    if information < MIN_INFORMATION:
        raise _failed(other, source_name(first), f"they share {information:.2f} nats of information")
    moved = MetaTensor(other.as_tensor(), meta=dict(other.meta))
    moved.affine = torch.from_numpy(np.linalg.inv(as_matrix(to_other)) @ np.asarray(other.affine, dtype=float))
    return onto(moved, grid)


def write_tfm(to_mni: np.ndarray, path: str | Path) -> None:
    """Write a world-to-MNI affine (4, 4), RAS mm, as an ITK transform that SimpleITK, ANTs and 3D Slicer read.

    ITK's transforms map points of the fixed image to the moving one, in LPS: the file maps MNI152 to the scan, which is
    what `sitk.Resample(scan, mni, transform)` and `antsApplyTransforms -r mni -t to_mni.tfm` expect.
    """
    matrix = RAS_TO_LPS @ np.linalg.inv(to_mni) @ RAS_TO_LPS
    transform = sitk.AffineTransform(matrix[:3, :3].ravel().tolist(), matrix[:3, 3].tolist())
    sitk.WriteTransform(transform, str(path))


class RegisterToMNI(InvertibleTransform):
    """Bring a brain (C, H, W, D) onto the grid of MNI152 by one resampling; a brain that is there stays in its place.

    The inverse brings the image, or any volume of that grid that carries its history, back onto the image's own grid by
    one resampling, with its very affine. `meta["to_mni"]` keeps the matrix: world of the image to MNI152, RAS mm.

    Args:
        spacing_mm: isotropic spacing of the grid, see `mni_grid`.
        mode: "bilinear", or "nearest" for labels; of both directions.
    """

    def __init__(self, spacing_mm: float = 1.0, mode: str = "bilinear") -> None:
        self.spacing_mm = spacing_mm
        self.mode = mode
        self.resample = SpatialResample(mode=mode, padding_mode="zeros")

    def __call__(
        self,
        image: MetaTensor,
        brain: MetaTensor | None = None,
        to_mni: np.ndarray | None = None,
        mode: str | None = None,
    ) -> MetaTensor:
        """Return the image (C, *mni_grid) float32. Raises RegistrationError.

        brain: its mask (1, H, W, D), by default where the first channel is not 0. to_mni: a matrix known already.
        """
        if to_mni is None:
            foreground = MetaTensor(image.as_tensor()[:1] != 0, affine=image.affine)
            to_mni = self.estimate(image, foreground if brain is None else brain)
        mode = mode or self.mode
        moved = MetaTensor(image.as_tensor(), meta=dict(image.meta), applied_operations=list(image.applied_operations))
        affine = np.asarray(image.affine, dtype=float)
        self.push_transform(moved, extra_info={"affine": affine})
        moved.affine = torch.from_numpy(to_mni @ affine)
        moved.meta["to_mni"] = to_mni
        target, shape = mni_grid(self.spacing_mm)
        fine = moved if mode == "nearest" else smooth(moved, (self.spacing_mm,) * 3)
        return cast(MetaTensor, self.resample(fine, dst_affine=torch.from_numpy(target), spatial_size=shape, mode=mode))

    @staticmethod
    def estimate(image: MetaTensor, brain: MetaTensor) -> np.ndarray:
        """World of the image to MNI152, (4, 4): the identity for an image that is there. Raises RegistrationError."""
        to_mni = mni_transform(image, brain)
        return np.eye(4) if is_mni(image, brain, to_mni) else to_mni

    def inverse(self, data: MetaTensor) -> MetaTensor:
        """Return a volume of the MNI grid on the grid of the image that it belongs to."""
        result = cast(MetaTensor, self.resample.inverse(data))
        result.affine = torch.from_numpy(self.pop_transform(result)["extra_info"]["affine"])
        result.meta.pop("to_mni", None)
        return result


class RegisterToMNId(MapTransform, InvertibleTransform):
    """Dictionary version of `RegisterToMNI`, with the rim and the background of `ResampleForegroundd`.

    Adds `to_mni`, (4, 4): world of the images to MNI152, RAS mm.

    Args:
        keys: images (C, H, W, D) on one grid; the first is registered and the others move along.
        foreground_key: their brain (1, H, W, D), resampled along with them.
        spacing_mm: isotropic spacing of the grid.
        mode: "bilinear", or "nearest" for labels; one for all keys or one for each.
    """

    def __init__(
        self, keys: KeysCollection, foreground_key: str, spacing_mm: float = 1.0, mode: str | Sequence[str] = "bilinear"
    ) -> None:
        super().__init__(keys)
        self.foreground_key = foreground_key
        self.mode = ensure_tuple_rep(mode, len(self.keys))
        self.register = RegisterToMNI(spacing_mm)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the data with images and foreground on the MNI grid. Raises RegistrationError."""
        result = dict(data)
        foreground = result[self.foreground_key]
        to_mni = self.register.estimate(result[self.keys[0]], foreground)
        images = {}
        for key, mode in self.key_iterator(result, self.mode):
            if mode == "nearest":
                result[key] = self.register(result[key], to_mni=to_mni, mode=mode)
            else:
                images[key] = result[key]
        moved = resample_foreground(
            images, self.foreground_key, foreground, lambda image: self.register(image, to_mni=to_mni)
        )
        return result | moved | {"to_mni": to_mni}

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Bring the keys back to their grid before the transform."""
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = self.register.inverse(result[key])
        return result


def upright_brain(image: MetaTensor, brain: MetaTensor) -> tuple[MetaTensor, MetaTensor]:
    """Mask and tissue of a brain, both (1, h, w, d), on the upright grid around it; bright voxels are clipped."""
    box = ndimage.find_objects((brain.as_tensor()[0] > 0).numpy().astype(np.uint8))[0]
    crop = SpatialCrop(roi_slices=[slice(max(side.start - 2, 0), side.stop + 2) for side in box])
    near = cast(MetaTensor, crop(MetaTensor((brain.as_tensor() > 0).float(), affine=brain.affine)))
    values = cast(MetaTensor, crop(image.as_tensor()[:1].to(torch.float32))).as_tensor() * near.as_tensor()
    top = np.percentile(values[near.as_tensor() > 0].double().numpy(), 99)  # or few bright voxels would take most bins
    grid = upright_grid(world_points(near), MARGIN_MM)
    return onto(near, grid), onto(MetaTensor(values.clamp(max=float(top)), affine=near.affine), grid)


def upright(image: MetaTensor) -> MetaTensor:
    """The first channel of (C, H, W, D) on the upright grid around all of it, (1, h, w, d); bright voxels clipped."""
    values = image.as_tensor()[:1].to(torch.float32)
    top = np.percentile(values[values > values.min()].double().numpy(), 99)
    corners = np.indices((2, 2, 2)).reshape(3, -1).T * (np.array(image.shape[1:]) - 1)
    points = nib.affines.apply_affine(np.asarray(image.affine, dtype=float), corners)
    return onto(MetaTensor(values.clamp(max=float(top)), affine=image.affine), upright_grid(points, margin_mm=0))


def upright_grid(points: np.ndarray, margin_mm: float) -> Grid:
    """The RAS grid that holds points (N, 3), mm, and a margin."""
    low, high = points.min(axis=0) - margin_mm, points.max(axis=0) + margin_mm
    shape = np.ceil((high - low) / GRID_MM).astype(int) + 1
    return nib.affines.from_matvec(np.eye(3) * GRID_MM, low), tuple(shape.tolist())


def onto(image: MetaTensor, grid: Grid) -> MetaTensor:
    """(C, H, W, D) resampled onto a grid, float32, 0 outside; smoothed first where that grid is coarser."""
    affine, shape = grid
    fine = smooth(cast(MetaTensor, image.to(torch.float32)), np.linalg.norm(affine[:3, :3], axis=0).tolist())
    resample = SpatialResample(mode="bilinear", padding_mode="zeros", dtype=None)
    result = cast(MetaTensor, resample(fine, dst_affine=torch.from_numpy(affine), spatial_size=shape))
    result.affine = torch.from_numpy(affine)  # MONAI's is off by a rounding error
    return result


def world_points(mask: MetaTensor) -> np.ndarray:
    """The centres of the voxels above 0 of a mask (1, H, W, D): (N, 3), RAS mm."""
    return nib.affines.apply_affine(np.asarray(mask.affine, dtype=float), np.argwhere(mask.as_tensor()[0].numpy() > 0))


def brain_ml(mask: MetaTensor) -> float:
    """Volume of a mask in millilitres."""
    return float((mask.as_tensor() > 0).sum()) * voxel_volume_ml(mask)


def mni_overlap(brain: MetaTensor, to_mni: np.ndarray) -> float:
    """Dice of a brain, (1, H, W, D) of 0 to 1, brought to MNI152 by (4, 4) RAS mm, and that of the template."""
    target = template()[1]
    moved = MetaTensor(brain.as_tensor(), affine=to_mni @ np.asarray(brain.affine))
    there = onto(moved, (np.asarray(target.affine), tuple(target.shape[1:]))).as_tensor() >= 0.5
    return dice(there, target.as_tensor() > 0)


def _check_mni(to_scan: np.ndarray, image: MetaTensor, inside: MetaTensor) -> None:
    to_mni = np.linalg.inv(to_scan)
    scales = np.linalg.svd(to_mni[:3, :3], compute_uv=False)
    if np.linalg.det(to_mni[:3, :3]) < 0 or scales.min() < SCALES[0] or scales.max() > SCALES[1]:
        raise _failed(image, "MNI152", f"the estimate scales by {scales.min():.2f} to {scales.max():.2f}, or mirrors")
    if (overlap := mni_overlap(inside, to_mni)) < MIN_DICE:
        raise _failed(image, "MNI152", f"brain and template overlap by a Dice of {overlap:.2f} only")


def _failed(image: MetaTensor, target: str, fact: str) -> RegistrationError:
    remedy = "check orientation and brain mask in a viewer, or register it beforehand"
    return RegistrationError(source_name(image), f"cannot be registered to {target}: {fact}", remedy)
