"""Where a brain lies in MNI152: by its box or by its mask, and what is carried there, back, and to the other side."""

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.spatial.transform import Rotation

from common.detection import alignment
from common.detection.alignment import MIRROR, by_boxes, by_registration, from_atlas, mirrored, to_atlas
from common.images.background import box_of
from common.images.mni import mni_grid, template

SIDE = 96  # of the grid that the networks see


def turned_brain(angles_deg, scale=0.9, shift=0.0):
    """The brain of the template, turned and scaled on a grid of 2 mm, and its true matrix to MNI152."""
    target, grid = template()[1].numpy()[0], np.asarray(template()[1].affine)
    turn = Rotation.from_euler("xyz", angles_deg, degrees=True).as_matrix() / scale * 2.0
    middle = nib.affines.apply_affine(grid, np.argwhere(target).mean(axis=0))
    to_mni = nib.affines.from_matvec(turn, middle - turn @ (np.full(3, SIDE / 2 - 0.5) + shift))
    brain = ndimage.affine_transform(target, np.linalg.inv(grid) @ to_mni, output_shape=(SIDE,) * 3, order=1) >= 0.5
    return brain, to_mni


def error_mm(found, true, brain):
    """The mean distance of where the voxels of a brain are found from where they are."""
    points = np.argwhere(brain)[::50]
    there, here = (nib.affines.apply_affine(matrix, points) for matrix in (found, true))
    return float(np.linalg.norm(there - here, axis=1).mean())


@pytest.mark.parametrize("angles", [(0, 0, 0), (8, 0, 0), (-6, 4, 5)])
def test_the_registration_finds_a_turned_brain_and_boxes_do_not(angles):
    brain, true = turned_brain(angles, shift=(2, -1, 1))
    assert error_mm(by_registration(brain), true, brain) < 1.5
    if any(angles):
        assert error_mm(by_boxes(brain), true, brain) > 3.0


def test_the_same_brain_has_the_same_place_every_time():
    brain, _ = turned_brain((5, 3, 0))
    first = by_registration(brain).copy()
    alignment._registered.cache_clear()
    assert np.array_equal(by_registration(brain.copy()), first)


@pytest.mark.parametrize("shape", [(40, 50, 4), (1, 30, 30), (3, 3, 3)])
def test_what_is_no_whole_brain_is_placed_by_its_box(shape):
    brain = np.zeros((60, 60, 60), dtype=bool)
    brain[tuple(slice(5, 5 + side) for side in shape)] = True
    assert np.array_equal(by_registration(brain), by_boxes(brain))


def test_the_boxes_have_the_same_sides_and_the_middle_lies_between_left_and_right():
    brain, _ = turned_brain((0, 0, 0), scale=0.7)
    target, grid = template()[1].numpy()[0] > 0, np.asarray(template()[1].affine)
    here, there = (
        np.array([(side.start - 0.5, side.stop - 0.5) for side in box_of(mask)]).T for mask in (brain, target)
    )
    found, expected = (nib.affines.apply_affine(by_boxes(brain), here), nib.affines.apply_affine(grid, there))
    np.testing.assert_allclose(np.diff(found, axis=0), np.diff(expected, axis=0))
    np.testing.assert_allclose(found[:, 1:], expected[:, 1:])
    assert found[:, 0].sum() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("spacing_mm", [4.0, 2.0])
@pytest.mark.parametrize("align", [by_boxes, by_registration])
def test_a_volume_carried_to_the_atlas_and_back_is_the_smoothed_volume(align, spacing_mm):
    brain, _ = turned_brain((0, 0, 0))
    ramp = np.linspace(0.1, 0.7, SIDE)[None, :, None]
    volumes = np.stack([np.broadcast_to(values, brain.shape) for values in (ramp, 1 - ramp)]) * brain
    to_mni = align(brain)
    total, count = (to_atlas(x.astype(np.float32), to_mni, spacing_mm) for x in (volumes, brain[None]))
    assert total.shape == (2, *mni_grid(spacing_mm)[1])
    back = from_atlas(total / count.clamp(min=1e-6), to_mni, brain.shape, spacing_mm)
    inside = ndimage.binary_erosion(brain, iterations=3)
    assert np.abs(back - volumes)[:, inside].mean() < 0.01


def test_the_other_side_of_a_turned_brain():
    brain, true = turned_brain((0, 10, 8))
    place = np.round(nib.affines.apply_affine(np.linalg.inv(true), (30.0, -20.0, 20.0))).astype(int)
    other = np.round(nib.affines.apply_affine(np.linalg.inv(true) @ MIRROR @ true, place)).astype(int)
    values = np.zeros(brain.shape, np.float32)
    values[tuple(slice(x - 2, x + 3) for x in place)] = 1.0
    assert mirrored(values, by_registration(brain))[tuple(other)] > 0.5
    assert mirrored(values, by_boxes(brain))[tuple(other)] < 0.5


def test_an_empty_brain_has_no_place():
    with pytest.raises(ValueError, match="the foreground is empty"):
        by_boxes(np.zeros((4, 4, 4), dtype=bool))
    assert torch.isfinite(torch.from_numpy(by_boxes(np.ones((4, 4, 4), dtype=bool)))).all()
