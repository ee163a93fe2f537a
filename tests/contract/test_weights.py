"""The shipped weights: safe to load, complete, calibrated, and they matter."""

from __future__ import annotations

import copy

import pytest
import torch

from common.detection.calibration import N_QUANTILES, Calibration

FEWEST_SUBJECTS = 10


def test_file_holds_tensors_only_and_all_of_them(bundle, network):
    state = torch.load(bundle / "models" / "model.pt", weights_only=True, map_location="cpu")
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    later = {f"calibration.{name}" for name in Calibration.sized_by_file}  # which older weights lack
    assert state.keys() | later == network.state_dict().keys()
    for name, value in state.items():
        assert value.shape == network.state_dict()[name].shape, name
        if name.startswith("detector.") and value.is_floating_point():
            assert value.isfinite().all(), name


def test_calibrated_on_enough_subjects(network):
    calibration = network.calibration
    assert calibration.is_fitted
    assert int(calibration.subjects) >= FEWEST_SUBJECTS
    assert torch.isfinite(calibration.threshold)
    assert float(calibration.threshold) > 0
    assert 0 < float(calibration.false_positive_share) <= 0.05
    assert len(calibration.score_quantiles) == N_QUANTILES
    assert (calibration.score_quantiles.diff() >= 0).all()
    assert float(calibration.score_quantiles[-1]) > 0
    if len(calibration.threshold_interval):
        low, high = calibration.threshold_interval.tolist()
        assert low <= float(calibration.threshold) <= high


def test_normalisation_is_fitted(network):
    normalisation = network.normalisation
    if normalisation is None:
        pytest.skip("the map of this bundle is not normalised")
    assert normalisation.is_fitted
    assert (normalisation.scale_quantiles.diff() >= 0).all()
    assert float(normalisation.scale_quantiles[0]) > 0
    assert normalisation.atlas.isfinite().all()
    assert normalisation.atlas.any() == normalisation.healthy_atlas


@torch.no_grad()
def test_every_network_matters(network, slab, slab_prediction):
    """A part whose weights were never loaded, or are zero, would not be missed by a strict load."""
    parts = [name for name, part in network.detector.named_children() if list(part.parameters())]
    assert parts
    for part in parts:
        other = copy.deepcopy(network)
        generator = torch.Generator().manual_seed(0)
        for value in getattr(other.detector, part).parameters():
            value.mul_(1 + 0.1 * torch.randn(value.shape, generator=generator))
        assert (other(slab[..., 8:10]) - slab_prediction[..., 8:10]).abs().max() > 1e-3, part
