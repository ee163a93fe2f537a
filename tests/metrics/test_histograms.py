"""Metrics of histograms equal those of all scores; bins are narrow at every scale."""

from __future__ import annotations

import numpy as np
import pytest
from scored import dice, exact

from common.metrics.histograms import (
    at_or_above,
    auroc,
    average_precision,
    bin_index,
    bin_lower_edge,
    exact_histograms,
    max_dice,
)


@pytest.mark.parametrize("levels", [2, 7, 100_000])
def test_curves_equal_torchmetrics_with_and_without_ties(levels):
    rng = np.random.default_rng(levels)
    labels = rng.random(2000) < 0.1
    scores = np.floor((rng.random(2000) + 0.3 * labels) * levels) / levels / 2
    pos, neg = exact_histograms(scores, labels)
    expected = exact(scores, labels)
    assert average_precision(pos, neg) == pytest.approx(expected[0], abs=1e-6)
    assert auroc(pos, neg) == pytest.approx(expected[1], abs=1e-6)
    assert max_dice(pos, neg) == pytest.approx(max(dice(scores >= t, labels) for t in np.unique(scores)))


def test_curves_are_undefined_without_positives_or_negatives():
    some, none = np.array([1.0, 2.0]), np.zeros(2)
    assert np.isnan([average_precision(none, some), auroc(none, some), auroc(some, none), max_dice(none, some)]).all()
    assert average_precision(some, none) == 1


def test_curves_work_on_stacks_of_weighted_histograms():
    rng = np.random.default_rng(0)
    pos, neg = rng.random((2, 3, 4, 9))
    for function in (average_precision, auroc, max_dice):
        stacked = function(pos, neg)
        assert stacked.shape == (3, 4)
        assert stacked[1, 2] == pytest.approx(function(pos[1, 2], neg[1, 2]))


def test_bins_are_narrow_at_every_scale_and_keep_the_order():
    values = np.sort(np.concatenate([[0.0, -0.0], np.geomspace(1e-37, 1e37, 100_000)]).astype(np.float32))
    bins = bin_index(values)
    assert (np.diff(bins) >= 0).all()
    assert (bins[:2] == 0).all()
    edges = bin_lower_edge(bins)
    assert (edges <= values).all()
    assert (values - edges <= values / 512).all()


def test_counts_at_or_above_each_bin():
    assert at_or_above(np.array([[1, 0, 2], [0, 0, 0]])).tolist() == [[3, 2, 2], [0, 0, 0]]
