"""What the viewer shows: small enough for a page, at its place, nothing but the pinned program."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest

from common.errors import ResultError
from common.report import viewer
from common.report.viewer import MARGIN_VOXELS, MAX_VOXELS, crop_box, encode, niivue, shrink


def test_many_voxels_are_averaged():
    """So that the page of a scan at half a millimetre is not eight times as large."""
    values, affine = np.zeros((40, 40, 40), np.float32), np.diag([0.5, 0.5, 0.6, 1])
    values[10:20, 20:30, 30:40] = 1
    small, small_affine = shrink(values, affine, max_voxels=20_000)
    assert small.shape == (20, 20, 40)
    assert small.sum() * abs(np.linalg.det(small_affine)) == pytest.approx(values.sum() * np.linalg.det(affine))
    for volume, to_world in ((values, affine), (small, small_affine)):
        centre = nib.affines.apply_affine(to_world, np.argwhere(volume > 0.5)).mean(axis=0)
        assert centre == pytest.approx([7.25, 12.25, 20.7])


def test_size_of_a_brain_of_1_mm():
    """Noise, which no compression makes smaller: three volumes of a brain's box, and what else a page holds."""
    noise = np.random.default_rng(0).random((150, 180, 150), dtype=np.float32)
    i, j, k = np.indices(noise.shape) / np.reshape(noise.shape, (3, 1, 1, 1)) * 2 - 1
    noise[i**2 + j**2 + k**2 > 1] = 0
    assert noise.size < MAX_VOXELS
    assert 3 * len(encode(noise, np.eye(4))) + len(niivue()) + 1_500_000 < 15_000_000


def test_other_niivue_is_refused(monkeypatch, tmp_path):
    (tmp_path / "niivue.umd.js").write_text("alert(1)", encoding="utf-8")
    monkeypatch.setattr(viewer, "STATIC", tmp_path)
    niivue.cache_clear()
    with pytest.raises(ResultError, match="not NiiVue"):
        niivue()
    niivue.cache_clear()


def test_box_around_a_mask_keeps_its_place():
    """With a margin, cut at the border; of an empty mask all of the volume."""
    mask, affine = np.zeros((20, 30, 40), bool), nib.affines.from_matvec(np.diag([2.0, -1.0, 3.0]), [5, 6, 7])
    mask[1:3, 10:12, 20:22] = True
    box, moved = crop_box(mask, affine)
    assert box[0] == slice(0, 3 + MARGIN_VOXELS)
    assert box[1] == slice(10 - MARGIN_VOXELS, 12 + MARGIN_VOXELS)
    inside = np.argwhere(mask[box])
    before, after = nib.affines.apply_affine(affine, np.argwhere(mask)), nib.affines.apply_affine(moved, inside)
    assert np.array_equal(before, after)
    everything, same = crop_box(np.zeros((4, 5, 6), bool), affine)
    assert everything == (slice(0, 4), slice(0, 5), slice(0, 6))
    assert np.array_equal(same, affine)


def test_window_is_never_empty():
    assert viewer._window_top(np.zeros((3, 3, 3), np.float32), np.ones((3, 3, 3), bool)) == 1
    bright = np.arange(1000, dtype=np.float32).reshape(10, 10, 10)
    assert viewer._window_top(bright, bright >= 0) == pytest.approx(994.005)
