"""What every method promises of its detections, whatever its maps mean."""

from __future__ import annotations

import pytest
import torch


def check_detection(detector, image, above=1e-3):
    """The contract of `Detection` for three slices, in each of which the map rises `above`; returns it."""
    detection = detector.detect(image, seeds=torch.arange(len(image)))
    foreground = (image > 0).any(dim=1, keepdim=True)
    assert detection.anomaly_map.shape == foreground.shape
    assert detection.anomaly_map.dtype == torch.float32
    assert detection.anomaly_map.min() >= 0
    assert (detection.anomaly_map.flatten(1).max(dim=1).values > above).all()
    assert (detection.anomaly_map[~foreground] == 0).all()
    assert detection.reconstruction.shape == image.shape
    assert (detection.reconstruction * ~foreground == 0).all()
    assert 0 <= detection.reconstruction.min() <= detection.reconstruction.max() <= 1
    assert detection.score is None or (detection.score.shape == (len(image),) and (detection.score > 0).all())
    assert detection.score is None or not detector.has_separate_score
    return detection


def check_batches(detector, image, score_rtol=0.0):
    """A slice gives the same alone, in a batch, and in a batch of another order."""
    seeds = torch.tensor([7, 3, 11])
    together, reverse = detector.detect(image, seeds=seeds), detector.detect(image.flip(0), seeds=seeds.flip(0))
    torch.testing.assert_close(reverse.anomaly_map.flip(0), together.anomaly_map, atol=1e-5, rtol=0)
    for index in range(3):
        alone = detector.detect(image[index : index + 1], seeds=seeds[index : index + 1])
        torch.testing.assert_close(alone.anomaly_map[0], together.anomaly_map[index], atol=1e-5, rtol=0)
        torch.testing.assert_close(alone.reconstruction[0], together.reconstruction[index], atol=1e-5, rtol=0)
        if together.score is not None:
            torch.testing.assert_close(alone.score[0], together.score[index], atol=1e-5, rtol=score_rtol)


def check_seeds(detector, image, differ=1e-3):
    """The seed, and no global generator, decides: another one changes the map by more than `differ`."""
    state = torch.get_rng_state()
    first = detector.detect(image, seeds=torch.tensor([1])).anomaly_map
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    again, other = (detector.detect(image, seeds=torch.tensor([seed])).anomaly_map for seed in (1, 2))
    assert torch.equal(first, again)
    assert (first - other).abs().max() > differ


def check_training(objective, *given, below, steps=30, lr=0.01, parts=("loss",), ends=(3, 5), **named):
    """Steps on the same batch bring these parts of the loss `below` that share of what they were.

    ends: how many of the first and of the last losses the means are of.
    """
    optimizer = torch.optim.Adam([p for p in objective.parameters() if p.requires_grad], lr=lr)
    history = []
    for _ in range(steps):
        optimizer.zero_grad()
        losses = objective(*given, **named)
        losses["loss"].backward()
        optimizer.step()
        history.append([losses[part].item() for part in parts])
    start, end = (torch.tensor(part).mean(dim=0) for part in (history[: ends[0]], history[-ends[1] :]))
    assert (end < below * start).all(), f"{start.tolist()} to {end.tolist()}"


@pytest.fixture(name="check_detection")
def check_detection_fixture():
    return check_detection


@pytest.fixture(name="check_batches")
def check_batches_fixture():
    return check_batches


@pytest.fixture(name="check_seeds")
def check_seeds_fixture():
    return check_seeds


@pytest.fixture(name="check_training")
def check_training_fixture():
    return check_training
