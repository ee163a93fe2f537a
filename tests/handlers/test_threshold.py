"""The threshold of each location is fitted with the averaged weights, before they are written."""

import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor
from monai.networks.nets import DiffusionModelUNet
from torch import nn

from common.data.slices import SliceDataset
from common.handlers.threshold import FitThreshold
from common.handlers.training import ExponentialMovingAverage, SaveWeights
from common.methods.latent_ddpm import LatentDDPM, LatentDDPMObjective
from common.networks.latent_space import LatentSpace
from common.networks.volume import VolumeDetector
from common.networks.vq_autoencoder import VQAutoencoder
from common.schedulers.gaussian import GaussianScheduler
from common.weights import load_weights


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


@pytest.fixture
def dataset():
    image = torch.rand(1, 8, 8, 11, generator=torch.Generator().manual_seed(0)) * 0.9 + 0.1
    return SliceDataset([{"image": image}], lambda item: {"image": MetaTensor(item["image"])})


def trained(volume, dataset, path, batch_size=4):
    """A trainer that is at its end, of weights that differ from their average."""
    average = ExponentialMovingAverage(LatentDDPMObjective(volume.detector))
    average.update(None)
    for parameter in average.module.detector.unet.parameters():
        parameter.data.mul_(1.5)
    average.train()
    trainer = Engine(lambda engine, batch: None)
    for handler in (FitThreshold(average, dataset, batch_size), SaveWeights(volume, average, str(path))):
        handler.attach(trainer)
    trainer.run([0], max_epochs=1)
    return average.module.detector


def test_threshold_of_the_average_is_written_in_full_precision(dataset, tmp_path):
    detector = trained(network(), dataset, tmp_path / "model.pt")
    stored = load_weights(tmp_path / "model.pt")
    assert stored["detector.threshold"].dtype == torch.float64
    assert torch.equal(stored["detector.threshold"], detector.threshold)
    assert stored["detector.threshold"].isfinite().all()

    expected = network().detector
    expected.load_state_dict(detector.state_dict())
    expected.fit_threshold([torch.stack([item["image"] for item in dataset])])
    torch.testing.assert_close(expected.threshold, detector.threshold, rtol=1e-4, atol=0)
    unaveraged = network().detector
    unaveraged.fit_threshold([torch.stack([item["image"] for item in dataset])])
    assert ((unaveraged.threshold - detector.threshold) / detector.threshold).abs().max() > 0.01


def test_batch_size_does_not_matter(dataset, tmp_path):
    one, other = (trained(network(), dataset, tmp_path / f"{n}.pt", n).threshold for n in (1, 11))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=0)


def test_weights_with_the_threshold_load_strictly(dataset, tmp_path):
    trained(network(), dataset, tmp_path / "model.pt")
    loaded = network()
    loaded.load_state_dict(load_weights(tmp_path / "model.pt"))
    assert loaded.detector.threshold.isfinite().all()
