"""The autoregressive transformers against a toy model (golden/latent_ddpm/README.md), and the contract of a method."""

import pytest
import torch
from arrays import generators, golden, slices
from torch import nn
from torch.nn import functional as F

from common.errors import BundleError, ImageShapeError, SettingError
from common.methods.ar_transformer import (
    ORDERINGS,
    ARTransformer,
    ARTransformerObjective,
    draw,
    sequence_order,
    unflatten,
)
from common.networks.latent_space import LatentSpace
from common.networks.vq_autoencoder import VQAutoencoder
from common.weights import load_into, save_weights


def tiny(num_embeddings=16, channels=1, latent_size=(4, 4), **settings):
    torch.manual_seed(0)
    autoencoder = VQAutoencoder(
        in_channels=channels, channels=(4, 8), num_res_layers=1, num_embeddings=num_embeddings, embedding_dim=4
    )
    space = LatentSpace(autoencoder, 4)
    space.scale.fill_(0.7)
    # codes that encoder outputs are near to
    autoencoder.restart_unused_codes(autoencoder.vqvae.encode(slices(8, channels) * 2 - 1).detach())
    settings = {"num_orderings": 2, "dim": 8, "depth": 2, "heads": 2, "threshold": 0.06, "sigma_px": 1.0, **settings}
    detector = ARTransformer(space, latent_size, **settings).eval()
    for parameter in detector.transformers.parameters():
        nn.init.normal_(parameter, std=0.3)
    return detector


class Toy(nn.Module):
    """The model of the golden arrays: logits by position and token before. Stands for a transformer and its reader."""

    def __init__(self, logits):
        super().__init__()
        self.table, self.length, self.read_tokens = logits, 0, []

    def forward(self, tokens):
        return self.table[torch.arange(tokens.shape[1]), tokens]

    def read(self, tokens):
        positions = torch.arange(self.length, self.length + tokens.shape[1])
        self.length += tokens.shape[1]
        self.read_tokens.append(tokens)
        return self.table[positions, tokens]


@pytest.fixture
def toy():
    g = golden("latent_ddpm/ar_heal")
    detector = tiny(4, latent_size=(3, 3), threshold=float(g["threshold"]), num_orderings=1)
    model = Toy(g["logits_by_position_and_prev_token"])
    detector.transformers = nn.ModuleList([model])
    return detector, model, g


@pytest.mark.parametrize("size", [(3, 3), (3, 4)])
def test_orderings(size):
    g = golden("latent_ddpm/orderings")
    assert len(ORDERINGS) == 8
    for index, (transpose, rows, columns) in enumerate(ORDERINGS):
        key = f"{size[0]}x{size[1]}_T{transpose:d}_R{rows:d}{columns:d}"
        order = sequence_order(size, index)
        assert torch.equal(order, g[f"{key}_seq"])
        assert torch.equal(order.argsort(), g[f"{key}_rev"])
        cells = torch.arange(12).view(2, 6).repeat(1, 2)[:, : size[0] * size[1]]
        assert torch.equal(unflatten(cells[:, order], order, torch.Size([2, *size])), cells.view(2, *size))


def test_likelihood_and_mask(toy):
    detector, _, g = toy
    log_likelihood = detector.log_likelihood(g["sequence"][None], 0)
    torch.testing.assert_close(log_likelihood[0], g["log_likelihood"])
    assert torch.equal(detector.unlikely(log_likelihood)[0], g["resample_mask"])


def test_healing(toy):
    detector, model, g = toy
    healed = detector.heal(g["sequence"][None], g["resample_mask"][None], model, generators(0))
    assert torch.equal(healed[0], g["healed_argmax"])
    read = torch.cat(model.read_tokens, dim=1)[0]
    assert read[0] == g["bos"]
    assert torch.equal(read[1:], g["healed_argmax"][: len(read) - 1])  # the healed prefix, each token once


@pytest.mark.parametrize("mode", ["argmax", "sample"])
@torch.no_grad()
def test_healing_with_a_cache_is_healing_without(mode):
    detector = tiny(mode=mode)
    generator = torch.Generator().manual_seed(0)
    sequence = torch.randint(16, (3, 16), generator=generator)
    unlikely = torch.rand(3, 16, generator=generator) < 0.3
    healed = detector.heal(sequence, unlikely, detector.reader(1), generators(1, 2, 3))
    own, expected = generators(1, 2, 3), sequence.clone()
    for position in range(16):
        logits = detector.logits(expected, 1)[:, position, :16]
        for i in range(3):
            if unlikely[i, position]:
                token = logits[i].argmax() if mode == "argmax" else draw(logits[i], own[i])
                expected[i, position] = token
    assert torch.equal(healed, expected)
    assert torch.equal(healed[~unlikely], sequence[~unlikely])
    assert (healed != sequence).any()


def test_begin_token_is_never_put_into_an_image(toy):
    detector, model, g = toy
    model.table[..., 4] = 50.0
    for detector.mode in ("argmax", "sample"):
        model.length = 0
        healed = detector.heal(g["sequence"][None], torch.ones(1, 9, dtype=torch.bool), model, generators(0))
        assert healed.max() < 4


def test_tokens_are_drawn_by_their_probability():
    logits, generator = torch.tensor([0.2, 0.5, 0.0, 0.3]).log(), torch.Generator().manual_seed(0)
    drawn = torch.tensor([draw(logits, generator) for _ in range(2000)])
    share = torch.bincount(drawn, minlength=4) / 2000
    torch.testing.assert_close(share, logits.exp(), atol=0.04, rtol=0)
    assert share[2] == 0


def test_map_is_the_mean_over_the_orderings():
    ensemble, image = tiny(num_orderings=8), slices()
    together = ensemble.detect(image)
    maps, scores = [], []
    for index in range(8):
        single = tiny(num_orderings=8)
        single.transformers = nn.ModuleList([ensemble.transformers[index]])
        single.sequence = lambda codes, _, index=index: ensemble.sequence(codes, index)
        detection = single.detect(image)
        maps.append(detection.anomaly_map)
        scores.append(detection.score)
    torch.testing.assert_close(together.anomaly_map, torch.stack(maps).mean(dim=0), atol=1e-5, rtol=0)
    torch.testing.assert_close(together.score, torch.stack(scores).mean(dim=0))
    assert torch.stack(maps).std(dim=0).max() > 1e-2


@pytest.mark.parametrize("count", [1, 3])
def test_weights_of_the_ensemble_load_into_fewer_orderings(count, tmp_path):
    ensemble, few, image = tiny(num_orderings=8), tiny(num_orderings=count), slices()
    save_weights(ensemble.state_dict(), tmp_path / "model.pt")
    nn.init.zeros_(few.transformers[0].to_logits.weight)  # else they are alike from the beginning
    for detector in (ensemble, few):
        load_into(detector, tmp_path / "model.pt")
    ensemble.transformers = ensemble.transformers[:count]
    expected, found = ensemble.detect(image), few.detect(image)
    assert torch.equal(found.anomaly_map, expected.anomaly_map)
    assert torch.equal(found.score, expected.score)


def test_weights_of_fewer_orderings_are_no_ensemble(tmp_path):
    save_weights(tiny(num_orderings=2).state_dict(), tmp_path / "model.pt")
    with pytest.raises(BundleError, match=r"missing: transformers\.2\..* and \d+ more"):
        load_into(tiny(num_orderings=3), tmp_path / "model.pt")


@pytest.mark.parametrize("count", [0, -1, 9])
def test_orderings_that_there_are_not(count):
    with pytest.raises(SettingError, match="choose 1 to 8"):
        tiny(num_orderings=count)


def test_score_is_the_negative_log_likelihood_of_the_codes():
    detector, image = tiny(num_orderings=1), slices()
    codes = detector.latent_space.autoencoder.nearest_codes(
        detector.latent_space.autoencoder.vqvae.encode(image * 2 - 1)
    )
    with torch.no_grad():
        log_p = detector.transformers[0](torch.cat([torch.full((3, 1), 16), codes.flatten(1)[:, :-1]], 1)).log_softmax(
            2
        )
    expected = -torch.stack([log_p[i, range(16), codes[i].flatten()].sum() for i in range(3)])
    torch.testing.assert_close(detector.detect(image).score, expected)


def test_score_costs_no_pass_beside_those_of_the_map(monkeypatch):
    detector, image, seen = tiny(num_orderings=2), slices(), []
    logits = detector.logits
    monkeypatch.setattr(detector, "logits", lambda sequence, index: seen.append(index) or logits(sequence, index))
    detector.detect(image)
    assert seen == [0, 1]


def test_nothing_unlikely_nothing_found():
    detector, image = tiny(threshold=0.0), slices()
    detection = detector.detect(image)
    assert not detection.anomaly_map.any()
    z, _ = detector.latent_space.posterior(image)
    expected = detector.latent_space.decode(z).clamp(0, 1) * (image > 0)
    torch.testing.assert_close(detection.reconstruction, expected, atol=1e-5, rtol=0)


def test_map_of_the_surprisal_is_minus_log_p_of_the_codes_and_needs_no_healing():
    detector, single, image = tiny(map_kind="surprisal"), tiny(map_kind="surprisal", num_orderings=1), slices()
    single.transformers = detector.transformers[:1]
    with torch.no_grad():
        codes = detector.codes(detector.latent_space.posterior(image)[0])
        parts = [detector.sequence(codes, index) for index in range(2)]
        log_p = [detector.log_likelihood(sequence, index) for index, (sequence, _) in enumerate(parts)]
    surprisal = sum(-unflatten(p, order, codes.shape) for p, (_, order) in zip(log_p, parts, strict=True)) / 2
    expected = F.interpolate(surprisal[:, None], scale_factor=4, mode="bilinear") * (image > 0)
    found = detector.detect(image)
    torch.testing.assert_close(found.anomaly_map, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.reconstruction, single.detect(image).reconstruction)
    assert not torch.allclose(found.anomaly_map, single.detect(image).anomaly_map, atol=1e-2)


# --- the contract ---


@pytest.mark.parametrize("mode", ["argmax", "sample"])
@pytest.mark.parametrize("map_kind", ["residual", "surprisal"])
@pytest.mark.parametrize("channels", [1, 2])
def test_detection(check_detection, mode, map_kind, channels):
    check_detection(tiny(mode=mode, map_kind=map_kind, channels=channels), slices(channels=channels))


@pytest.mark.parametrize("mode", ["argmax", "sample"])
def test_slice_gives_the_same_alone_and_in_any_batch(check_batches, mode):
    check_batches(tiny(mode=mode), slices(), score_rtol=1e-4)


def test_samples_depend_on_the_seed_alone(check_seeds):
    check_seeds(tiny(mode="sample"), slices(1), differ=1e-4)


def test_smaller_slices_are_fine_and_larger_ones_refused():
    detector = tiny()
    assert detector.detect(torch.rand(1, 1, 8, 12)).anomaly_map.shape == (1, 1, 8, 12)
    with pytest.raises(ImageShapeError, match="16 x 20 pixels have more than 16 codes"):
        detector.detect(torch.rand(1, 1, 16, 20))
    with pytest.raises(ImageShapeError, match="multiples of 4"):
        detector.detect(torch.rand(1, 1, 15, 16))


# --- the training objective ---


def test_loss_is_the_mean_negative_log_likelihood():
    detector, image = tiny(num_orderings=3), slices()
    objective = ARTransformerObjective(detector)
    score = detector.detect(image).score.mean() / 16
    torch.testing.assert_close(objective(image)["loss"], score)
    torch.testing.assert_close(objective(posterior=detector.latent_space.posterior(image))["loss"], score)
    with pytest.raises(ValueError, match="give images"):
        objective()


def test_only_the_transformers_are_trained():
    objective = ARTransformerObjective(tiny()).train()
    objective(slices())["loss"].backward()
    used = [p for n, p in objective.detector.transformers.named_parameters() if "norm_cross_attn" not in n]
    assert all(p.grad is not None for p in used)
    assert all(p.grad is None for p in objective.detector.latent_space.parameters())
