"""From the prediction to map, reconstruction and segmentation."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from common.detection.calibration import Calibration
from common.errors import BundleError
from common.transforms.postprocess import ScoreVolumed, SegmentAnomaliesd, SplitPredictiond, segment, shipped_threshold
from common.weights import save_weights

AFFINE = np.diag([2.0, 2.0, 2.0, 1.0])


def make_map():
    """(1, 12, 12, 12) with components of 1, 4 and 27 voxels at 0.5 over 0.1."""
    values = torch.full((1, 12, 12, 12), 0.1)
    values[0, 1, 1, 1] = 0.5
    values[0, 4:6, 4:6, 1] = 0.5
    values[0, 7:10, 7:10, 7:10] = 0.5
    return MetaTensor(values, affine=AFFINE)


@pytest.mark.parametrize(("voxels", "kept"), [(1, 32), (2, 31), (4, 31), (5, 27), (27, 27), (28, 0)])
@pytest.mark.parametrize("spacing_mm", [(2, 2, 2), (0.9, 0.9, 3), (0.7, 1.1, 1.3)])
def test_components_below_the_volume_are_removed(voxels, kept, spacing_mm):
    anomaly_map = make_map()
    anomaly_map.affine = np.diag([*spacing_mm, 1.0])
    volume_ml = voxels * np.prod(spacing_mm) / 1000
    result = SegmentAnomaliesd(threshold=0.3, min_volume_ml=volume_ml)({"pred": anomaly_map})
    assert int(result["segmentation"].sum()) == kept


def test_components_touch_at_their_corners():
    values = np.zeros((4, 4, 4))
    values[1, 1, 1] = values[2, 2, 2] = 1
    assert segment(values, 0.5, 2).sum() == 2


def test_threshold_is_exceeded_not_reached():
    assert not segment(np.full((3, 3, 3), 0.5), 0.5, 1).any()


def test_nothing_found_is_an_empty_mask():
    mask = segment(np.zeros((3, 3, 3)), 0.5, 1)
    assert mask.dtype == np.uint8
    assert not mask.any()


def test_prediction_is_the_mask_for_viewers_and_the_map_when_asked():
    result = SegmentAnomaliesd(threshold=0.3)({"pred": make_map()})
    assert result["pred"].dtype == torch.uint8
    assert torch.equal(result["pred"].as_tensor(), result["segmentation"].as_tensor())
    assert np.array_equal(result["segmentation"].affine, AFFINE)
    assert result["threshold"] == 0.3
    result = SegmentAnomaliesd(threshold=0.3, save_map=True)({"pred": make_map()})
    assert torch.equal(result["pred"].as_tensor(), make_map().as_tensor())


def test_threshold_comes_from_the_weights(tmp_path):
    calibration = Calibration()
    path = tmp_path / "model.pt"
    save_weights({f"calibration.{name}": value for name, value in calibration.state_dict().items()}, path)
    with pytest.raises(BundleError, match="not calibrated"):
        SegmentAnomaliesd(weights=path)({"pred": make_map()})
    calibration.fit(0.3, 0.01, torch.rand(12))
    save_weights({f"calibration.{name}": value for name, value in calibration.state_dict().items()}, path)
    result = SegmentAnomaliesd(weights=path)({"pred": make_map()})
    assert result["threshold"] == 0.3
    assert int(result["segmentation"].sum()) == 31
    with pytest.raises(BundleError, match="no weights"):
        SegmentAnomaliesd(weights=tmp_path / "none.pt")({"pred": make_map()})
    with pytest.raises(ValueError, match="threshold"):
        SegmentAnomaliesd()


def test_configs_show_the_threshold_if_there_is_one(tmp_path):
    calibration = Calibration()
    path = tmp_path / "model.pt"
    assert shipped_threshold(path) is None
    save_weights({f"calibration.{name}": value for name, value in calibration.state_dict().items()}, path)
    assert shipped_threshold(path) is None
    calibration.fit(0.3, 0.01, torch.rand(12))
    save_weights({f"calibration.{name}": value for name, value in calibration.state_dict().items()}, path)
    assert shipped_threshold(path) == 0.3


def test_score_is_json(tmp_path):
    """27 + 4 + 1 voxels of 0.5; the brain is the half with the 27, of which the highest 1 % are 9 of them."""
    calibration = Calibration()
    calibration.fit(0.2, 0.01, torch.linspace(0.3, 0.7, 101))
    path = tmp_path / "model.pt"
    save_weights({f"calibration.{name}": value for name, value in calibration.state_dict().items()}, path)
    brain = MetaTensor(torch.arange(12).view(1, 12, 1, 1).expand(1, 12, 12, 12) >= 6, affine=AFFINE)
    anomaly_map = make_map() * brain
    data = {"anomaly_map": anomaly_map, "brain": brain, "threshold": 0.3}
    result = json.loads(json.dumps(ScoreVolumed(path)(data)["result"]))
    share, percentile = 27 / (6 * 12 * 12), 100 * 50 / 101
    assert result["threshold"] == 0.3
    assert result["volume_score"] == pytest.approx(0.5)
    assert result["volume_score_percentile"] == pytest.approx(percentile, abs=1)
    assert result["abnormal_share"] == pytest.approx(share)


@pytest.mark.parametrize("of_the_brain", [True, False])
def test_what_was_measured_decides_without_a_normalisation_too(tmp_path, of_the_brain):
    """A map in its own units has no scale; and a head CT has neither tissues nor a spacing that is known."""
    calibration = Calibration()
    calibration.fit(0.2, 0.01, torch.rand(12))
    path = tmp_path / "model.pt"
    save_weights({f"calibration.{name}": value for name, value in calibration.state_dict().items()}, path)
    thick = np.diag([2.0, 2.0, 5.0, 1.0])
    image = MetaTensor(torch.ones(1, 12, 12, 12), affine=thick)
    data = {"anomaly_map": image, "brain": MetaTensor(image > 0, affine=thick), "threshold": 0.3}
    if of_the_brain:
        measured = {"contrast_order": 0.1, "vessel_share": torch.tensor(np.nan, dtype=torch.float64)}
        data |= measured | {"tissue_modes": torch.tensor([[0.3, 0.6, 0.8]], dtype=torch.float64)}
        expected = {"contrast_order": 0.1, "vessel_share": None, "tissue_modes": [0.3, 0.6, 0.8]}
        said = ["T1", "slices of 5.0 mm"]
    else:
        data |= {"air_level": 2.0, "bone_share": 0.2}
        expected, said = {"air_level": 2.0, "bone_share": 0.2}, ["air"]
    result = json.loads(json.dumps(ScoreVolumed(path)(data)["result"], allow_nan=False))
    assert {name: result[name] for name in expected} == expected
    assert result["reliability"] == "unreliable"
    assert len(result["doubts"]) == len(said)
    assert all(word in doubt for word, doubt in zip(said, result["doubts"], strict=True))


def test_split():
    brain = torch.zeros(1, 4, 4, 4, dtype=torch.bool)
    brain[:, 1:3] = True
    pred = torch.full((3, 4, 4, 4), 0.5)
    pred[0, 1, 0, 0] = -1e-7  # interpolation may undershoot
    image = MetaTensor(torch.ones(2, 4, 4, 4), affine=AFFINE, meta={"intensity_unit": [10.0, 1000.0]})
    data = {"pred": MetaTensor(pred), "image": image, "brain": MetaTensor(brain, affine=AFFINE)}
    result = SplitPredictiond()(data)
    anomaly_map, reconstruction = result["anomaly_map"], result["reconstruction"]
    assert anomaly_map.shape == (1, 4, 4, 4)
    assert float(anomaly_map.min()) == 0
    assert not anomaly_map.as_tensor()[~brain].any()
    assert torch.equal(reconstruction.as_tensor()[:, brain[0]].amax(1), torch.tensor([5.0, 500.0]))
    assert not reconstruction.as_tensor()[:, ~brain[0]].any()
    assert np.array_equal(anomaly_map.affine, AFFINE)
    assert result["pred"] is anomaly_map


def test_reconstruction_has_the_field_of_the_image():
    brain = MetaTensor(torch.ones(1, 4, 4, 4, dtype=torch.bool), affine=AFFINE)
    image = MetaTensor(torch.ones(1, 4, 4, 4), affine=AFFINE, meta={"intensity_unit": [10.0]})
    smaller = MetaTensor(torch.full((1, 2, 4, 4), 3.0), affine=AFFINE)  # cropped to the brain: its border goes on
    smaller[:, 0] = 2.0
    data = {"pred": MetaTensor(torch.full((2, 4, 4, 4), 0.5)), "image": image, "brain": brain, "bias_field": smaller}
    result = SplitPredictiond()(data)
    torch.testing.assert_close(result["reconstruction"].as_tensor()[0, :, 0, 0], torch.tensor([10.0, 15.0, 15.0, 15.0]))
    assert torch.equal(result["anomaly_map"].as_tensor(), torch.full((1, 4, 4, 4), 0.5))


def test_reconstruction_is_not_darker_at_the_rim():
    """The network's grid holds the brain in its second half only; half way between, a value saw one half of it."""
    image = MetaTensor(torch.zeros(1, 4, 4, 4), affine=AFFINE, meta={"intensity_unit": [10.0]})
    image[:, 2:] = 0.7
    shifted = AFFINE.copy()
    shifted[0, 3] = 1.0  # the input's voxels lie between those of the network
    brain = MetaTensor(torch.zeros(1, 3, 4, 4, dtype=torch.bool), affine=shifted)
    brain[:, 1:] = True
    pred = MetaTensor(torch.tensor([0.0, 0.35, 0.7]).view(1, 3, 1, 1).expand(2, 3, 4, 4), affine=shifted)
    result = SplitPredictiond()({"pred": pred, "image": image, "brain": brain})
    torch.testing.assert_close(result["reconstruction"].as_tensor()[0, :, 0, 0], torch.tensor([0.0, 7.0, 7.0]))
