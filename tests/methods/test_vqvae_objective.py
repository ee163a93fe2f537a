"""The first stage of the latent DDPM and of the autoregressive transformers."""

import torch

from common.methods.latent_ddpm import VQVAEObjective
from common.networks.latent_space import LatentSpace
from common.networks.vq_autoencoder import VQAutoencoder


def latent_space():
    torch.manual_seed(0)
    return LatentSpace(VQAutoencoder(channels=(4, 8), num_res_layers=1, num_embeddings=16, embedding_dim=4), 4)


def slices():
    return torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(1))


def test_images_are_brightened_or_darkened_one_by_one_in_training_only():
    seen = []
    objective = VQVAEObjective(latent_space(), max_gain=0.2)
    objective.autoencoder.register_forward_pre_hook(lambda module, x: seen.append(x[0]))
    images = torch.full((64, 1, 16, 16), 0.9)
    objective.eval()(images)
    assert torch.equal(seen[0], images * 2 - 1)
    objective.train()(images)
    gain = ((seen[1] + 1) / 2 / 0.9)[:, 0, 0, 0]
    assert 0.8 - 1e-6 <= gain.min() < 0.85
    assert gain.max() <= 1 / 0.9 + 1e-6
    assert gain.unique().numel() > 30


def test_losses_of_the_first_stage():
    space = latent_space()
    objective, image = VQVAEObjective(space).eval(), slices()
    losses = objective(image)
    reconstruction, commitment, codes = space.autoencoder(image * 2 - 1)
    torch.testing.assert_close(losses["l1"], (reconstruction - image * 2 + 1).abs().mean())
    torch.testing.assert_close(losses["loss"], losses["l1"] + commitment)
    assert losses["codes_used"] == len(codes.unique())
    assert 1 <= losses["perplexity"] <= losses["codes_used"]


def test_first_stage_trains_encoder_decoder_and_codebook():
    space = latent_space()
    objective = VQVAEObjective(space).train()
    codebook = space.autoencoder.quantizer.embedding.weight
    before = codebook.clone()
    torch.manual_seed(0)
    losses = objective(slices())
    losses["loss"].backward()
    assert not codebook.requires_grad
    assert not torch.equal(codebook, before)
    assert losses["codes_used"] > 4
    assert all(p.grad.abs().max() > 0 for n, p in space.autoencoder.named_parameters() if "quantizer" not in n)
