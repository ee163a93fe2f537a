"""Registration: the same brain goes to the same place of MNI152, of any contrast and however it is stored, and back."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - its own name for itself
import torch
from monai.data import MetaTensor
from monai.transforms import Invertd
from scipy import ndimage
from scipy.spatial.transform import Rotation

from common.cohorts.table import SAMPLE_DIR
from common.errors import RegistrationError
from common.images.mni import mni_grid, template
from common.transforms import registration
from common.transforms.registration import (
    RegisterToMNI,
    RegisterToMNId,
    align_to,
    is_mni,
    mni_transform,
    world_points,
    write_tfm,
)

# what a tissue of the T1 (CSF, rim, grey, white matter) looks like elsewhere
T1 = [0, 60, 140, 220, 300]
CONTRASTS = {"T2": [255, 220, 120, 60, 60], "FLAIR": [20, 30, 200, 150, 220], "CT": [8, 10, 38, 30, 30]}


@pytest.fixture(scope="module")
def sample():
    """The shipped sample, a brain in MNI152, and its mask."""
    file = nib.load(SAMPLE_DIR / "mni152_lesions_T1.nii.gz")
    volume = torch.from_numpy(file.get_fdata(dtype=np.float32))[None]
    return MetaTensor(volume, affine=file.affine), MetaTensor(volume > 0, affine=file.affine)


def recolour(image, contrast):
    values = np.where(image > 0, np.interp(image, T1, CONTRASTS[contrast]), 0).astype(np.float32)
    return MetaTensor(torch.from_numpy(values), affine=image.affine)


def movement(rng, angle_deg, shift_mm, scales=(1.0, 1.0)):
    matrix = Rotation.from_euler("xyz", rng.uniform(-angle_deg, angle_deg, 3), degrees=True).as_matrix()
    return nib.affines.from_matvec(matrix @ np.diag(rng.uniform(*scales, 3)), rng.uniform(-shift_mm, shift_mm, 3))


def stored_anyhow(image, moved, rng_seed):
    """The same voxels, moved in the world, their array's axes permuted and flipped."""
    rng = np.random.default_rng(rng_seed)
    order = np.stack([rng.permutation(3), rng.choice([-1, 1], 3)], axis=1)
    array = nib.orientations.apply_orientation(image.as_tensor()[0].numpy(), order)
    affine = moved @ np.asarray(image.affine) @ nib.orientations.inv_ornt_aff(order, image.shape[1:])
    return MetaTensor(torch.from_numpy(array.copy())[None], affine=affine)


def error_mm(matrix, points):
    """How far points end from where they were."""
    return np.linalg.norm(nib.affines.apply_affine(matrix, points) - points, axis=1)


def dice(a, b):
    return 2 * float((a & b).sum()) / float(a.sum() + b.sum())


@pytest.mark.parametrize("contrast", ["T1", *CONTRASTS])
def test_finds_the_movement_of_a_brain(contrast, sample):
    image, brain = sample
    image = image if contrast == "T1" else recolour(image, contrast)
    moved = movement(np.random.default_rng(len(contrast)), 20, 25, (0.85, 1.15))
    seed = [*CONTRASTS, "T1"].index(contrast)
    estimate = mni_transform(stored_anyhow(image, moved, seed), stored_anyhow(brain, moved, seed))
    errors = error_mm(estimate @ moved, world_points(brain)[::50])
    assert np.median(errors) < 1
    assert errors.max() < 3


def test_same_result_with_any_number_of_threads(sample):
    before = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    try:
        matrices = []
        for threads in (1, 4):
            sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
            matrices.append(mni_transform(*sample))
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(before)
    assert np.array_equal(*matrices)
    assert error_mm(matrices[0], world_points(sample[1])[::50]).max() < 1


def test_brain_that_is_in_mni_stays(sample):
    image, brain = sample
    assert is_mni(image, brain, np.eye(4))
    small = nib.affines.from_matvec(np.eye(3), [3.0, 0, 0])
    assert not is_mni(image, brain, small)
    result = RegisterToMNI(2.0)(image, brain)
    assert np.array_equal(result.meta["to_mni"], np.eye(4))


@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, 1)])
def test_grid_of_the_template_says_that_a_brain_is_in_mni(signs):
    affine, shape = mni_grid(1.0)
    affine = affine @ np.diag([*signs, 1])
    affine[0, 3] = 90 if signs[0] < 0 else -91  # FSL's own origin, and the same voxels mirrored
    brain = registration.onto(template()[1], (affine, shape))
    small = MetaTensor(ndimage.binary_erosion(brain[0].numpy() > 0.5, iterations=9)[None], affine=affine)
    brain = MetaTensor(ndimage.binary_erosion(brain[0].numpy() > 0.5, iterations=2)[None], affine=affine)
    far = np.diag([1.2, 1.2, 1.2, 1])
    assert is_mni(brain.float(), brain, far)
    assert not is_mni(small.float(), small, far)  # registered rigidly: it is not as large as the template
    elsewhere = MetaTensor(brain.as_tensor(), affine=nib.affines.from_matvec(np.eye(3), [40, 0, 0]) @ affine)
    assert not is_mni(elsewhere.float(), elsewhere, far)


def test_what_is_no_brain_is_refused(sample):
    stick = torch.zeros(1, 60, 60, 60)
    stick[:, 25:35, 25:35, 2:58] = 100
    affine = np.diag([2.0, 2.0, 2.0, 1])
    with pytest.raises(RegistrationError, match=r"Dice|scales"):
        mni_transform(MetaTensor(stick, affine=affine), MetaTensor(stick > 0, affine=affine))
    twice = [MetaTensor(one.as_tensor(), affine=affine @ np.asarray(one.affine)) for one in sample]
    with pytest.raises(RegistrationError, match=r"scales by 0\.5"):
        mni_transform(*twice)


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_there_and_back_on_its_own_grid(mode, sample):
    moved = movement(np.random.default_rng(3), 20, 25, (0.85, 1.15))
    image, brain = (stored_anyhow(one, moved, 5) for one in sample)
    register = RegisterToMNI(1.0, mode=mode)
    there = register(image, to_mni=np.linalg.inv(moved))
    affine, shape = mni_grid(1.0)
    assert there.shape == (1, *shape)
    assert np.allclose(there.affine, affine)
    assert dice(there.as_tensor() > 0, registration.onto(sample[1], (affine, shape)).as_tensor() >= 0.5) > 0.95
    label = register.inverse(register(brain.float(), to_mni=np.linalg.inv(moved))) >= 0.5
    assert label.shape == image.shape
    assert np.array_equal(label.affine, image.affine)
    assert dice(label.as_tensor(), brain.as_tensor()) > 0.97
    back = register.inverse(there)
    inside = brain.as_tensor()
    assert np.corrcoef(back.as_tensor()[inside], image.as_tensor()[inside])[0, 1] > 0.97
    assert not back.applied_operations


def test_dictionary_keeps_an_exact_background_and_brings_predictions_back(sample, monkeypatch):
    moved = movement(np.random.default_rng(4), 10, 10)
    monkeypatch.setattr(registration, "mni_transform", lambda image, brain: np.linalg.inv(moved))
    image, brain = (stored_anyhow(one, moved, 6) for one in sample)
    transform = RegisterToMNId(("image", "lesion"), "brain", 2.0, mode=("bilinear", "nearest"))
    flat = MetaTensor(70.0 * brain.as_tensor(), affine=image.affine)
    lesion = MetaTensor((image.as_tensor() > 200).float(), affine=image.affine)
    result = transform({"image": torch.cat([image, flat]), "lesion": lesion, "brain": brain})
    assert np.array_equal(result["to_mni"], np.linalg.inv(moved))
    inside = result["brain"].as_tensor()
    assert not result["image"].as_tensor()[:, ~inside[0]].any()
    values = result["image"].as_tensor()[1:][inside]
    torch.testing.assert_close(values, torch.full_like(values, 70.0), rtol=1e-4, atol=0)  # no dark rim
    assert set(result["lesion"].unique().tolist()) == {0.0, 1.0}
    assert np.allclose(result["lesion"].affine, mni_grid(2.0)[0])
    result["pred"] = MetaTensor(result["image"].as_tensor())
    back = Invertd("pred", transform, orig_keys="image", nearest_interp=False)(result)["pred"]
    assert back.shape == (2, *image.shape[1:])
    assert np.array_equal(back.affine, image.affine)
    mask = brain.as_tensor()
    assert np.corrcoef(back.as_tensor()[:1][mask], image.as_tensor()[mask])[0, 1] > 0.95


def test_transform_file_means_what_other_programs_read(phantom, tmp_path, save_nifti):
    oblique = Rotation.from_euler("zyx", [25, -15, 10], degrees=True).as_matrix()
    shape, affine = phantom.grid((2.5, 2.2, 3.0), oblique)
    volume, _, _ = phantom.on_grid(shape, affine)
    save_nifti(tmp_path / "scan.nii.gz", volume, affine)
    to_mni = nib.affines.from_matvec(Rotation.from_euler("xyz", [5, 9, -7], degrees=True).as_matrix() * 1.1, [4, -6, 9])
    write_tfm(to_mni, tmp_path / "to_mni.tfm")
    ours = RegisterToMNI(2.0)(MetaTensor(torch.from_numpy(volume)[None], affine=affine), to_mni=to_mni)
    target, size = mni_grid(2.0)
    save_nifti(tmp_path / "mni.nii.gz", np.zeros(size, np.float32), target)
    scan, mni = (sitk.ReadImage(str(tmp_path / name)) for name in ("scan.nii.gz", "mni.nii.gz"))
    theirs = sitk.Resample(scan, mni, sitk.ReadTransform(str(tmp_path / "to_mni.tfm")), sitk.sitkLinear, 0.0)
    theirs = sitk.GetArrayFromImage(theirs).T
    deep = ndimage.binary_erosion((ours[0].numpy() > 0) & (theirs > 0))  # ITK does not fade to 0 at the border
    assert deep.sum() > 10_000
    assert np.abs(ours[0].numpy() - theirs)[deep].max() < 1e-3 * volume.max()


def test_modalities_on_different_grids_are_aligned(sample):
    first = sample[0]
    rng = np.random.default_rng(7)
    moved = movement(rng, 6, 6)  # the patient moved; the header says nothing of it
    turned = movement(rng, 20, 0)  # the slices lie otherwise; the header says so
    affine = turned @ nib.affines.from_matvec(np.diag([1.5, 1.5, 3.0]), [-100, -130, -100])
    source = recolour(first, "T2")
    source = MetaTensor(source.as_tensor(), affine=moved @ np.asarray(first.affine))
    other = registration.onto(source, (affine, (130, 150, 65)))
    aligned = align_to(first, other)
    assert aligned.shape == first.shape
    assert np.array_equal(aligned.affine, first.affine)
    expected, inside = recolour(first, "T2").as_tensor(), ndimage.binary_erosion(sample[1][0].numpy(), iterations=2)
    before = registration.onto(other, (np.asarray(first.affine), first.shape[1:])).as_tensor()
    after, start = (np.corrcoef(one[0].numpy()[inside], expected[0].numpy()[inside])[0, 1] for one in (aligned, before))
    assert after > 0.95 > start


def test_same_grid_needs_no_alignment(sample):
    other = recolour(sample[0], "FLAIR")
    assert align_to(sample[0], other) is other


def test_modalities_that_do_not_match_are_refused(sample, monkeypatch):
    shape, affine = (40, 48, 40), sample[0].affine @ torch.diag(torch.tensor([2.0, 2, 2, 1], dtype=torch.float64))
    noise = MetaTensor(torch.rand((1, *shape), generator=torch.Generator().manual_seed(0)), affine=affine)
    with pytest.raises(RegistrationError, match="nats"):
        align_to(sample[0], noise)
    monkeypatch.setattr(registration, "MAX_ROTATION_DEG", -1.0)
    with pytest.raises(RegistrationError, match="degrees"):
        align_to(sample[0], registration.onto(sample[0], (np.asarray(affine), shape)))
