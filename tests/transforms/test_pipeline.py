"""The way of a brain to the network and back: on the input's own grid, nothing mirrored, moved, cut or rescaled."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Invertd
from scipy import ndimage
from scipy.spatial.transform import Rotation

from common.cohorts.table import SAMPLE_DIR
from common.transforms.head import HeadCTPreprocessing, HeadMRPreprocessing
from common.transforms.intensity import FOREGROUND_FLOOR
from common.transforms.oct import OCTPreprocessing
from common.transforms.pipeline import BrainPreprocessing
from common.transforms.postprocess import SegmentAnomaliesd, SplitPredictiond

OBLIQUE = Rotation.from_euler("zyx", [25, -15, 10], degrees=True).as_matrix()
ORIENTATIONS = ["RAS", "LAS", "LPS", "RPI", "PIR", "ASL", "SRA", "IPL"]


def make_preprocessing(**settings):
    return BrainPreprocessing(**{"spacing_mm": 2.0, "percentile": 98.0, "upper": 0.8, "canvas": 96} | settings)


def there_and_back(image, **settings):
    """Prepare an image, let a network that changes nothing "predict" it as map and reconstruction, and return all."""
    preprocessing = make_preprocessing(**settings)
    item = preprocessing({"image": image})
    item["pred"] = torch.cat([item["image"]] * 2)
    back = Compose(
        [
            Invertd("pred", preprocessing, orig_keys="image", nearest_interp=False),
            SplitPredictiond(),
            SegmentAnomaliesd(threshold=0.9, min_volume_ml=0.0),
        ]
    )
    return back(item)


def stored_as(axcodes, volume, affine):
    """The same voxels of a RAS volume in the order of another orientation."""
    nifti = nib.Nifti1Image(volume, affine)
    target = nib.orientations.axcodes2ornt(axcodes)
    return nifti.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(affine), target))


def assert_comes_back(path, volume, brain, tolerance):
    """Grid and affine exactly; map (away from the rim) and reconstruction like the input in the brain; 0 outside."""
    stored = nib.load(path)
    result = there_and_back(str(path))
    for key in ("anomaly_map", "reconstruction", "segmentation", "brain", "input"):
        assert result[key].shape == (1, *stored.shape), key
        assert np.array_equal(result[key].affine, stored.affine), key
    assert np.array_equal(result["brain"][0], brain)
    anomaly_map = result["anomaly_map"][0].numpy() * result["image"].meta["intensity_unit"][0]
    reconstruction = result["reconstruction"][0].numpy()
    assert not anomaly_map[~brain].any()
    assert not reconstruction[~brain].any()
    deep = ndimage.distance_transform_edt(brain, sampling=np.linalg.norm(stored.affine[:3, :3], axis=0)) > 4
    for values, where in ((anomaly_map, deep), (reconstruction, brain)):
        assert np.abs(values - volume)[where].mean() < tolerance * volume.max()
        assert np.corrcoef(values[where], volume[where])[0, 1] > 1 - tolerance  # no mirror, no shift


@pytest.mark.parametrize("axcodes", ORIENTATIONS)
def test_any_orientation_comes_back(axcodes, phantom, tmp_path):
    shape, affine = phantom.grid()
    volume, brain, _ = phantom.on_grid(shape, affine)
    nifti = stored_as(axcodes, volume, affine)
    nib.save(nifti, tmp_path / "image.nii.gz")
    assert nib.aff2axcodes(nifti.affine) == tuple(axcodes)
    moved = stored_as(axcodes, brain.astype(np.uint8), affine).get_fdata() > 0
    assert_comes_back(tmp_path / "image.nii.gz", nifti.get_fdata(), moved, tolerance=1e-5)


@pytest.mark.parametrize(
    ("spacing_mm", "rotation"),
    [((0.9, 0.9, 3.0), None), ((3.0, 1.2, 1.2), None), ((2.0, 2.0, 2.0), OBLIQUE), ((1.2, 1.2, 4.0), OBLIQUE)],
    ids=["thick axial", "thick sagittal", "oblique", "thick oblique"],
)
def test_any_grid_comes_back(spacing_mm, rotation, phantom, save_nifti, tmp_path):
    shape, affine = phantom.grid(spacing_mm, rotation)
    volume, brain, _ = phantom.on_grid(shape, affine)
    path = save_nifti(tmp_path / "image.nii.gz", volume, affine)
    assert_comes_back(path, volume, brain, tolerance=1e-3)


def test_bias_field_is_taken_away_and_given_back(phantom, save_nifti, tmp_path):
    """Of two scanners one is brighter at the front: much the same to the network, and reconstructed as it was."""
    shape, affine = phantom.grid((1.2, 1.2, 4.0), OBLIQUE)
    volume, brain, _ = phantom.on_grid(shape, affine)
    field = np.exp(np.linspace(-0.2, 0.2, shape[1]))[:, None]
    images = {}
    for name, values in (("even", volume), ("uneven", volume * field)):
        path = save_nifti(tmp_path / f"{name}.nii.gz", values, affine)
        images[name] = {on: there_and_back(str(path), bias_correction=on) for on in (False, True)}

    def difference(on):
        even, uneven = (images[name][on]["image"].as_tensor() for name in ("even", "uneven"))
        return float((even - uneven)[even > 0].abs().mean())

    assert difference(on=True) < 0.5 * difference(on=False)
    back = images["uneven"][True]["reconstruction"][0].numpy()
    assert np.abs(back - volume * field)[brain].mean() < 2e-3 * volume.max()


def test_the_network_sees_the_same_brain_however_it_is_stored(phantom):
    shape, affine = phantom.grid()
    volume, _, _ = phantom.on_grid(shape, affine)
    prepared = []
    for axcodes in ORIENTATIONS:
        nifti = stored_as(axcodes, volume, affine)
        image = MetaTensor(torch.from_numpy(nifti.get_fdata()[None].copy()), affine=nifti.affine)
        prepared.append(make_preprocessing()({"image": image})["image"])
    for other in prepared[1:]:
        torch.testing.assert_close(other.as_tensor(), prepared[0].as_tensor(), atol=1e-5, rtol=0)
        assert np.allclose(other.affine, prepared[0].affine, atol=1e-4)
    assert np.allclose(np.asarray(prepared[0].affine)[:3, :3], np.diag([2, 2, 2]))


def test_a_bright_spot_is_segmented_where_it_is(phantom, save_nifti, tmp_path):
    shape, affine = phantom.grid((1.2, 1.2, 3.0), OBLIQUE)
    volume, brain, lesion = phantom.on_grid(shape, affine)
    texture = np.random.default_rng(0).uniform(0, 1, shape)  # all the same it would be a mask
    volume = np.where(brain, 300 + 200 * lesion + texture, 0).astype(np.float32)
    found = there_and_back(str(save_nifti(tmp_path / "image.nii.gz", volume, affine)), upper=0.55, percentile=50.0)
    mask = found["segmentation"][0].numpy() > 0
    centre = nib.affines.apply_affine(affine, ndimage.center_of_mass(mask))
    assert np.linalg.norm(centre - np.add(phantom.centre_mm, phantom.lesion_mm)) < 1.0


def test_affine_is_the_headers_where_its_voxel_sizes_disagree(phantom, tmp_path):
    shape, affine = phantom.grid(rotation=OBLIQUE)
    volume, _, _ = phantom.on_grid(shape, affine)
    nifti = nib.Nifti1Image(volume, affine)
    nifti.header.set_qform(affine @ np.diag([1.005, 1.005, 1.005, 1]), code=1)  # and with it the header's voxel sizes
    nib.save(nifti, tmp_path / "image.nii.gz")
    stored = nib.load(tmp_path / "image.nii.gz")
    assert not np.allclose(stored.header.get_zooms(), np.linalg.norm(stored.affine[:3, :3], axis=0), rtol=1e-4)
    result = there_and_back(str(tmp_path / "image.nii.gz"))
    assert np.array_equal(result["anomaly_map"].affine, stored.affine)


@pytest.mark.parametrize("margin", [0, 1])
def test_brain_at_the_border_of_the_file(margin, phantom):
    shape, affine = phantom.grid()
    volume, brain, _ = phantom.on_grid(shape, affine)
    box = ndimage.find_objects(brain.astype(np.uint8))[0]
    tight = tuple(slice(side.start - margin, side.stop + margin) for side in box)
    image = MetaTensor(torch.from_numpy(volume[tight][None]), affine=affine)
    result = there_and_back(image)
    inside = torch.from_numpy(brain[tight])[None]
    assert torch.equal(result["brain"].as_tensor(), inside)
    torch.testing.assert_close(result["reconstruction"].as_tensor(), image.as_tensor(), rtol=1e-4, atol=0.01)


def test_brain_larger_than_the_canvas_is_not_cut(phantom):
    shape, affine = phantom.grid()
    volume, brain, _ = phantom.on_grid(shape, affine)
    image = MetaTensor(torch.from_numpy(volume[None]), affine=affine)
    result = there_and_back(image, canvas=32)
    assert int((result["image"] > 0).sum()) == brain.sum()
    torch.testing.assert_close(result["reconstruction"].as_tensor(), image.as_tensor(), rtol=1e-4, atol=0.01)


def test_slices_are_padded_to_the_canvas(phantom):
    shape, affine = phantom.grid()
    volume, brain, _ = phantom.on_grid(shape, affine)
    image = make_preprocessing(canvas=80)({"image": MetaTensor(torch.from_numpy(volume[None]), affine=affine)})["image"]
    extent = [side.stop - side.start for side in ndimage.find_objects(brain.astype(np.uint8))[0]]
    assert image.shape == (1, 80, 80, extent[2])


@pytest.mark.parametrize("factor", [1000, 0.1])
def test_scale_of_the_intensities_does_not_matter(factor, phantom):
    shape, affine = phantom.grid((1.5, 2.0, 3.0))
    volume, _, _ = phantom.on_grid(shape, affine)
    images = [MetaTensor(torch.from_numpy(v[None]), affine=affine) for v in (volume, volume * np.float32(factor))]
    plain, scaled = (make_preprocessing()({"image": image})["image"].as_tensor() for image in images)
    torch.testing.assert_close(scaled, plain, atol=1e-5, rtol=0)


def test_foreground_is_above_zero_and_the_background_zero(phantom):
    shape, affine = phantom.grid((1.0, 1.0, 2.5))
    volume, brain, _ = phantom.on_grid(shape, affine)
    volume[tuple(slice(size // 2, size // 2 + 8) for size in shape)] = 0.0  # a black hole
    item = make_preprocessing()({"image": MetaTensor(torch.from_numpy(volume[None]), affine=affine)})
    image = item["image"].as_tensor()
    assert image.dtype == torch.float32
    inside = image > 0
    assert float(image.max()) <= 1
    assert float(image[inside].min()) >= np.float32(FOREGROUND_FLOOR)
    assert float(inside.sum()) * 8 == pytest.approx(brain.sum() * 2.5, rel=0.02)


def test_input_is_kept_as_it_was(phantom, save_nifti, tmp_path):
    shape, affine = phantom.grid()
    volume, brain, _ = phantom.on_grid(shape, affine)
    item = make_preprocessing()({"image": str(save_nifti(tmp_path / "image.nii.gz", volume, affine))})
    assert np.array_equal(item["input"][0], volume)
    assert item["brain"].dtype == torch.bool
    assert np.array_equal(item["brain"][0], brain)


def test_registered_brain_goes_to_mni_and_its_map_comes_back(save_nifti, tmp_path):
    sample = nib.load(SAMPLE_DIR / "mni152_lesions_T1.nii.gz")
    moved = nib.affines.from_matvec(Rotation.from_euler("zyx", [12, -8, 15], degrees=True).as_matrix(), [14, -9, 20])
    moved[:3, :3] *= 0.9
    nifti = stored_as("PIR", sample.get_fdata(dtype=np.float32), moved @ sample.affine)
    path = save_nifti(tmp_path / "image.nii.gz", nifti.get_fdata(dtype=np.float32), nifti.affine)
    stored = nib.load(path)
    preprocessing = make_preprocessing(register=True)
    item = preprocessing({"image": str(path)})
    points = nib.affines.apply_affine(sample.affine, np.argwhere(sample.get_fdata() > 0)[::50])
    errors = np.linalg.norm(nib.affines.apply_affine(item["to_mni"] @ moved, points) - points, axis=1)
    assert errors.max() < 3
    assert np.allclose(np.asarray(item["image"].affine)[:3, :3], np.diag([2, 2, 2]), atol=1e-6)
    steps = (np.asarray(item["image"].affine)[:3, 3] - (-90, -126, -72)) / 2
    assert np.allclose(steps, np.round(steps), atol=1e-4)
    assert np.array_equal(item["input"].affine, stored.affine)
    item["pred"] = torch.cat([item["image"]] * 2)
    back = Invertd("pred", preprocessing, orig_keys="image", nearest_interp=False)(item)["pred"]
    assert back.shape == (2, *stored.shape)
    assert np.array_equal(back.affine, stored.affine)
    volume, brain = stored.get_fdata(), item["brain"][0].numpy()
    assert np.corrcoef(back[0].numpy()[brain], volume[brain])[0, 1] > 0.95


def test_registered_brain_comes_back(tmp_path):
    """The sample, turned by 15 degrees and as large as a person's brain, goes through MNI152 and back."""
    sample = nib.load(SAMPLE_DIR / "mni152_lesions_T1.nii.gz")
    moved = nib.affines.from_matvec(
        0.88 * Rotation.from_euler("xyz", [15, -5, 8], degrees=True).as_matrix(), [9, -20, 30]
    )
    nib.save(nib.Nifti1Image(sample.get_fdata(dtype=np.float32), moved @ sample.affine), tmp_path / "scan.nii.gz")
    result = there_and_back(str(tmp_path / "scan.nii.gz"), register=True)
    assert np.allclose(result["to_mni"] @ moved, np.eye(4), atol=[[0.02] * 3 + [1.5]] * 4)
    assert np.allclose(result["image"].affine[:3, :3], np.diag([2.0, 2.0, 2.0]))
    stored = nib.load(tmp_path / "scan.nii.gz")
    brain = result["brain"].as_tensor()
    for key in ("anomaly_map", "reconstruction", "segmentation"):
        assert result[key].shape == (1, *stored.shape)
        assert np.array_equal(result[key].affine, stored.affine)
        assert not result[key].as_tensor()[~brain].any()
    for key in ("anomaly_map", "reconstruction"):
        values = torch.stack([result[key].as_tensor()[brain], result["input"].as_tensor()[brain]])
        assert torch.corrcoef(values)[0, 1] > 0.95


def test_preparation_names_what_a_network_is_trained_for():
    settings = {"spacing_mm": 2.0, "percentile": 98.0, "upper": 0.8, "canvas": 96}
    of_a_run = {"strip": "atlas", "register": True, "brain_volume_ml": [50, 2300]}
    assert BrainPreprocessing(**settings, **of_a_run).preparation == settings
    assert BrainPreprocessing(**settings, bias_correction=False).preparation == settings
    more = {"channels": 4, "bias_correction": True, "tissue_modes": [0.3, 0.6, 0.7]}
    assert BrainPreprocessing(**settings, **more).preparation == settings | more


@pytest.mark.parametrize(
    ("preprocessing", "numbers"),
    [
        (HeadCTPreprocessing(), {"size": 64, "air": 45}),
        (HeadMRPreprocessing(128, 98.0, 0.8), {"size": 128, "percentile": 98, "upper": 0.8, "channels": 1}),
        (OCTPreprocessing(), {"size": 256}),
    ],
)
def test_preparation_of_heads_is_all_their_settings(preprocessing, numbers):
    assert preprocessing.preparation == numbers
