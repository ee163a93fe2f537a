"""Lesions of a given share of the brain."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest

from common.images.mni import template


@pytest.mark.parametrize("share", [0.02, 0.3])
def test_mask_has_its_share_in_its_hemisphere(load_script, tmp_path, share):
    grown_mask = load_script("measure_abnormal_share").grown_mask
    image, brain = template()
    inside = brain[0].numpy() > 0
    mask = np.zeros(inside.shape, np.uint8)
    world = nib.affines.apply_affine(np.asarray(image.affine), np.argwhere(np.ones_like(mask))).reshape(*mask.shape, 3)
    mask[np.linalg.norm(world - [-35, -20, 10], axis=-1) < 12] = 1
    nib.save(nib.Nifti1Image(mask, np.asarray(image.affine)), tmp_path / "mask.nii.gz")
    grown, affine = grown_mask(tmp_path / "mask.nii.gz", share)
    assert np.array_equal(affine, np.asarray(image.affine))
    lesion = grown > 0
    assert not (lesion & ~inside).any()
    assert (world[lesion][:, 0] < 0).all()
    assert lesion.sum() / inside.sum() == pytest.approx(share, rel=0.02)
    if share < mask.sum() / inside.sum():
        assert not (lesion & (mask == 0)).any()
    else:
        assert not ((mask > 0) & inside & ~lesion).any()
