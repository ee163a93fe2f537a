"""What is kept of a subject says the same as its voxels."""

from __future__ import annotations

import numpy as np
import pytest
from scored import dice

from common.metrics.histograms import bin_index, bin_lower_edge
from common.metrics.subject_record import highest_share_mean, highest_share_means, voxel_histograms


@pytest.fixture
def volumes():
    """Scores float32, lesion and foreground bool, slices first; the lesion lies in two of five slices."""
    random = np.random.default_rng(0)
    foreground = np.zeros((5, 12, 10), bool)
    foreground[1:, 2:, 1:] = True
    lesion = np.zeros_like(foreground)
    lesion[2:4, 4:8, 3:6] = True
    scores = (random.random(foreground.shape) * (1 + lesion)).astype(np.float32)
    return scores, lesion, foreground


def test_histograms_count_every_voxel_of_the_foreground_once(volumes):
    scores, lesion, foreground = volumes
    bins, pos, neg, _ = voxel_histograms(*volumes)
    assert np.array_equal(bins, np.unique(bin_index(scores[foreground])))
    assert [pos.sum(), neg.sum()] == [lesion.sum(), (foreground & ~lesion).sum()]
    in_first = bin_index(scores) == bins[0]
    assert [pos[0], neg[0]] == [(in_first & lesion).sum(), (in_first & foreground & ~lesion).sum()]


def test_dice_of_each_lesion_slice_is_summed(volumes):
    scores, lesion, foreground = volumes
    bins, _, _, summed = voxel_histograms(*volumes)
    for position in (0, len(bins) // 2, len(bins) - 1):
        above = (scores >= bin_lower_edge(bins[position])) & foreground
        assert summed[position] == pytest.approx(sum(dice(above[z], lesion[z]) for z in (2, 3)))


def test_highest_share_is_of_at_least_one_value():
    values = np.arange(1, 201, dtype=np.float32)
    assert highest_share_mean(values, 0.01) == 199.5
    assert highest_share_mean(values[:3], 0.01) == 3
    assert highest_share_mean(np.flip(values), 1.0) == 100.5


def test_slices_without_foreground_have_no_score(volumes):
    scores, _, foreground = volumes
    means = highest_share_means(scores, foreground)
    assert np.isnan(means[0])
    assert means[1:] == pytest.approx([scores[z][foreground[z]].max() for z in range(1, 5)])
