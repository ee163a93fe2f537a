"""Lesion-wise counts, where the answer can be counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scored import SHAPE, boxes, volumes

from common.metrics import DetectionMetrics
from common.metrics.lesions import compare_lesions


def test_components_are_counted_by_overlap_and_by_iou():
    lesion = boxes((1, 2, 2), (1, 20, 20), (1, 30, 2))
    predicted = boxes((1, 2, 2), (1, 23, 23), (5, 2, 30))  # one exact, one with an IoU of 0.03, one false
    record = compare_lesions(lesion, predicted, voxel_ml=0.001)
    assert record.lesions.tolist() == [3, 0, 0, 0]
    assert record.found.sum() == 2
    assert (record.predicted, record.predicted_true, record.paired) == (3, 2, 1)
    assert record.voxels.sum() == 3 * 64
    assert record.voxels_found.sum() == 64 + 4


def test_one_component_over_two_lesions_finds_both_and_is_paired_with_one():
    lesion = boxes((1, 2, 2), (1, 2, 10))
    predicted = np.zeros(SHAPE, dtype=bool)
    predicted[1:5, 2:6, 2:14] = True
    record = compare_lesions(lesion, predicted, voxel_ml=0.001)
    assert (record.found.sum(), record.predicted, record.predicted_true, record.paired) == (2, 1, 1, 1)


def test_two_parts_of_a_lesion_are_one_pair():
    predicted = boxes((1, 2, 2), size=4)
    predicted[3] = False  # cut in two
    record = compare_lesions(boxes((1, 2, 2)), predicted, voxel_ml=0.001)
    assert (record.found.sum(), record.predicted, record.predicted_true, record.paired) == (1, 2, 2, 1)


def test_corners_connect():
    lesion = boxes((0, 0, 0), (2, 2, 2), size=2)
    assert compare_lesions(lesion, lesion, voxel_ml=0.001).lesions.sum() == 1


@pytest.mark.parametrize(("voxel_ml", "group"), [(0.001, 0), (0.1 / 64, 0), (0.008, 1), (0.1, 2), (1.0, 3)])
def test_lesions_are_grouped_by_volume(voxel_ml, group):
    record = compare_lesions(boxes((1, 2, 2)), boxes(), voxel_ml)
    assert record.lesions.tolist() == [int(i == group) for i in range(4)]
    assert record.voxels[group] == 64


@pytest.mark.parametrize("lesion", [boxes(), boxes((1, 2, 2))])
def test_empty_masks(lesion):
    record = compare_lesions(lesion, boxes(), voxel_ml=0.001)
    assert (record.found.sum(), record.predicted, record.predicted_true, record.paired) == (0, 0, 0, 0)


# ---- over a cohort


def cohort(**settings):
    """One subject with two small lesions, of which one is found beside two false components; one with a large lesion
    that is found; one healthy with a false component."""
    metrics = DetectionMetrics()
    predicted = boxes((1, 2, 2), (5, 2, 30), (5, 30, 30))
    metrics.update("a", **volumes(boxes((1, 2, 2), (1, 20, 20)), predicted), **settings)
    metrics.update("b", **volumes(boxes((0, 5, 5), size=10), boxes((0, 5, 5), size=10)), **settings)
    metrics.update("c", **volumes(boxes(), boxes((1, 2, 2))), **settings)
    return metrics


def test_metrics_of_a_cohort():
    result = cohort(voxel_ml=0.001).compute(n_bootstrap=50)
    values = {name: result[name]["value"] for name in result if name.startswith("lesion_") and name != "lesion_sizes"}
    assert values["lesion_recall"] == values["lesion_recall_iou"] == pytest.approx(2 / 3)
    assert values["lesion_precision"] == values["lesion_precision_iou"] == pytest.approx(2 / 4)
    assert [values["lesion_f1"], values["lesion_f1_iou"]] == pytest.approx([4 / 7, 4 / 7])
    assert result["healthy_false_lesions"]["value"] == 1
    assert result["n_lesions"] == 3
    small, middle, *others = result["lesion_sizes"]
    assert (small["ml"], small["n_lesions"]) == ([0.0, 0.1], 2)
    assert small["lesion_recall"]["value"] == small["voxel_recall"]["value"] == 0.5
    assert middle["lesion_recall"]["value"] == 1
    assert all(group["n_lesions"] == 0 and group["lesion_recall"]["value"] is None for group in others)


def test_a_given_segmentation_is_compared_instead_of_the_thresholded_map():
    metrics = DetectionMetrics()
    lesion, predicted = boxes((1, 2, 2)), boxes((1, 2, 2), (5, 2, 30))
    metrics.update("a", **volumes(lesion, predicted), segmentation=np.moveaxis(lesion, 0, -1))
    result = metrics.compute(n_bootstrap=10)
    assert result["lesion_precision"]["value"] == 1
    assert result["dice_at_threshold"]["value"] == pytest.approx(2 / 3)  # the map itself


def test_without_a_threshold_lesion_wise_metrics_are_undefined():
    result = cohort().compute(n_bootstrap=10)
    assert result["lesion_f1"]["value"] is not None
    metrics = DetectionMetrics()
    metrics.update("a", **(volumes(boxes((1, 2, 2)), boxes((1, 2, 2))) | {"threshold": None}))
    result = metrics.compute(n_bootstrap=10)
    assert result["n_lesions"] == 1
    assert result["lesion_f1"]["value"] is result["lesion_sizes"][0]["lesion_recall"]["value"] is None
