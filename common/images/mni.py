"""The space of MNI152: its template, its grids, and SimpleITK's estimate of where another image lies in it.

World coordinates are RAS in mm all along, for ITK does not ask what its axes mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.utils import optional_import
from scipy import ndimage

sitk, _ = optional_import("SimpleITK")

TEMPLATE = Path(__file__).parent / "template" / "mni152_T1_2mm.nii.gz"
MNI_BOX_MM = np.array([182, 218, 182])  # with its corner, the grid of FSL's MNI152
MNI_CORNER_MM = np.array([-90, -126, -72])

GRID_MM = 2.0  # of the estimation, as of the template
MASK_SIGMA_MM = 4.0  # of a mask that is registered: a smooth edge is felt from afar
MASK_STEP_MM = 4.0  # longest first step of masks: a longer one can turn a brain upside down
HISTOGRAM_BINS = 32
MIN_DICE = 0.85  # of a brain that was brought to MNI152, and the template

Grid = tuple[np.ndarray, tuple[int, ...]]  # affine (4, 4) and shape


@cache
def template() -> tuple[MetaTensor, MetaTensor]:
    """MNI152 T1 without skull at 2 mm, and its brain: both (1, H, W, D) float32."""
    file = nib.Nifti1Image.from_filename(TEMPLATE)
    volume = torch.from_numpy(file.get_fdata(dtype=np.float32))[None]
    return MetaTensor(volume, affine=file.affine), MetaTensor((volume > 0).float(), affine=file.affine)


def mni_grid(spacing_mm: float) -> Grid:
    """The RAS grid of MNI152; at 1 and 2 mm it is FSL's but for the direction of the first axis."""
    shape = np.ceil(MNI_BOX_MM / spacing_mm - 1e-6).astype(int)
    return nib.affines.from_matvec(np.eye(3) * spacing_mm, MNI_CORNER_MM), tuple(shape.tolist())


def register(
    fixed: Any,
    moving: Any,
    transform: Any,
    shrink: Sequence[int],
    step_mm: float,
    information: bool = True,
    mask: Any = None,
) -> float:
    """Optimise a SimpleITK transform (fixed to moving) in place, coarse to fine, and return the metric.

    All voxels count, on one thread: neither a seed nor the number of cores changes the order of the sums.

    Args:
        shrink: factor of each level.
        step_mm: bound of the first step.
        information: minus the mutual information, else mean squares.
        mask: where the fixed image counts.
    """
    method = sitk.ImageRegistrationMethod()
    method.SetNumberOfThreads(1)
    method.SetNumberOfWorkUnits(1)
    if information:
        method.SetMetricAsMattesMutualInformation(HISTOGRAM_BINS)
    else:
        method.SetMetricAsMeanSquares()
    if mask is not None:
        method.SetMetricFixedMask(mask)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=1.0,
        minStep=1e-3,
        numberOfIterations=100,
        gradientMagnitudeTolerance=1e-8,
        estimateLearningRate=method.Once,
        maximumStepSizeInPhysicalUnits=step_mm,
    )
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel(list(shrink))
    method.SetSmoothingSigmasPerLevel([GRID_MM * (factor - 1) / 2 for factor in shrink])
    method.SetInitialTransform(transform, inPlace=True)
    method.Execute(fixed, moving)
    return float(method.GetMetricValue())


def to_itk(image: MetaTensor, sigma_mm: float = 0.0) -> Any:
    """(1, H, W, D) on an upright grid as a SimpleITK image, smoothed."""
    affine = np.asarray(image.affine, dtype=float)
    spacing = np.diag(affine)[:3]
    volume = ndimage.gaussian_filter(image.as_tensor()[0].numpy().astype(np.float32), sigma_mm / spacing)
    result = sitk.GetImageFromArray(np.ascontiguousarray(volume.T))
    result.SetSpacing(spacing.tolist())
    result.SetOrigin(affine[:3, 3].tolist())
    return result


def as_affine(transform: Any) -> Any:
    """A SimpleITK transform with a matrix as an affine one."""
    result = sitk.AffineTransform(3)
    result.SetCenter(transform.GetCenter())
    result.SetMatrix(transform.GetMatrix())
    result.SetTranslation(transform.GetTranslation())
    return result


def as_matrix(transform: Any) -> np.ndarray:
    """A SimpleITK transform with a matrix as (4, 4)."""
    matrix, centre = np.reshape(transform.GetMatrix(), (3, 3)), np.array(transform.GetCenter())
    return nib.affines.from_matvec(matrix, centre + transform.GetTranslation() - matrix @ centre)


def centre_of(mask: MetaTensor) -> np.ndarray:
    """The centre of a mask (1, H, W, D), (3,), RAS mm, by a sum of whole numbers, which is exact in any order."""
    voxels = np.argwhere(mask.as_tensor()[0].numpy() > 0)
    return nib.affines.apply_affine(np.asarray(mask.affine, dtype=float), voxels.sum(axis=0) / len(voxels))


def dice(a: torch.Tensor, b: torch.Tensor) -> float:
    """Overlap of two bool masks of one shape."""
    return 2 * float((a & b).sum()) / float(a.sum() + b.sum())
