"""The VQ-VAE: MONAI's quantiser (golden/latent_ddpm/README.md), and a codebook that is used."""

import pytest
import torch
from arrays import golden

from common.errors import SettingError
from common.networks.latent_space import LatentSpace
from common.networks.vq_autoencoder import DECAY, VQAutoencoder, codebook_use, far_apart


def tiny(num_embeddings=8):
    torch.manual_seed(0)
    return VQAutoencoder(channels=(4, 8), num_res_layers=1, num_embeddings=num_embeddings, embedding_dim=3).eval()


@pytest.fixture
def g():
    return golden("latent_ddpm/vq")


def quantiser_of(g, cluster_size=0.0):
    """With the codebook of the golden arrays."""
    assert float(g["decay"]) == pytest.approx(DECAY)
    network = VQAutoencoder(channels=(4,), num_embeddings=4, embedding_dim=2)
    network.quantizer.embedding.weight.data.copy_(g["codebook"])
    network.quantizer.ema_w.copy_(g["codebook"])
    network.quantizer.ema_cluster_size.fill_(cluster_size)
    return network


def update(network, z):
    """What one training pass does to the codebook when the encoder gives z."""
    network.vqvae.encoder = torch.nn.Identity()
    network.vqvae.decoder = torch.nn.Identity()
    return network.train()(z)


def test_codes_and_quantised_latents(g):
    network = quantiser_of(g)
    codes = network.nearest_codes(g["x"])
    assert torch.equal(codes, g["indices"])
    torch.testing.assert_close(network.embed(codes), g["z_q"])


def test_commitment_and_straight_through_gradient(g):
    x = g["x"].requires_grad_()
    quantised, commitment, codes = update(quantiser_of(g, cluster_size=1.0), x)
    torch.testing.assert_close(commitment, g["commit_loss"].float())
    assert torch.equal(codes, g["indices"])
    (quantised * g["upstream"]).sum().add(commitment).backward()
    torch.testing.assert_close(x.grad, g["grad_x"])


def test_update_from_codes_in_use_is_a_moving_average(g):
    network = quantiser_of(g, cluster_size=1.0)
    update(network, g["x"])
    torch.testing.assert_close(
        network.quantizer.embedding.weight.double(), g["fixed_init_cluster_ones_codebook"], rtol=1e-4, atol=1e-5
    )


def test_stock_codebook_explodes_and_ours_does_not(g):
    stock, ours = quantiser_of(g), quantiser_of(g)
    stock.restart_below = 0.0
    update(stock, g["x"])
    torch.testing.assert_close(stock.quantizer.embedding.weight, g["after_train_codebook"], rtol=1e-3, atol=1e-3)
    update(ours, g["x"])
    assert stock.quantizer.embedding.weight.abs().max() > 1e5
    assert ours.quantizer.embedding.weight.abs().max() <= g["x"].abs().max() + 1e-3


def toy_images(count=32):
    """Discs of random place, size and grey value on black: mostly background, as slices are."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    centre, radius = torch.rand(2, count, 1, 1, generator=generator) * 8 + 4, torch.rand(count, 1, 1) * 3 + 2
    disc = ((rows - centre[0]) ** 2 + (columns - centre[1]) ** 2).sqrt() < radius
    return (disc * (torch.rand(count, 1, 1, generator=generator) * 0.8 + 0.2))[:, None]


def codes_in_use_after(steps, restart_below=VQAutoencoder.restart_below):
    network, images = tiny(16).train(), toy_images()
    network.restart_below = restart_below
    network.requires_grad_(True)
    network.quantizer.embedding.requires_grad_(False)
    optimizer = torch.optim.Adam((p for p in network.parameters() if p.requires_grad), lr=1e-3)
    for _ in range(steps):
        reconstruction, commitment, codes = network(images)
        loss = (reconstruction - images).abs().mean() + commitment
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return codebook_use(codes, 16)


def test_codebook_does_not_collapse():
    used, perplexity = codes_in_use_after(100)
    assert used >= 12
    assert perplexity > 6
    stock_used, _ = codes_in_use_after(30, restart_below=0.0)
    assert stock_used <= 2


def test_code_that_falls_out_of_use_restarts_and_the_others_stay():
    network, z = tiny(4), torch.randn(2, 3, 4, 4)
    quantizer = network.quantizer
    quantizer.ema_cluster_size.copy_(torch.tensor([5.0, 0.05, 3.0, 0.11]))
    before = quantizer.embedding.weight.clone()
    network.restart_unused_codes(z)
    after = quantizer.embedding.weight
    assert torch.equal(after[[0, 2, 3]], before[[0, 2, 3]])
    assert (z.movedim(1, -1).flatten(0, -2) == after[1]).all(dim=1).any()
    assert quantizer.ema_cluster_size.tolist() == pytest.approx([5.0, 1.0, 3.0, 0.11])
    torch.testing.assert_close(quantizer.ema_w[1], after[1].double())


def test_equal_points_are_taken_once():
    points = torch.cat([torch.zeros(500, 2), torch.tensor([[3.0, 0.0], [0.0, 5.0], [9.0, 9.0]])])
    torch.manual_seed(0)
    assert {tuple(p) for p in far_apart(points, points[:0], 4).tolist()} == {(0, 0), (3, 0), (0, 5), (9, 9)}
    assert {tuple(p) for p in far_apart(points, torch.zeros(1, 2), 3).tolist()} == {(3, 0), (0, 5), (9, 9)}
    assert far_apart(points[:5], points[:0], 3).tolist() == [[0, 0]] * 3


def test_codebook_use():
    used, perplexity = codebook_use(torch.tensor([[0, 0], [3, 3]]), 8)
    assert used == 2
    assert perplexity.item() == pytest.approx(2)


def test_encoding_never_changes_the_codebook():
    """MONAI's `index_quantize` does, in training mode, in which the detector is while its U-Net is trained."""
    network, image = tiny().train(), torch.rand(2, 1, 16, 16)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network.decode(network.encode(image)[0])
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    network.vqvae.index_quantize(image)
    assert any(not torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_nearest_codes_are_found_in_full_precision():
    network = tiny(64)
    codebook = network.quantizer.embedding.weight.data.mul_(0.02).add_(1)
    z = codebook.T.reshape(1, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network.nearest_codes(z).flatten(), torch.arange(64))
        assert not torch.equal(network.quantizer.quantize(z)[2].flatten(), torch.arange(64))  # MONAI's alone


def test_is_the_autoencoder_of_a_latent_space():
    network, image = tiny(), torch.rand(2, 1, 16, 24)
    space = LatentSpace(network, 4)
    space.scale.fill_(3.0)
    z, std = space.posterior(image)
    assert z.shape == std.shape == (2, 3, 4, 6)
    assert not std.any()
    reconstruction, _, codes = network(image * 2 - 1)
    torch.testing.assert_close(z, network.embed(codes) * 3)
    torch.testing.assert_close(space.decode(z), (reconstruction + 1) / 2)
    torch.testing.assert_close(space.decode(z + 1e-4), space.decode(z))  # quantises before it decodes


@pytest.mark.parametrize("codes", [[[[0, 8]]], [[[-1, 0]]]])
def test_codes_outside_of_the_codebook_are_refused(codes):
    with pytest.raises(SettingError, match=r"in \[0, 8\)"):
        tiny().embed(torch.tensor(codes))


def test_parameters_of_the_paper_size():
    network = VQAutoencoder(channels=(256, 256), num_embeddings=16, embedding_dim=64)
    assert sum(p.numel() for p in network.parameters()) == 11_843_649
    network = VQAutoencoder(channels=(256, 256, 256), num_embeddings=256, embedding_dim=128)
    assert sum(p.numel() for p in network.parameters()) == 18_988_673
