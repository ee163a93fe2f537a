import math

import pytest
import torch

from common.detection.calibration import Calibration, origin_in_words, percentile_in_words


def fitted(scores):
    calibration = Calibration()
    calibration.fit(0.25, 0.01, torch.as_tensor(scores))
    return calibration


def test_unfitted_calibration_is_not_a_number():
    calibration = Calibration()
    assert not calibration.is_fitted
    assert math.isnan(calibration.threshold)
    assert math.isnan(calibration.false_positive_share)
    assert calibration.score_quantiles.isnan().all()


def test_fit_keeps_what_it_was_given():
    calibration = fitted([3.0, 1.0, 2.0])
    assert calibration.is_fitted
    assert calibration.threshold.item() == 0.25
    assert calibration.false_positive_share.item() == 0.01
    assert calibration.subjects.item() == 3
    assert calibration.score_quantiles[[0, 25, 50, 100]].tolist() == [1.0, 1.5, 2.0, 3.0]


def test_weights_from_before_a_buffer_are_loaded_strictly():
    state = fitted([1.0, 2.0]).state_dict()
    for name in Calibration.sized_by_file:
        del state[name]
    calibration = Calibration()
    calibration.load_state_dict(state)
    assert calibration.is_fitted
    assert calibration.settings is None
    del state["threshold"]
    with pytest.raises(RuntimeError, match="threshold"):
        Calibration().load_state_dict(state)


def test_settings_travel_with_the_weights():
    settings = {"network": {"class": "A", "level": 250, "names": ["é", None, True]}, "preprocessing": {}}
    calibration, loaded = Calibration(), Calibration()
    calibration.fit(0.25, 0.01, torch.rand(3), settings)
    loaded.fit(0.5, 0.01, torch.rand(3), {"other": 1})  # of another length
    loaded.load_state_dict(calibration.state_dict())
    assert loaded.settings == settings
    assert loaded.made_with.dtype == torch.uint8


def test_origin_of_a_threshold():
    calibration = fitted([1.0, 2.0])
    assert calibration.origin(0.25) == {"kind": "calibrated", "false_positive_share": 0.01, "subjects": 2}
    assert calibration.origin(0.3) == {"kind": "given"}
    assert Calibration().origin(0.3) == {"kind": "given"}


@pytest.mark.parametrize(
    ("score", "expected"), [(-1.0, 0), (0.0, 0), (24.5, 24.75), (50.5, 50.5), (100.5, 100), (1e9, 100)]
)
def test_percentile(score, expected):
    scores = torch.arange(101.0)[torch.randperm(101, generator=torch.Generator().manual_seed(0))]
    assert fitted(scores).percentile(score) == pytest.approx(expected, abs=0.5)


def test_percentile_grows_with_the_score():
    calibration = fitted(torch.randn(30, generator=torch.Generator().manual_seed(0)))
    percentiles = [calibration.percentile(score) for score in torch.linspace(-3, 3, 50).tolist()]
    assert percentiles == sorted(percentiles)
    assert percentiles[0] == 0
    assert percentiles[-1] == 100


def test_one_subject():
    calibration = fitted([2.0])
    assert calibration.percentile(1.9) == 0
    assert calibration.percentile(2.1) == 100


def test_no_subject_is_refused():
    with pytest.raises(RuntimeError):
        fitted([])


def test_fitting_again_replaces_everything():
    calibration = fitted([1.0, 2.0, 3.0])
    calibration.fit(0.5, 0.05, torch.tensor([10.0]))
    assert calibration.subjects.item() == 1
    assert calibration.threshold.item() == 0.5
    assert calibration.score_quantiles.unique().tolist() == [10.0]


def test_calibration_is_part_of_the_state_in_full_precision():
    calibration, loaded = Calibration(), Calibration()
    calibration.fit(1 / 3, 0.01, torch.tensor([0.1, 0.2], dtype=torch.float64))
    loaded.load_state_dict(calibration.state_dict())
    assert loaded.is_fitted
    assert loaded.threshold.item() == 1 / 3
    assert loaded.score_quantiles[-1].item() == 0.2


def test_empty_map_has_no_percentile():
    """A map of 0 is no healthier than all: the method saw nothing."""
    calibration = Calibration()
    calibration.fit(0.5, 0.01, torch.linspace(0.1, 1, 20))
    brain = torch.ones(1, 4, 4, 4, dtype=torch.bool)
    assert calibration.describe(torch.zeros(1, 4, 4, 4), brain, 0.5)["volume_score_percentile"] is None
    assert calibration.describe(torch.full((1, 4, 4, 4), 0.01), brain, 0.5)["volume_score_percentile"] == 0


@pytest.mark.parametrize(
    ("origin", "words"),
    [
        (
            {"kind": "calibrated", "false_positive_share": 0.01, "subjects": 4, "interval": [1.988, 2.757]},
            "calibrated on 4 healthy subjects, 1 % of whose brains lies above it, 95 % interval 1.99 to 2.76",
        ),
        ({"kind": "calibrated"}, "calibrated"),
        ({"kind": "given"}, "given by the user"),
        ({}, "of unknown origin"),
    ],
)
def test_origin_in_words(origin, words):
    assert origin_in_words(origin) == words


@pytest.mark.parametrize(
    ("percentile", "origin", "words", "short"),
    [
        (
            100.0,
            {"subjects": 26},
            "higher than in all 26 healthy subjects of the calibration; another healthy subject may score higher",
            "all 26 healthy",
        ),
        (
            97.4,
            {"subjects": 26},
            "higher than in 97 % of the 26 healthy subjects of the calibration",
            "97 % of the 26 healthy",
        ),
        (0.0, {"kind": "given"}, "higher than in 0 % of the healthy subjects of the calibration", "0 % of the healthy"),
        (None, {"subjects": 26}, "not compared with healthy subjects", "-"),
    ],
)
def test_percentile_in_words(percentile, origin, words, short):
    record = {"volume_score_percentile": percentile, "threshold_origin": origin}
    assert percentile_in_words(record) == words
    assert percentile_in_words(record, short=True) == short
