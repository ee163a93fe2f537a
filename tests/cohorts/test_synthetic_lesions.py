"""Synthetic lesions: where they are, what they change, what they leave alone; and the shipped sample made with them."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose
from scipy import ndimage

from common.cohorts.mni_lesions import KINDS as MNI_KINDS
from common.cohorts.mni_lesions import match_moments
from common.cohorts.synthetic_lesions import MIN_CHANGE, InsertLesions, InsertLesionsd

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "blobs": {"radius_mm": (5, 8)},
    "atlas": {},
    "chronic_stroke": {},
    "acute_stroke": {},
    "texture": {"radius_mm": (7, 9), "count": (1, 2)},
    "deformation": {"radius_mm": (12, 15), "count": (1, 1)},
}


def make_subject(spacing=(2.0, 2.0, 2.0), channels=1):
    """An ellipsoid of 80 x 96 x 80 mm around the origin of smooth noise: image (C, H, W, D), brain, affine."""
    return tuple(array.copy() for array in _make_subject(spacing, channels))


@cache
def _make_subject(spacing, channels):
    spacing = np.array(spacing)
    shape = np.ceil(np.array([88, 104, 88]) / spacing).astype(int)
    affine = nib.affines.from_matvec(np.diag(spacing), -spacing * (shape - 1) / 2)
    points = np.moveaxis(nib.affines.apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1)), -1, 0)
    brain = np.linalg.norm(points / np.array([40, 48, 40])[:, None, None, None], axis=0)[None] <= 1
    noise = np.random.RandomState(0).normal(size=(channels, *shape))
    tissue = 150 + 40 * ndimage.gaussian_filter(noise, (0, *(4 / spacing))) / 0.05
    return np.where(brain, np.clip(tissue, 90, 220), 0).astype(np.float32), brain, affine


def make_atlas():
    """Two lesions in a 2 mm MNI grid, beside the centre of the brain: mask (H, W, D), affine."""
    affine = nib.affines.from_matvec(np.diag([-2.0, 2.0, 2.0]), (90, -126, -72))  # left-handed, as FSL's
    mask = np.zeros((91, 109, 91), bool)
    for x in (-20, 24):
        i, j, k = nib.affines.apply_affine(np.linalg.inv(affine), (x, -22, 10)).round().astype(int)
        mask[i - 3 : i + 4, j - 5 : j + 6, k - 3 : k + 4] = True
    return mask, affine


def make_insert(kind, seed=0, **settings):
    if kind in MNI_KINDS:
        settings["atlas_mask"], settings["atlas_affine"] = make_atlas()
    return InsertLesions(kind, seed, **SETTINGS[kind] | settings)


@pytest.fixture(params=list(SETTINGS))
def kind(request):
    return request.param


def test_seed_decides(kind):
    image, brain, affine = make_subject()
    first, again, other = (make_insert(kind, seed)(image, brain, affine) for seed in (1, 1, 2))
    assert first[0].tobytes() == again[0].tobytes() and first[1].tobytes() == again[1].tobytes()
    assert first[0].tobytes() != other[0].tobytes()


def test_subjects_differ_and_global_random_state_is_left_alone(kind):
    image, brain, affine = make_subject()
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    one, two = (make_insert(kind)(image, brain, affine, subject=subject)[0] for subject in ("IXI014", "IXI015"))
    assert not np.array_equal(one, two)
    assert np.array_equal(np.random.get_state()[1], before[0]) and torch.equal(torch.get_rng_state(), before[1])


def test_lesions_lie_in_the_brain_and_change_it(kind):
    image, brain, affine = make_subject()
    unchanged = image.copy()
    out, mask = make_insert(kind)(image, brain, affine)
    assert np.array_equal(image, unchanged)  # the input is not written to
    assert mask.dtype == np.uint8 and mask.shape == brain.shape and set(np.unique(mask)) == {0, 1}
    assert not mask[~brain].any()
    assert np.array_equal(out[~brain], image[~brain])
    assert (out != image)[mask > 0].mean() > 0.9


def test_nothing_changes_beyond_the_soft_border(kind):
    image, brain, affine = make_subject()
    insert = make_insert(kind)
    out, mask = insert(image, brain, affine)
    # mask and border are sampled at voxels, so one voxel's diagonal is added; a deformation fades out over its ball
    border = insert.radius_mm[1] / 2 if kind == "deformation" else insert.border_mm
    away = ndimage.distance_transform_edt(mask[0] == 0, sampling=2) > border + 2 * np.sqrt(3)
    assert away.any() and np.array_equal(out[0][away], image[0][away])


@pytest.mark.parametrize(("hyper_share", "sign"), [(0, -1), (1, 1)])
def test_blobs_are_darker_or_brighter(hyper_share, sign):
    image, brain, affine = make_subject()
    out, mask = make_insert("blobs", hyper_share=hyper_share)(image, brain, affine)
    change = sign * (out - image)
    assert (change >= 0).all()
    assert (change >= MIN_CHANGE * np.percentile(image[brain], 98))[mask > 0].all()
    if sign < 0:
        core = ndimage.binary_erosion(mask[0])
        assert change[0][core].min() >= 0.3 * image[0][core].min()


@pytest.mark.parametrize("hyper_limit", [1.0, 1.15])
def test_bright_blobs_multiply_tissue_up_to_the_limit(hyper_limit):
    image, brain, affine = make_subject()
    out, mask = make_insert("blobs", hyper_share=1, hyper_limit=hyper_limit)(image, brain, affine)
    limit = hyper_limit * np.percentile(image[brain], 98)
    assert (out <= np.maximum(image, limit * (1 + 1e-6))).all()
    core = ndimage.binary_erosion(mask[0])
    factor, capped = (out[0] / image[0].clip(1))[core], out[0][core] >= limit * (1 - 1e-6)
    assert capped.any() and not capped.all()
    assert factor[~capped].min() >= 1.3 - 1e-6 and factor.max() <= 1.6 + 1e-6


def test_where_a_blob_hardly_shows_there_is_neither_label_nor_change():
    image, brain, affine = make_subject()
    bright = brain & (np.arange(image.shape[1])[:, None, None] > image.shape[1] // 2)
    image = np.where(bright, 200, np.minimum(image, 150)).astype(np.float32)  # the 98th percentile is 200
    for seed in range(7):
        insert = make_insert("blobs", seed, hyper_share=1, hyper_limit=1.05, count=(1, 1), radius_mm=(12, 12))
        out, mask = insert(image, brain, affine)
        assert not mask[bright].any()
        assert mask.sum() * 8 > 4 / 3 * np.pi * 12**3 / 2  # mm3: put where there is room, most of it shows
        away = ndimage.distance_transform_edt(mask[0] == 0, sampling=2) > insert.border_mm + 2 * np.sqrt(3)
        assert np.array_equal(out[0][away], image[0][away])


def test_atlas_lesions_are_darker_and_where_the_atlas_has_them():
    image, brain, affine = make_subject()
    out, mask = make_insert("atlas")(image, brain, affine)
    assert (out <= image).all()
    labels, count = ndimage.label(mask[0])
    assert count == 2
    to_subject = match_moments(brain[0], affine)
    for centre_mni in ((-20, -22, 10), (24, -22, 10)):
        voxel = nib.affines.apply_affine(np.linalg.inv(affine) @ to_subject, centre_mni).round().astype(int)
        assert labels[tuple(voxel)] > 0


def test_atlas_file_and_given_transform(tmp_path):
    mask, atlas_affine = make_atlas()
    nib.save(nib.Nifti1Image(mask.astype(np.uint8), atlas_affine), tmp_path / "lesions.nii.gz")
    image, brain, affine = make_subject()
    shift = nib.affines.from_matvec(np.eye(3), (0, 22, -10))
    _, out = InsertLesions("atlas", atlas_mask=tmp_path / "lesions.nii.gz", mni_to_subject=shift)(image, brain, affine)
    centres = nib.affines.apply_affine(affine, ndimage.center_of_mass(*[out[0]] * 2, 1))
    np.testing.assert_allclose(centres, (2, 0, 0), atol=1)
    assert out.sum() == pytest.approx(mask.sum(), rel=0.25)  # the corners of these boxes are smoothed away


def test_match_moments_of_the_template_is_identity():
    scale = np.diag([33.5, 40.7, 31.5]) * np.sqrt(5)  # a solid ellipsoid's half axes are sqrt(5) standard deviations
    affine = nib.affines.from_matvec(np.diag([3.0, 3.0, 3.0]), (-90, -130, -75))
    points = nib.affines.apply_affine(affine, np.moveaxis(np.indices((61, 72, 57)), 0, -1)) - (0, -22.1, 9.5)
    brain = np.linalg.norm(points @ np.linalg.inv(scale), axis=-1) <= 1
    np.testing.assert_allclose(match_moments(brain, affine), np.eye(4), atol=0.25)


@pytest.mark.parametrize("spacing", [(2, 2, 2), (1, 2, 4), (3, 1.5, 2)])
def test_sizes_are_in_mm(spacing):
    image, brain, affine = make_subject(spacing)
    insert = InsertLesions("texture", 3, count=(1, 1), radius_mm=(10, 10))
    _, mask = insert(MetaTensor(image, affine=torch.from_numpy(affine)), brain)
    assert float(mask.sum()) * np.prod(spacing) == pytest.approx(4 / 3 * np.pi * 10**3, rel=0.1)
    for side, step in zip(ndimage.find_objects(np.asarray(mask[0]))[0], spacing, strict=True):
        assert (side.stop - side.start) * step == pytest.approx(20, abs=step)


def test_texture_comes_from_the_same_brain():
    image, brain, affine = make_subject()
    out, mask = make_insert("texture", border_mm=0, count=(1, 1))(image, brain, affine)
    changed = out[0][mask[0] > 0]
    assert np.isin(changed, image[brain]).all()
    assert abs(changed.mean() - image[0][mask[0] > 0].mean()) > 5


def test_deformation_moves_tissue_by_the_stated_distance():
    _, brain, affine = make_subject()
    places = np.moveaxis(nib.affines.apply_affine(affine, np.moveaxis(np.indices(brain.shape[1:]), 0, -1)), -1, 0)
    out, mask = make_insert("deformation", mask_mm=1.5)(
        places, brain, affine
    )  # channels hold x, y, z: displacement shows
    moved = np.linalg.norm(out - places, axis=0)
    assert np.array_equal(mask[0] > 0, moved >= 1.5)
    assert 0.2 * 12 < moved.max() <= 0.3 * 15


@pytest.mark.parametrize("hyper_share", [0, 1])
def test_channels_share_the_lesions(hyper_share):
    image, brain, affine = make_subject(channels=2)
    image[1] *= 3  # in units of its own
    out, mask = make_insert("blobs", hyper_share=hyper_share)(image, brain, affine)
    bright = np.percentile(image[:, brain[0]], 98, axis=1)[:, None, None, None]
    core = ndimage.binary_erosion(mask[0])
    saturated = image >= bright if hyper_share else np.zeros_like(image, bool)
    assert ((out != image) | saturated)[:, core].all()
    assert (out <= np.maximum(image, bright * (1 + 1e-6))).all()
    shows = np.abs(out - image) >= MIN_CHANGE * bright * (1 - 1e-6)
    assert shows.any(axis=0)[mask[0] > 0].all()  # in one of the channels, not always in the same
    assert (shows[0] & ~shows[1])[mask[0] > 0].any() or not hyper_share


def test_an_empty_channel_does_not_change_the_label():
    image, brain, affine = make_subject()
    one, two = (
        make_insert("blobs", hyper_share=1)(im, brain, affine) for im in (image, np.stack([image[0], 0 * image[0]]))
    )
    assert np.array_equal(one[1], two[1]) and np.array_equal(one[0][0], two[0][0]) and not two[0][1].any()


def test_types_and_integers():
    image, brain, affine = make_subject()
    meta = MetaTensor(image.round().astype(np.uint8), affine=torch.from_numpy(affine))
    out, mask = make_insert("blobs", hyper_share=1, hyper_limit=1.5)(meta, torch.from_numpy(brain))
    assert isinstance(out, MetaTensor) and isinstance(mask, MetaTensor)
    assert out.dtype == torch.float32 and mask.dtype == torch.uint8
    assert out.max() > 255  # neither clipped nor wrapped round
    assert torch.equal(out.affine, meta.affine) and torch.equal(mask.affine, meta.affine)


def test_dictionary_version():
    image, brain, affine = make_subject()
    meta = MetaTensor(image, affine=torch.from_numpy(affine))
    pipeline = Compose([InsertLesionsd(brain_key=None, subject_key="subject", kind="blobs", seed=4, radius_mm=(5, 8))])
    item = pipeline({"image": meta, "subject": "IXI014"})
    out, mask = InsertLesions("blobs", 4, radius_mm=(5, 8))(meta, brain, subject="IXI014")
    assert torch.equal(item["image"], out) and torch.equal(item["lesion"], mask)
    with pytest.raises(ValueError, match="one image"):
        InsertLesionsd(keys=["T1", "T2"])


def test_errors(kind):
    image, brain, affine = make_subject()
    with pytest.raises(ValueError, match="empty"):
        make_insert(kind)(image, np.zeros_like(brain), affine)
    with pytest.raises(ValueError, match="brain mask"):
        make_insert(kind)(image, brain[..., 1:], affine)
    speck = np.zeros_like(brain)
    speck[0, 5, 5, 5] = True
    with pytest.raises(ValueError, match=r"No room|flat"):
        make_insert(kind)(image, speck, affine)


@pytest.mark.parametrize(
    ("settings", "message"), [({"hyper_limit": 0.5}, "raise `hyper_limit`"), ({"hyper": (1.01, 1.02)}, "not show")]
)
def test_bright_blobs_that_cannot_show(settings, message):
    with pytest.raises(ValueError, match=message):
        make_insert("blobs", hyper_share=1, **settings)(*make_subject())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "tumour"}, "tumour"),
        ({"kind": "atlas"}, "atlas_mask"),
        ({"kind": "atlas", "atlas_mask": np.ones((2, 2, 2))}, "atlas_affine"),
        ({"kind": "deformation", "displacement": (0.2, 0.4)}, "folds"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        InsertLesions(**settings)


def test_shipped_sample():
    image, mask = _load_sample(ROOT / "common" / "cohorts" / "sample")
    volume, lesion = np.asarray(image.dataobj), np.asarray(mask.dataobj)
    assert (volume.dtype, lesion.dtype) == (np.int16, np.uint8)
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S") and np.array_equal(image.affine, mask.affine)
    assert volume.min() == 0 and not lesion[volume == 0].any()
    assert ndimage.label(lesion)[1] == 5
    assert 0.005 < lesion.sum() / (volume > 0).sum() < 0.015


def test_make_sample_makes_the_shipped_sample(tmp_path):
    pytest.importorskip("nilearn", reason="the template comes with nilearn (requirements-dev.txt)")
    spec = importlib.util.spec_from_file_location("make_sample", ROOT / "scripts" / "make_sample.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.make_sample(tmp_path)
    shipped = ROOT / "common" / "cohorts" / "sample"
    for made, kept in zip(_load_sample(tmp_path), _load_sample(shipped), strict=True):
        np.testing.assert_array_equal(made.affine, kept.affine)
        # other versions of numpy and scipy may round a few voxels to the neighbouring integer
        np.testing.assert_allclose(np.asarray(made.dataobj), np.asarray(kept.dataobj), atol=1, rtol=0)
        assert np.mean(np.asarray(made.dataobj) != np.asarray(kept.dataobj)) < 1e-4
    assert (tmp_path / "LICENSE").read_bytes() == (shipped / "LICENSE").read_bytes()


def _load_sample(folder):
    return [nib.load(folder / f"mni152_lesions_{name}.nii.gz") for name in ("T1", "mask")]
