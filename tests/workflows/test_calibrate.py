"""Calibration: of the map, and of a threshold that the method has of its own."""

import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor
from monai.networks.nets import DiffusionModelUNet
from torch import nn

from common.detection.fingerprint import of_map
from common.detection.volume import VolumeDetector
from common.diffusion.gaussian import GaussianScheduler
from common.methods.latent_ddpm import LatentDDPM
from common.networks.latent_space import LatentSpace
from common.networks.vq_autoencoder import VQAutoencoder
from common.transforms.pipeline import BrainPreprocessing
from common.transforms.postprocess import read_calibration
from common.weights import load_into, load_weights, save_weights
from common.workflows.calibrate import Calibrate
from common.workflows.slices import SliceDataset


def network():
    torch.manual_seed(0)
    autoencoder = VQAutoencoder(channels=(4,), num_res_layers=1, num_embeddings=8, embedding_dim=4)
    unet = DiffusionModelUNet(2, 4, 4, 1, (4,), (False,), norm_num_groups=2, num_head_channels=4)
    for parameter in unet.parameters():
        nn.init.normal_(parameter, std=0.2)
    scheduler = GaussianScheduler(10, beta_end=0.3)
    return VolumeDetector(
        LatentDDPM(LatentSpace(autoencoder, 2), unet, scheduler, (4, 4), kl_range=(4, 6), healing_start=5)
    )


def preprocessing():
    return BrainPreprocessing(spacing_mm=2.0, percentile=98.0, upper=0.8, canvas=8, strip="atlas")


@pytest.fixture
def dataset():
    image = torch.rand(1, 8, 8, 11, generator=torch.Generator().manual_seed(0)) * 0.9 + 0.1
    return SliceDataset([{"image": image}], lambda item: {"image": MetaTensor(item["image"])})


def calibrated(volume, path, slices=None):
    """Weights after a calibration on one healthy subject, whose map is 1 to 100."""
    save_weights(volume.state_dict(), path)
    brain = MetaTensor(torch.ones(1, 10, 10, 1).bool())
    case = {"anomaly_map": MetaTensor(torch.arange(1.0, 101).view(1, 10, 10, 1))}
    evaluator = Engine(lambda engine, batch: [case])
    evaluator.network, evaluator.weights, evaluator.preprocessing = volume, str(path), preprocessing()
    Calibrate(slices=slices).attach(evaluator)
    evaluator.run([[{"brain": brain}]], max_epochs=1)
    return load_weights(path)


def test_map_is_calibrated(tmp_path):
    stored = calibrated(network(), tmp_path / "model.pt")
    assert 98 < stored["calibration.threshold"] < 100
    assert (stored["calibration.score_quantiles"] == 100).all()
    assert stored["calibration.subjects"] == 1
    assert read_calibration(tmp_path / "model.pt").settings == of_map(network(), preprocessing())
    assert (stored["detector.threshold"] == 0).all()


def test_threshold_of_the_method_is_fitted_and_written_in_full_precision(dataset, tmp_path):
    volume = network()
    stored = calibrated(volume, tmp_path / "model.pt", dataset)
    assert stored["detector.threshold"].dtype == torch.float64
    expected = network()
    load_into(expected, tmp_path / "model.pt")
    assert torch.equal(expected.detector.threshold, volume.detector.threshold)
    expected.detector.fit_threshold(torch.stack([item["image"] for item in dataset]).split(4))  # other batches
    torch.testing.assert_close(expected.detector.threshold, stored["detector.threshold"], rtol=1e-4, atol=0)
    assert stored["calibration.threshold"].isfinite()
