"""The brain of a skull-stripped image, and images that are not stripped."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - everyone's name for it
import torch
from monai.data import MetaTensor
from scipy import ndimage

from common.errors import SettingError, SkullStripError
from common.images.background import box_of
from common.transforms import brain as brain_module
from common.transforms.brain import BrainMaskd, brain_mask, check_stripped


def make_image(volume, affine):
    volume = volume if volume.ndim == 4 else volume[None]
    return MetaTensor(torch.as_tensor(volume, dtype=torch.float32), affine=affine)


@pytest.fixture
def stripped(phantom):
    shape, affine = phantom.grid()
    volume, brain, _ = phantom.on_grid(shape, affine)
    return volume, brain, affine


def test_mask_is_the_brain(stripped):
    volume, brain, affine = stripped
    result = BrainMaskd("image")({"image": make_image(volume, affine)})
    assert result["brain"].shape == (1, *volume.shape)
    assert result["brain"].dtype == torch.bool
    assert np.array_equal(result["brain"][0], brain)
    assert np.array_equal(result["brain"].affine, affine)


def test_black_hole_belongs_to_the_brain(stripped):
    volume, brain, affine = stripped
    middle = np.array(volume.shape) // 2
    volume[tuple(slice(m - 4, m + 4) for m in middle)] = 0
    assert np.array_equal(brain_mask(make_image(volume, affine))[0], brain)


def test_specks_and_ringing_do_not(stripped):
    volume, brain, affine = stripped
    volume[1:3, 1:3, 1:3] = 500  # a speck of skull
    volume[~brain & (volume == 0)] = 0.001 * volume.max()  # what resampling leaves, below 1 % of the bright tissue
    assert np.array_equal(brain_mask(make_image(volume, affine))[0], brain)


def test_any_channel_counts(stripped):
    volume, brain, affine = stripped
    half = np.arange(volume.shape[0])[:, None, None] < volume.shape[0] // 2
    channels = np.stack([np.where(half, volume, 0), np.where(half, 0, volume)])
    assert np.array_equal(brain_mask(make_image(channels, affine))[0], brain)


def test_speck_of_skull_is_tolerated_and_noisy_air_is_not(stripped):
    volume, _, affine = stripped
    volume[1:3, 1:3, 1:3] = 500
    image = make_image(volume, affine)
    check_stripped(image, brain_mask(image))
    noise = np.random.default_rng(0).uniform(0, 20, volume.shape).astype(np.float32)
    noisy = make_image(np.maximum(volume, noise), affine)
    with pytest.raises(SkullStripError, match="around the brain"):
        check_stripped(noisy, brain_mask(noisy))


def test_head_is_too_large_for_a_brain(stripped):
    volume, _, affine = stripped
    image = make_image(volume, affine @ np.diag([2.5, 2.5, 2.5, 1]))
    with pytest.raises(SkullStripError, match="ml is no brain"):
        check_stripped(image, brain_mask(image))


def test_nothing_above_zero(stripped):
    volume, _, affine = stripped
    with pytest.raises(SkullStripError, match="brighter than the background"):
        brain_mask(make_image(-volume - 1, affine))


def test_given_mask_is_applied_and_the_image_need_not_be_stripped(stripped):
    volume, brain, affine = stripped
    head = make_image(volume + 5.0, affine)
    result = BrainMaskd("image")({"image": head, "brain": make_image(brain * 2.0, affine)})
    assert np.array_equal(result["brain"][0], brain)
    assert not result["image"][0][~torch.from_numpy(brain)].any()
    assert torch.equal(result["image"][0][torch.from_numpy(brain)], head[0][torch.from_numpy(brain)])


@pytest.mark.parametrize(("change", "fact"), [("grid", "another grid"), ("empty", "empty")])
def test_given_mask_that_cannot_be_used_is_refused(stripped, change, fact):
    volume, brain, affine = stripped
    mask = make_image(brain * (change != "empty"), affine + (change == "grid") * np.eye(4, k=3))
    with pytest.raises(SkullStripError, match=fact):
        BrainMaskd("image")({"image": make_image(volume, affine), "brain": mask})


ORIGINAL = "brain as it was"
GREYS = {
    ORIGINAL: lambda volume, brain: volume,
    "mean taken away in the brain": lambda volume, brain: np.where(brain, zscore(volume, brain), 0),
    "mean taken away everywhere": lambda volume, brain: zscore(volume, np.ones_like(brain)),
    "air of -1000": lambda volume, brain: np.where(brain, volume, -1000),
    "air of the lowest value": lambda volume, brain: np.where(
        brain, zscore(volume, brain), zscore(volume, brain).min()
    ),
    "noise of a spline": lambda volume, brain: volume + noise(volume, 1e-3 * volume.max()),
    "noise of a spline about -1000": lambda volume, brain: np.where(brain, volume, noise(volume, 0.5) - 1000),
    "all in 0 to 1, with noise": lambda volume, brain: (volume + noise(volume, 1e-3 * volume.max())) / volume.max(),
}


def zscore(volume, where):
    return (volume - volume[where].mean()) / volume[where].std()


def noise(volume, sigma):
    return np.random.default_rng(0).normal(0, sigma, volume.shape)


@pytest.mark.parametrize("margin", [0, 30])  # voxels: in a large field of view air is nearly all there is
@pytest.mark.parametrize("kind", GREYS)
def test_stripped_is_what_differs_from_its_background(kind, margin, stripped):
    volume, brain, affine = stripped
    volume, brain = np.pad(volume, margin), np.pad(brain, margin)
    volume = np.where(brain, volume - 0.85 * volume[brain].min(), 0)  # as dark as CSF
    result = BrainMaskd("image")({"image": make_image(GREYS[kind](volume, brain), affine)})
    assert result["brain_source"] == "stripped"
    found = result["brain"][0].numpy()
    assert (found != brain).sum() < 0.01 * brain.sum()
    if "spline" not in kind and "noise" not in kind:
        assert not result["image"][0].numpy()[~found].any()
    assert ("intensity_zero" in result) == kind.startswith(("mean", "air of the lowest"))


def test_spline_leaves_a_stripped_brain(stripped):
    """Resampled with rings, some of them below 0, as by ANTs, FSL or SPM."""
    volume, brain, affine = stripped
    image, mask = (sitk.GetImageFromArray(x.astype(np.float32).T) for x in (volume, brain))
    turn = sitk.Euler3DTransform([float(size) / 2 for size in volume.shape], 0.05, 0.03, -0.04)
    true = sitk.GetArrayFromImage(sitk.Resample(mask, mask, turn, sitk.sitkLinear)).T >= 0.5
    for way in (sitk.sitkBSpline, sitk.sitkLanczosWindowedSinc):
        turned = sitk.GetArrayFromImage(sitk.Resample(image, image, turn, way)).T
        assert (turned < 0).any()
        result = BrainMaskd("image")({"image": make_image(turned, affine)})
        found = result["brain"][0].numpy()
        assert 2 * (found & true).sum() / (found.sum() + true.sum()) > 0.93
        assert "intensity_zero" not in result


def test_mean_taken_away_is_given_back(stripped):
    """Exactly where the air tells it; else by the darkest tissue, whose share of the brightest is much the same."""
    volume, brain, affine = stripped
    dark = np.where(brain, volume - 0.85 * volume[brain].min(), 0)
    for kind, tolerance in (("mean taken away everywhere", 1e-4), ("mean taken away in the brain", 0.3)):
        grey = GREYS[kind](dark, brain)
        zero = float(BrainMaskd("image")({"image": make_image(grey, affine)})["intensity_zero"])
        unit = 1 / dark[brain].std() if "brain" in kind else 1 / dark.std()
        true = grey[brain][0] - unit * dark[brain][0]
        assert abs(zero - true) < tolerance * np.ptp(grey[brain])


@pytest.mark.parametrize(("scale", "fact"), [(0.1, "a brain of 1 ml"), (0.5, "a brain of 111 ml"), (1.5, "no brain")])
def test_volume_that_no_brain_has_is_refused(scale, fact, stripped):
    volume, brain, affine = stripped
    image = make_image(volume, affine @ np.diag([scale, scale, scale, 1]))
    with pytest.raises(SkullStripError, match=fact):
        BrainMaskd("image")({"image": image})
    with pytest.raises(SkullStripError, match=r"800 to 2300 ml are plausible|no brain alone"):
        BrainMaskd("image", strip=None)({"image": image})
    mask = make_image(brain, image.affine)
    with pytest.raises(SkullStripError, match=r"800 to 2300 ml .*brain_volume_ml"):
        BrainMaskd("image")({"image": image, "brain": mask})
    limits = (float(mask.sum()) * scale**3 * 0.008 * 0.9, 1e4)
    for item in ({"image": image}, {"image": image, "brain": mask}):
        assert BrainMaskd("image", brain_volume_ml=limits)(item)["brain"].sum() == brain.sum()


def test_brain_that_the_field_of_view_cuts_is_judged_by_its_largest_slice(stripped):
    volume, _, affine = stripped
    middle = volume.shape[2] // 2
    slab = volume[:, :, middle - 5 : middle + 5]
    assert BrainMaskd("image")({"image": make_image(slab, affine)})["brain"].sum() == (slab > 0).sum()
    with pytest.raises(SkullStripError, match="plausible"):
        BrainMaskd("image")({"image": make_image(slab, affine @ np.diag([0.5, 0.5, 0.5, 1]))})


@pytest.mark.parametrize("limits", [(1,), (5, 2), (-1, 5), "ab", None, (0, np.nan)])
def test_limits_that_are_none_are_refused(limits):
    with pytest.raises(SettingError, match="lowest and a highest volume"):
        BrainMaskd("image", brain_volume_ml=limits)


def soft(brain):
    return ndimage.gaussian_filter(brain.astype(np.float32), 1.5)


MASKS = {
    "probability": soft,
    "percent": lambda brain: np.rint(100 * soft(brain)),
    "8 bit": lambda brain: np.rint(255 * soft(brain)),
    "spline": lambda brain: soft(brain) * 1.1 - 0.05 * (soft(brain) < 0.2),
    "labels": lambda brain: brain * (1 + np.indices(brain.shape)[0] // 4),
    "two labels, the higher one commoner": lambda brain: brain * np.where(np.indices(brain.shape)[0] < 15, 1, 2),
    "255": lambda brain: brain * 255,
}


@pytest.mark.parametrize("kind", MASKS)
def test_given_mask_of_shares_is_cut_at_half_and_of_labels_above_0(kind, stripped):
    volume, brain, affine = stripped
    mask = make_image(MASKS[kind](brain), affine)
    found = BrainMaskd("image")({"image": make_image(volume, affine), "brain": mask})["brain"][0].numpy()
    shares = kind in ("probability", "percent", "8 bit", "spline")
    assert (found != brain).sum() <= shares * 0.02 * brain.sum()


def test_given_mask_of_several_volumes_is_refused(stripped):
    volume, brain, affine = stripped
    with pytest.raises(SkullStripError, match="not one 3D volume"):
        BrainMaskd("image")(
            {"image": make_image(volume, affine), "brain": make_image(np.stack([brain, brain]), affine)}
        )


def head_with_zeros(volume, brain):
    """A head in noise, 0 in the top of the field of view and, as of a face that was cut out, in a corner."""
    head = volume + np.abs(noise(volume, 10)).astype(np.float32) + 1
    head[:, :, -18:] = 0
    head[:22, -22:] = 0
    black = tuple(slice(size // 2, size // 2 + 3) for size in volume.shape)
    head[black] = 0  # a black lesion, which is tissue
    return head, black


@pytest.mark.parametrize("strip", ["atlas", "deepbet", "hd-bet"])
def test_what_was_filled_into_the_field_of_view_is_no_tissue(strip, stripped, monkeypatch):
    volume, brain, affine = stripped
    head, black = head_with_zeros(volume, brain)
    image = make_image(head, affine)
    for name in ("atlas_brain_mask", "deepbet_brain_mask", "hd_bet_brain_mask"):
        monkeypatch.setattr(brain_module, name, lambda image: make_image(brain, affine).bool())
    found = BrainMaskd("image", strip=strip)({"image": image})["brain"][0].numpy()
    assert found[black].all()
    zeros = found & (head == 0)
    zeros[black] = False
    assert not zeros.any()
    assert (found | (head == 0))[brain].all()


def test_given_mask_ends_where_the_field_of_view_was_filled(stripped):
    volume, brain, affine = stripped
    head, black = head_with_zeros(volume, brain)
    result = BrainMaskd("image")({"image": make_image(head, affine), "brain": make_image(brain, affine)})
    found = result["brain"][0].numpy()
    assert not found[:, :, -18:].any()
    assert np.array_equal(found[:, :, :-18], brain[:, :, :-18])
    assert found[black].all()


@pytest.mark.parametrize("at_border", [False, True])
def test_mask_in_its_box_is_that_of_the_whole_image(at_border, stripped):
    """By another way: the largest component of the whole image, its holes filled by SciPy. Specks, holes and a bay."""
    volume, brain, affine = stripped
    box = box_of(brain)
    rough = ndimage.gaussian_filter(np.random.default_rng(5).normal(size=volume.shape), 1) > 0.3
    volume = np.where(rough, 0, volume)
    volume[1:3, 1:3, 1:3] = 500
    volume = volume[box] if at_border else volume
    mask = volume > np.percentile(volume[volume > 0].astype(np.float64), 98) * brain_module.BACKGROUND_SHARE
    labels, _ = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    expected = ndimage.binary_fill_holes(labels == np.bincount(labels[mask]).argmax())
    assert (expected & ~mask).any()
    assert np.array_equal(brain_mask(make_image(volume, affine))[0], expected)
