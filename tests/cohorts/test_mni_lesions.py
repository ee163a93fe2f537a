"""Real masks in a brain: a cavity is CSF, an acute stroke is mild, and what was fluid before is no lesion."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from common.cohorts.mni_lesions import atlas_ml, csf_level, fill, mni_weight
from common.cohorts.synthetic_lesions import InsertLesions

AFFINE = nib.affines.from_matvec(np.diag([2.0, 2.0, 2.0]), (-60, -60, -60))
FLUID, TISSUE = 50.0, 200.0


@pytest.fixture
def brain():
    """A ball of 50 mm radius: tissue with a ventricle of 12 mm radius in its middle; image (1, H, W, D) and mask."""
    rng = np.random.RandomState(0)
    radius = np.linalg.norm(2.0 * (np.indices((61, 61, 61)) - 30), axis=0)
    inside = radius < 50
    volume = np.where(radius < 12, FLUID, TISSUE) + 2 * rng.normal(size=inside.shape)
    return np.where(inside, volume, 0).astype(np.float32)[None], inside


def box(low, high):
    """A mask of 1 mm voxels between two corners in mm, and its affine."""
    mask = np.zeros((121, 121, 121), bool)
    mask[tuple(slice(60 + a, 60 + b) for a, b in zip(low, high, strict=True))] = True
    return mask, nib.affines.from_matvec(np.eye(3), (-60, -60, -60))


def lesion(kind, brain, atlas, seed=0):
    """The image with the lesion of a mask that is already in the brain's own space, and the label: (H, W, D)."""
    insert = InsertLesions(kind, seed, atlas_mask=atlas[0], atlas_affine=atlas[1], mni_to_subject=np.eye(4))
    image, label = insert(brain[0], brain[1][None], AFFINE)
    return image[0], label[0] > 0


def test_csf_is_that_of_the_ventricle_in_each_channel_and_not_the_dark_rim(brain):
    volume, inside = brain
    rim = inside & ~ndimage.binary_erosion(inside, iterations=2)
    dark = np.where(rim, 5.0, volume)
    both = np.concatenate([dark, 1000 - dark])
    assert csf_level(both, inside, AFFINE) == pytest.approx([FLUID, 1000 - FLUID], abs=5)
    with pytest.raises(ValueError, match="No part of the brain is deeper than 10 mm"):
        csf_level(volume, rim, AFFINE)


def test_a_cavity_is_the_subjects_csf_but_not_flat(brain):
    image, label = lesion("chronic_stroke", brain, box((-35, -15, -15), (-15, 15, 15)))
    core = ndimage.binary_erosion(label, iterations=2)
    assert np.median(image[core]) == pytest.approx(FLUID, rel=0.1)
    assert 0.03 * FLUID < image[core].std() < 0.4 * FLUID
    assert image[core].min() > 0


def test_an_acute_stroke_darkens_mildly_and_its_border_is_softer_than_a_cavitys(brain):
    volume, inside = brain
    flat = np.where(inside, np.where(volume[0] < 100, FLUID, TISSUE), 0)[None]
    atlas = box((-35, -15, -15), (-15, 15, 15))
    factors = []
    for seed in range(4):
        image, label = lesion("acute_stroke", (flat, inside), atlas, seed)
        factors.append(np.median(image[ndimage.binary_erosion(label, iterations=3)]) / TISSUE)
    assert min(factors) >= 0.75 and max(factors) <= 0.92 and np.ptp(factors) > 0.01
    soft, hard = (
        (lambda w: ((w > 0.1) & (w < 0.9)).sum())(mni_weight(atlas, flat, inside, AFFINE, np.eye(4), kind, mm)[0])
        for kind, mm in (("acute_stroke", 4.0), ("chronic_stroke", 2.0))
    )
    assert soft > 1.5 * hard


@pytest.mark.parametrize("kind", ["chronic_stroke", "acute_stroke", "atlas"])
def test_the_ventricle_is_not_labelled(kind, brain):
    _, label = lesion(kind, brain, box((-30, -10, -10), (0, 10, 10)))
    ventricle = brain[0][0] < 100
    assert label.any() and not label[ventricle].any()


def test_a_sulcus_within_a_cavity_belongs_to_it_and_not_to_an_acute_stroke(brain):
    volume, inside = brain
    volume[0, 15:24, 30, 20:40] = FLUID  # 2 mm wide
    atlas = box((-35, -15, -15), (-15, 15, 15))
    labels = {kind: lesion(kind, (volume, inside), atlas)[1] for kind in ("chronic_stroke", "acute_stroke")}
    assert labels["chronic_stroke"][18, 30, 28] and not labels["acute_stroke"][18, 30, 28]


def test_of_several_masks_one_that_lies_in_the_brain_is_taken(brain, tmp_path):
    paths = []
    for name, corner in (("far", 52), ("near", -30)):
        mask, affine = box((corner,) * 3, (corner + 8,) * 3)
        paths.append(tmp_path / f"{name}.nii.gz")
        nib.save(nib.Nifti1Image(mask.astype(np.uint8), affine), paths[-1])
    assert atlas_ml(paths[0]) == pytest.approx(0.512)
    for seed in range(6):
        insert = InsertLesions("atlas", seed, atlas_mask=paths, mni_to_subject=np.eye(4))
        assert insert(brain[0], brain[1][None], AFFINE)[1].any()
    insert = InsertLesions("atlas", 0, atlas_mask=paths[0], mni_to_subject=np.eye(4))
    with pytest.raises(ValueError, match="miss this brain"):
        insert(brain[0], brain[1][None], AFFINE)


def test_nothing_changes_where_the_strength_is_0(brain):
    volume, inside = brain
    before = volume.copy()
    for kind in ("chronic_stroke", "acute_stroke"):
        fill(volume, np.zeros(inside.shape), inside, AFFINE, kind, 0.8, np.random.RandomState(0))
    assert np.array_equal(volume, before)
