"""What every method promises of its map, on the sample that the package ships."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
import torch

from common.metrics import auroc
from common.metrics.histograms import exact_histograms
from common.weights import digest, sha256

OUTPUTS = {
    "anomaly_map.nii.gz",
    "segmentation.nii.gz",
    "reconstruction.nii.gz",
    "lesions.csv",
    "run.json",
    "preview.png",
}


@pytest.fixture
def same_seed(network):
    """The seed is the shipped one again after the test."""
    seed, batch_size = network.seed, network.batch_size
    yield network
    network.seed, network.batch_size = seed, batch_size


def load(path):
    return np.asarray(nib.load(path).dataobj)


def test_prediction_has_map_and_reconstruction(slab, slab_prediction, metadata):
    channels = metadata["network_data_format"]["outputs"]["pred"]["num_channels"]
    assert slab_prediction.shape == (1, channels, *slab.shape[2:])
    assert slab_prediction.dtype == torch.float32
    assert slab_prediction.isfinite().all()
    anomaly_map, reconstruction = slab_prediction[:, :1], slab_prediction[:, 1:]
    assert float(anomaly_map.min()) >= 0
    assert float(anomaly_map.max()) > 0
    assert 0 <= float(reconstruction.min()) <= float(reconstruction.max()) <= 1


def test_nothing_outside_the_foreground(slab, slab_prediction):
    outside = (slab <= 0).all(dim=1, keepdim=True).expand_as(slab_prediction)
    assert outside.any()
    assert not slab_prediction[outside].any()


def test_same_seed_same_bytes(network, slab, slab_prediction):
    torch.manual_seed(12345)  # the global generator must not matter
    assert network(slab).numpy().tobytes() == slab_prediction.numpy().tobytes()


def test_batch_size_does_not_matter(same_seed, slab, slab_prediction):
    assert slab.shape[-1] > 16
    for batch_size in (1, 16, slab.shape[-1]):
        same_seed.batch_size = batch_size
        torch.testing.assert_close(same_seed(slab), slab_prediction, atol=1e-4, rtol=0)


def test_volumes_of_a_batch_do_not_meet(network, slab):
    """The same volume beside another one, and beside empty slices."""
    small = slab[..., :3]
    other = torch.cat([small.flip(2) * 0.5, small])
    other[0, ..., 1] = 0
    torch.testing.assert_close(network(other)[1:], network(small), atol=1e-4, rtol=0)
    assert not network(other)[0, ..., 1].any()


def test_empty_volume_is_healthy(network, metadata):
    assert not network(torch.zeros(1, len(metadata["modalities"]), 24, 20, 3)).any()


def test_outputs_are_on_the_grid_of_the_sample(sample_case, sample):
    assert {path.name for path in sample_case.iterdir()} == OUTPUTS
    image = nib.load(sample.images[0])
    several = (len(sample.images),) if len(sample.images) > 1 else ()
    outputs = [("anomaly_map", np.float32, ()), ("reconstruction", np.float32, several), ("segmentation", np.uint8, ())]
    for name, dtype, channels in outputs:
        written = nib.load(sample_case / f"{name}.nii.gz")
        assert written.shape == (*image.shape, *channels)
        assert np.array_equal(written.affine, image.affine)
        assert written.get_data_dtype() == dtype
        values = np.asarray(written.dataobj)
        assert np.isfinite(values).all()
        assert values.min() >= 0
        assert not values[~sample.foreground].any(), name


def test_lesions_of_the_sample_stand_out(sample_case, sample):
    inside, lesion = sample.foreground, sample.lesion
    assert 0.003 < lesion[inside].mean() < 0.05
    assert lesion[inside].sum() > 0.9 * lesion.sum()
    anomaly_map = load(sample_case / "anomaly_map.nii.gz")
    assert anomaly_map[inside & lesion].mean() > 1.5 * anomaly_map[inside & ~lesion].mean()
    assert auroc(*exact_histograms(anomaly_map[inside], lesion[inside])) > 0.7


def test_segmentation_is_the_map_above_the_shipped_threshold(sample_case, network):
    run = json.loads((sample_case / "run.json").read_text(encoding="utf-8"))
    mask = load(sample_case / "segmentation.nii.gz") > 0
    above = load(sample_case / "anomaly_map.nii.gz") > run["threshold"]
    assert run["threshold"] == float(network.calibration.threshold)
    assert not (mask & ~above).any()
    assert mask.sum() >= 0.5 * above.sum()  # small components are removed; a weak method may mark nothing


def test_run_is_recorded(sample_case, sample, bundle, metadata):
    run = json.loads((sample_case / "run.json").read_text(encoding="utf-8"))
    assert run["bundle"].split()[0] == bundle.name
    assert run["weights_sha256"] == sha256(bundle / "models" / "model.pt")
    assert run["input_sha256"] == {"image": digest(sample.images if len(sample.images) > 1 else sample.images[0])}
    assert run["seed"] == 0
    assert {"torch", "monai", "numpy", "nibabel", "uad-bundles"} <= set(run["versions"])
    assert 0 <= run["volume_score_percentile"] <= 100
