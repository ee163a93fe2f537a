"""Intervals over resampled subjects, and differences of methods in the same resamples."""

from __future__ import annotations

import numpy as np
import pytest
from scored import VOXEL_METRICS, boxes, cohort, evaluate, volumes

from common.metrics import DetectionMetrics
from common.metrics.bootstrap import paired_difference


def test_bootstrap_interval_holds_the_value_and_follows_the_seed():
    subjects = cohort(n_lesion=6, n_healthy=4)
    result, again, other = (evaluate(subjects, seed=seed) for seed in (0, 0, 1))
    assert result == again
    for name in (*VOXEL_METRICS, "image_auroc", "image_auprc", "healthy_fp_share"):
        low, high = result[name]["ci95"]
        assert low <= result[name]["value"] <= high, name
        assert low < high, name
        assert result[name]["value"] == other[name]["value"]
        assert result[name]["ci95"] != other[name]["ci95"], name


def test_bootstrap_weights_equal_repeated_subjects():
    subjects = cohort(n_lesion=2, n_healthy=1)
    metrics = DetectionMetrics()
    for name, arguments in subjects.items():
        metrics.update(name, threshold=0.2, **arguments)
    low, high = metrics.compute(n_bootstrap=2000)["auprc"]["ci95"]
    # three subjects: the resamples hold only the first, only the second or a mixture
    alone = [evaluate({n: subjects[n]})["auprc"]["value"] for n in ("s0", "s1")]
    assert [low, high] == pytest.approx(sorted(alone))


def measured(noise, n=6, seed=0):
    """A method whose map is the lesion and noise, on the same subjects whatever the noise."""
    metrics = DetectionMetrics()
    for index in range(n):
        rng = np.random.default_rng(index)
        lesion = boxes((1, int(rng.integers(30)), int(rng.integers(30))))
        arguments = volumes(lesion, lesion)
        arguments["anomaly_map"] = np.abs(arguments["anomaly_map"] + rng.normal(0, noise, arguments["lesion"].shape))
        metrics.update(f"s{index}", **arguments)
    return metrics.compute(seed=seed, n_bootstrap=300)


def test_paired_difference_is_narrower_than_the_methods_intervals():
    worse, better = measured(0.6), measured(0.55)
    for metric in ("auprc", "dice_at_threshold"):
        difference = paired_difference(worse, better, metric)
        assert difference["value"] == pytest.approx(worse[metric]["value"] - better[metric]["value"])
        low, high = difference["ci95"]
        assert low <= difference["value"] <= high < 0
        assert high - low < np.diff(worse[metric]["ci95"])[0]


def test_difference_to_itself_is_zero():
    result = measured(0.5)
    assert paired_difference(result, result, "auprc") == {"value": 0, "ci95": [0, 0]}


def test_intervals_over_few_subjects_are_marked():
    few, enough = evaluate(cohort(n_lesion=2, n_healthy=5)), evaluate(cohort(n_lesion=5, n_healthy=1))
    assert (few["auprc"]["few_subjects"], few["sites"][0]["voxel_recall_at_threshold"]["few_subjects"]) == (2, 2)
    assert not {"few_subjects"} & {*few["healthy_fp_share"], *few["image_auroc"], *enough["auprc"]}
    assert enough["healthy_fp_share"]["ci95"] == [None, None]  # of one subject, there is nothing to be marked
    assert "few_subjects" not in enough["healthy_fp_share"]


def test_a_result_begins_with_its_metrics_and_ends_with_what_is_long():
    names = list(evaluate(cohort()))
    assert names[0] == "auprc"
    assert names.index("replicates") > names.index("psnr")
