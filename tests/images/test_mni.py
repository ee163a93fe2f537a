"""The space of MNI152: the template, its grids, and the estimate of where a mask lies in it."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - its own name for itself
import torch
from monai.data import MetaTensor

from common.images.mni import as_affine, as_matrix, dice, mni_grid, register, template, to_itk


def test_the_grids_have_one_corner_and_hold_the_template():
    for spacing_mm, shape in ((1.0, (182, 218, 182)), (2.0, (91, 109, 91)), (4.0, (46, 55, 46))):
        affine, size = mni_grid(spacing_mm)
        assert size == shape
        assert affine[:3, 3].tolist() == [-90, -126, -72]
        points = nib.affines.apply_affine(template()[1].affine, np.argwhere(template()[1].numpy()[0] > 0))
        voxels = nib.affines.apply_affine(np.linalg.inv(affine), points)
        assert (voxels >= -0.5).all()
        assert (voxels <= np.array(size) - 0.5).all()


def test_a_mask_is_found_where_it_was_put():
    brain = template()[1]
    moved = MetaTensor(
        brain.as_tensor(), affine=nib.affines.from_matvec(np.eye(3), (5.0, -4.0, 3.0)) @ brain.affine.numpy()
    )
    found = sitk.Euler3DTransform()
    error = register(to_itk(brain, 4.0), to_itk(moved, 4.0), found, shrink=(4,), step_mm=4.0, information=False)
    np.testing.assert_allclose(as_matrix(found)[:3, 3], (5.0, -4.0, 3.0), atol=0.3)
    assert error < 1e-3
    np.testing.assert_allclose(as_matrix(as_affine(found)), as_matrix(found), atol=1e-9)


def test_dice():
    a, b = torch.tensor([True, True, False]), torch.tensor([True, False, False])
    assert dice(a, b) == pytest.approx(2 / 3)
