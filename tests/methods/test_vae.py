import pytest
import torch
from monai.networks.nets import VarAutoEncoder

from common.methods.vae import VAE, VAEObjective, centred


def tiny(**settings):
    torch.manual_seed(0)
    network = VarAutoEncoder(2, (1, 16, 16), 1, 6, (4, 8), (2, 2), kernel_size=5, up_kernel_size=5, norm=None)
    return VAE(network, **{"median_size": 1, **settings}).eval()


def slices(batch=3, size=(16, 16)):
    image = torch.rand(batch, 1, *size, generator=torch.Generator().manual_seed(1)) * 0.9 + 0.1
    image[..., :3, :] = 0
    return image


def test_detection(check_detection):
    image = slices()
    detection = check_detection(tiny(), image)
    torch.testing.assert_close(detection.anomaly_map, (image - detection.reconstruction).abs())


def test_reconstruction_is_that_of_the_mean_and_not_of_mean_plus_deviation():
    detector, image = tiny(), slices()
    with torch.no_grad():
        mean, _ = detector.network.encode_forward(image)
        expected = detector.network.decode_forward(mean)
        monai = detector.network(image)[0]
    assert torch.equal(detector.detect(image).reconstruction, expected * (image > 0))
    assert (monai - expected).abs().max() > 1e-3


@pytest.mark.parametrize("size", [(16, 16), (9, 20), (17, 13), (1, 1), (40, 16)])
def test_slices_of_any_size_are_centred(size):
    detector, image = tiny(), slices(2, size) * 0.9 + 0.05
    detection = detector.detect(image)
    assert detection.anomaly_map.shape == image.shape
    beyond = centred(torch.ones(1, 1, 16, 16), size) == 0
    assert not detection.anomaly_map[:, :, beyond[0, 0]].any()
    assert (detection.anomaly_map[:, :, ~beyond[0, 0]] > 0).float().mean() > 0.9


@pytest.mark.parametrize("size", [(5, 8), (6, 7), (8, 5), (3, 12)])
def test_there_and_back(size):
    image = torch.arange(48.0).view(1, 1, 6, 8) + 1
    back = centred(centred(image, size), (6, 8))
    kept = back > 0
    assert torch.equal(back[kept], image[kept])
    assert kept.sum() == min(size[0], 6) * min(size[1], 8)


def test_slice_gives_the_same_alone_and_in_any_batch(check_batches):
    check_batches(tiny(median_size=3), slices())


@pytest.mark.parametrize(("mean", "std"), [(0.7, 1.0), (0.0, 0.3), (-1.5, 2.0)])
def test_loss_is_the_bound_over_the_number_of_pixels(mean, std):
    detector, image = tiny(), slices()
    posterior = torch.full((3, 6), mean), torch.full((3, 6), std).square().log()
    detector.posterior = lambda _: posterior
    detector.decode = lambda z, size: image - 0.25
    losses = VAEObjective(detector)(image)
    normal = torch.distributions.Normal
    kl = 6 * torch.distributions.kl_divergence(normal(mean, std), normal(0.0, 1.0))
    assert losses["kl"].item() == pytest.approx(kl.item(), rel=1e-5)
    assert losses["l1"].item() == pytest.approx(0.25)
    assert losses["loss"].item() == pytest.approx(0.25 + kl.item() / 256, rel=1e-5)


def test_latent_is_sampled_in_training_and_everything_is_trained():
    detector, image = tiny(), slices()
    seen = []
    decode = detector.decode
    detector.decode = lambda z, size: seen.append(z) or decode(z, size)
    objective = VAEObjective(detector).train()
    torch.manual_seed(0)
    objective(image)
    objective(image)["loss"].backward()
    assert (seen[0] - seen[1]).abs().max() > 0.1
    assert all(p.grad is not None for p in objective.parameters())
