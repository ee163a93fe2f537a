"""The curves a report draws agree with the numbers beside them."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from common.metrics import DetectionMetrics


def subject(seed, lesion=True, shape=(48, 48, 8)):
    rng = np.random.default_rng(seed)
    mask = np.zeros(shape, dtype=bool)
    mask[10:20, 10:20, 2:5] = lesion
    scores = rng.gamma(2.0, 0.05, shape) * np.where(mask, 2.5, 1)
    foreground = np.ones(shape, dtype=bool)
    foreground[..., 0] = False
    return {"anomaly_map": scores.astype(np.float32), "lesion": mask, "foreground": foreground}


@pytest.fixture(scope="module")
def cohort():
    return {f"s{i}": subject(i, lesion=i < 3) for i in range(5)}


@pytest.fixture(scope="module")
def result(cohort):
    metrics = DetectionMetrics()
    for name, volumes in cohort.items():
        metrics.update(name, **volumes, threshold=0.3)
    return metrics.compute(n_bootstrap=20)


def test_points_are_what_their_thresholds_give(cohort, result):
    curves = result["curves"]
    assert {len(values) for values in curves.values()} == {len(curves["threshold"])}
    assert 150 < len(curves["threshold"]) <= 201
    assert np.all(np.diff(curves["threshold"]) > 0)
    with_lesion = list(cohort.values())[:3]
    scores = np.concatenate([s["anomaly_map"][s["foreground"]] for s in with_lesion])
    lesion = np.concatenate([s["lesion"][s["foreground"]] for s in with_lesion])
    for index in range(0, len(curves["threshold"]), 20):
        predicted = scores >= np.float32(curves["threshold"][index])
        assert curves["recall"][index] == pytest.approx((predicted & lesion).sum() / lesion.sum(), abs=2e-3)
        assert curves["precision"][index] == pytest.approx((predicted & lesion).sum() / predicted.sum(), abs=2e-3)


def test_area_and_summit_are_the_metrics(result):
    curves = result["curves"]
    recall, precision = np.array(curves["recall"]), np.array(curves["precision"])
    area = (precision[:-1] * -np.diff(recall)).sum() + precision[-1] * recall[-1]
    assert area == pytest.approx(result["auprc"]["value"], abs=0.01)
    assert max(curves["dice"]) == pytest.approx(result["max_dice_pooled"]["value"], rel=1e-5)


def test_slices_are_named_and_labelled(cohort, result):
    slices = result["slice_scores"]
    assert slices["subject"] == [name for name in cohort for _ in range(7)]
    assert slices["slice"] == list(range(1, 8)) * 5  # the first holds no foreground
    assert slices["abnormal"] == [i in (2, 3, 4) for i in range(1, 8)] * 3 + [False] * 14
    assert len(slices["score"]) == 35


def test_healthy_cohort_has_no_curve():
    metrics = DetectionMetrics()
    metrics.update("s", **subject(0, lesion=False))
    assert metrics.compute()["curves"] == {"threshold": [], "precision": [], "recall": [], "dice": []}


def test_memory_of_a_subject_does_not_grow_with_the_cohort():
    """Ten times the subjects are ten times the histograms, each of less than 0.3 MB, and none of the voxels."""
    sizes, metrics = {}, DetectionMetrics()
    for index in range(100):
        metrics.update(f"s{index}", **subject(index, shape=(128, 128, 8)), threshold=0.3)
        sizes[index + 1] = len(pickle.dumps(metrics))
    assert sizes[100] == pytest.approx(10 * sizes[10], rel=0.05)
    assert sizes[100] / 100 < 0.3e6
