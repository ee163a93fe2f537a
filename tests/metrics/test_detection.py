import json
import pickle

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scored import VOXEL_METRICS, cohort, dice, evaluate, exact, pooled, subject

from common.metrics import DetectionMetrics

# ---- values against the exact ones


@pytest.mark.parametrize("scale", [1e-5, 1.0, 1e4])
def test_pooled_metrics_equal_exact_values_at_any_scale(scale):
    subjects = cohort(scale=scale)
    result = evaluate(subjects, threshold=0.2 * scale)
    scores, labels = pooled(subjects)
    auprc, roc = exact(scores, labels)
    assert result["auprc"]["value"] == pytest.approx(auprc, abs=0.002)
    assert result["auroc"]["value"] == pytest.approx(roc, abs=0.002)
    best = max(dice(scores >= t, labels) for t in np.unique(scores)[::20])
    assert result["max_dice_pooled"]["value"] == pytest.approx(best, abs=0.005)
    assert result["dice_at_threshold"]["value"] == pytest.approx(dice(scores > np.float32(0.2 * scale), labels))
    assert result["lesion_share"]["value"] == pytest.approx(labels.mean())


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.9, 1.0), (1e-4, 1e-3), (10.0, 30.0)])
def test_binning_moves_auprc_by_less_than_two_thousandths(low, high):
    rng = np.random.default_rng(1)
    labels = rng.random((100, 100, 10)) < 0.02
    scores = (low + (high - low) * rng.beta(np.where(labels, 5, 2), 5)).astype(np.float32)
    result = evaluate({"s": {"anomaly_map": scores, "lesion": labels, "foreground": np.ones_like(labels)}})
    assert result["auprc"]["value"] == pytest.approx(exact(scores.ravel(), labels.ravel())[0], abs=0.002)


def test_max_dice_mean_is_the_mean_over_lesion_slices_at_one_threshold():
    subjects = cohort()
    slices = [
        (s["anomaly_map"][..., i][s["foreground"][..., i]], s["lesion"][..., i][s["foreground"][..., i]])
        for s in subjects.values()
        for i in range(6)
        if s["lesion"][..., i].any()
    ]
    thresholds = np.unique(np.concatenate([scores for scores, _ in slices]))[::10]
    best = max(np.mean([dice(scores >= t, labels) for scores, labels in slices]) for t in thresholds)
    result = evaluate(subjects)
    assert result["max_dice_mean"]["value"] == pytest.approx(best, abs=0.005)
    assert result["n_lesion_slices"] == len(slices) == 12


def test_oracle_threshold_gives_the_maximal_pooled_dice():
    subjects = cohort()
    result = evaluate(subjects)
    scores, labels = pooled(subjects)
    assert dice(scores > result["oracle_threshold"], labels) == pytest.approx(result["max_dice_pooled"]["value"])


def test_image_metrics_equal_torchmetrics_over_slices_of_all_subjects():
    subjects = cohort()
    scores, labels = [], []
    for s in subjects.values():
        for i in range(5):  # the last slice has no foreground
            values = np.sort(s["anomaly_map"][..., i][s["foreground"][..., i]])
            scores.append(values[-int(np.ceil(0.01 * len(values))) :].mean())
            labels.append(s["lesion"][..., i].any())
    auprc, roc = exact(scores, labels)
    result = evaluate(subjects)
    assert result["image_auprc"]["value"] == pytest.approx(auprc, abs=1e-6)
    assert result["image_auroc"]["value"] == pytest.approx(roc, abs=1e-6)


def test_scores_of_the_method_are_ranked_beside_those_of_the_map_whatever_their_scale():
    volumes = subject(0)
    own = np.array([-50.0, 30.0, 40.0, 50.0, 20.0, np.nan])  # lesion in slices 1 to 3, no foreground in slice 5
    plain = evaluate({"s": volumes})
    for sign, auroc_of_method in ((1, 1), (-1, 0)):
        result = evaluate({"s": volumes | {"method_slice_scores": sign * own}})
        assert result["image_auroc_method"]["value"] == auroc_of_method
        assert result["slice_scores"]["method_score"] == (sign * own[:5]).tolist()
        for name in ("image_auroc", "image_auprc", "volume_auroc"):
            assert result[name] == plain[name]
        assert result["slice_scores"]["score"] == plain["slice_scores"]["score"]


def test_volumes_are_ranked_by_the_score_of_the_method_too():
    subjects = cohort()  # s0 to s3 with a lesion, s4 to s6 without
    scores = dict(zip(subjects, (5.0, 1.0, 5.0, 5.0, 2.0, 2.0, 2.0), strict=True))
    result = evaluate({name: s | {"method_score": scores[name]} for name, s in subjects.items()})
    assert result["volume_auroc_method"]["value"] == 0.75
    assert result["volume_auroc_method"]["ci95"][0] is not None
    assert result["volume_auroc"] == evaluate(subjects)["volume_auroc"]


def test_metrics_of_a_score_are_of_the_subjects_that_have_one():
    subjects, own = cohort(), np.array([0.0, 1, 1, 1, 0, np.nan])
    some = {n: s | ({"method_slice_scores": own, "method_score": 1.0} if n < "s2" else {}) for n, s in subjects.items()}
    result = evaluate(some)
    assert result["image_auroc_method"]["value"] == 1
    assert result["volume_auroc_method"]["value"] is None  # no healthy one is among them
    given = result["slice_scores"]["method_score"]
    assert given == [0, 1, 1, 1, 0] * 2 + [None] * 25


def test_method_without_a_score_has_no_metrics_of_it():
    result = evaluate(cohort())
    for name in ("image_auroc_method", "image_auprc_method", "volume_auroc_method"):
        assert result[name] == {"value": None, "ci95": [None, None]}
    assert set(result["slice_scores"]["method_score"]) == {None}


def test_false_positives_are_counted_on_healthy_subjects_only():
    subjects = cohort()
    healthy = [s for s in subjects.values() if not s["lesion"].any()]
    values = np.concatenate([s["anomaly_map"][s["foreground"]] for s in healthy])
    assert evaluate(subjects)["healthy_fp_share"]["value"] == pytest.approx((values > np.float32(0.2)).mean())


def test_lesion_voxels_found_at_the_threshold_are_pooled():
    subjects = cohort()
    scores, labels = pooled(subjects)
    found = (scores > np.float32(0.2))[labels].mean()
    assert evaluate(subjects)["voxel_recall_at_threshold"]["value"] == pytest.approx(found)


def test_each_site_has_its_own_false_alarms_and_recall():
    """As if it had been measured alone; the worst brain of all is the worst of its site."""
    sites = {"near": cohort(), "far": {f"far{i}": subject(20 + i, lesion=i < 2, scale=1.4) for i in range(5)}}
    both = {name: s | {"site": site} for site, subjects in sites.items() for name, s in subjects.items()}
    result = evaluate(both)
    assert [site["site"] for site in result["sites"]] == ["far", "near"]
    for site in result["sites"]:
        subjects = sites[site["site"]]
        alone = evaluate(subjects)
        healthy = [s for s in subjects.values() if not s["lesion"].any()]
        shares = [(s["anomaly_map"][s["foreground"]] > np.float32(0.2)).mean() for s in healthy]
        assert (site["n_healthy"], site["n_lesion_subjects"]) == (3, len(subjects) - 3)
        assert site["healthy_share"]["value"] == pytest.approx(np.mean(shares))
        assert site["healthy_worst_share"] == {"value": pytest.approx(max(shares)), "ci95": [None, None]}
        assert site["voxel_recall_at_threshold"]["value"] == alone["voxel_recall_at_threshold"]["value"]
        low, high = site["healthy_share"]["ci95"]
        assert min(shares) <= low < np.mean(shares) < high <= max(shares)
    assert result["healthy_worst_share"]["value"] == max(s["healthy_worst_share"]["value"] for s in result["sites"])


def test_whole_volumes_are_told_apart_by_their_largest_component_where_their_highest_values_are_the_same():
    """Specks all over the brain and one lesion have the same voxels above the threshold."""
    foreground = np.ones((20, 20, 6), dtype=bool)
    lesion = np.zeros_like(foreground)
    lesion[4:8, 4:9, 2:4] = True
    subjects = {}
    for index in range(3):
        specks = np.zeros_like(foreground)
        specks[index % 2 : 20 : 2, 0:20:5, 0:1] = True
        assert specks.sum() == lesion.sum()
        for name, mask, truth in (("healthy", specks, None), ("lesion", lesion, lesion)):
            volume = {"anomaly_map": mask.astype(np.float32), "lesion": truth, "foreground": foreground}
            subjects[f"{name}{index}"] = volume
    result = evaluate(subjects, threshold=0.5)
    assert result["volume_auroc"]["value"] == 0.5
    assert result["volume_auroc_cluster"]["value"] == 1
    assert evaluate(subjects, threshold=None)["volume_auroc_cluster"]["value"] is None


def test_reconstruction_counts_in_the_foreground_outside_lesions_only():
    volumes = subject(0, shape=(40, 40, 6))
    rng = np.random.default_rng(0)
    image = (rng.random((2, 40, 40, 6)) * volumes["foreground"]).astype(np.float32)
    reconstruction = np.where(volumes["lesion"] | ~volumes["foreground"], 1, image + 0.1).astype(np.float32)
    reconstruction[:, ~volumes["foreground"]] = 0
    result = evaluate({"s": volumes | {"image": image, "reconstruction": reconstruction}})
    assert result["psnr"]["value"] == pytest.approx(20, abs=1e-3)  # an error of 0.1 everywhere
    assert 0.5 < result["ssim"]["value"] < 1
    same = np.where(volumes["lesion"], 1, image)
    result = evaluate({"s": volumes | {"image": image, "reconstruction": same}})
    assert result["psnr"]["value"] is None  # no error, no finite PSNR
    assert result["ssim"]["value"] == pytest.approx(1)


def test_slices_run_along_the_chosen_axis():
    volumes = subject(0, shape=(40, 30, 6)) | {"method_slice_scores": np.arange(6)}
    image = np.random.default_rng(0).random((2, 40, 30, 6)).astype(np.float32)
    pair = {"image": image, "reconstruction": image**2}
    expected = evaluate({"s": volumes | pair})
    turned = {name: np.moveaxis(v, -1, 0) for name, v in volumes.items()}
    pair = {name: np.moveaxis(v, -1, 1) for name, v in pair.items()}
    assert evaluate({"s": turned | pair}, axis=0) == expected


def test_tensors_and_arrays_give_the_same():
    volumes = subject(0)
    tensors = {name: MetaTensor(torch.from_numpy(v)) for name, v in volumes.items()}
    assert evaluate({"s": tensors}) == evaluate({"s": volumes})


# ---- maps and cohorts at the edge


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_constant_map_knows_nothing(value):
    subjects = cohort()
    for s in subjects.values():
        s["anomaly_map"] = np.full_like(s["anomaly_map"], value)
    result = evaluate(subjects)
    prevalence = result["lesion_share"]["value"]
    assert result["auprc"]["value"] == pytest.approx(prevalence)
    assert result["auroc"]["value"] == pytest.approx(0.5)
    assert result["image_auroc"]["value"] == pytest.approx(0.5)
    assert result["max_dice_pooled"]["value"] == pytest.approx(2 * prevalence / (1 + prevalence))
    assert result["healthy_fp_share"]["value"] == (1 if value else 0)
    assert result["oracle_threshold"] < value or value == 0


def test_healthy_cohort_has_no_lesion_metrics():
    subjects = cohort(n_lesion=0)
    subjects["none"] = subject(9, lesion=False) | {"lesion": None}
    result = evaluate(subjects)
    for name in (*VOXEL_METRICS, "image_auroc", "image_auprc", "psnr", "ssim", "lesion_share_outside_foreground"):
        assert result[name] == {"value": None, "ci95": [None, None]}, name
    assert result["oracle_threshold"] is None
    assert 0 < result["healthy_fp_share"]["value"] < 1
    assert (result["n_subjects"], result["n_lesion_subjects"], result["n_lesion_slices"]) == (4, 0, 0)
    json.dumps(result, allow_nan=False)


def test_one_subject_has_values_but_no_intervals():
    result = evaluate({"s": subject(0)})
    for name in (*VOXEL_METRICS, "image_auroc"):
        assert result[name]["value"] is not None
        assert result[name]["ci95"] == [None, None]
    assert result["healthy_fp_share"]["value"] is None
    json.dumps(result, allow_nan=False)


def test_without_a_threshold_only_what_needs_it_is_undefined():
    result = evaluate(cohort(), threshold=None)
    assert result["dice_at_threshold"]["value"] is None
    assert result["healthy_fp_share"]["value"] is None
    assert result["healthy_worst_share"]["value"] is result["voxel_recall_at_threshold"]["value"] is None
    assert result["sites"][0]["healthy_share"]["value"] is None
    assert result["auprc"]["value"] is not None


def test_lesion_outside_the_foreground_is_reported_and_not_counted():
    volumes = subject(0)
    outside = volumes["lesion"].copy()
    outside[0, :10, 0] = True
    result = evaluate({"s": volumes | {"lesion": outside}})
    missed = result.pop("lesion_share_outside_foreground")["value"]
    assert missed == pytest.approx(10 / outside.sum())
    expected = evaluate({"s": volumes})
    assert expected.pop("lesion_share_outside_foreground")["value"] == 0
    assert result == expected

    nothing_inside = np.zeros_like(outside)
    nothing_inside[0, 0, 0] = True
    result = evaluate({"s": volumes | {"lesion": nothing_inside}})
    assert result["auprc"]["value"] is None
    assert result["healthy_fp_share"]["value"] is None  # not a healthy subject either


# ---- streaming and bootstrap


def test_order_of_the_subjects_does_not_matter():
    subjects = cohort()
    assert evaluate(subjects) == evaluate(dict(reversed(subjects.items())))


def test_streaming_equals_all_voxels_at_once():
    subjects = cohort(n_healthy=0)
    together = {k: np.concatenate([s[k] for s in subjects.values()], axis=-1) for k in subjects["s0"]}
    streamed, at_once = evaluate(subjects), evaluate({"all": together})
    for name in (*VOXEL_METRICS, "image_auroc", "image_auprc"):
        assert streamed[name]["value"] == pytest.approx(at_once[name]["value"], abs=1e-9), name


def test_state_does_not_grow_with_the_volume():
    def state(size):
        metrics = DetectionMetrics()
        metrics.update("s", **subject(0, shape=(size, size, 6)))
        return len(pickle.dumps(metrics))

    levels = 512 * 12  # bins in which nearly all values of the map lie
    assert state(256) < 30 * levels
    assert state(512) < 1.2 * state(256)


# ---- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"anomaly_map": np.zeros((3, 3, 3))}, "anomaly_map has shape"),
        ({"lesion": np.zeros((24, 20), dtype=bool)}, "lesion has shape"),
        ({"foreground": np.zeros((24, 20, 6), dtype=bool)}, "foreground is empty"),
        ({"anomaly_map": np.full((24, 20, 6), np.nan)}, "finite"),
        ({"anomaly_map": np.full((24, 20, 6), -0.1)}, ">= 0"),
        ({"method_slice_scores": np.zeros(5)}, "method_slice_scores"),
        ({"method_slice_scores": np.full(6, np.nan)}, "method_slice_scores"),
        ({"method_score": np.inf}, "method_score"),
        ({"image": np.zeros((24, 20, 6))}, "both image and reconstruction"),
        ({"image": np.zeros((24, 20, 5)), "reconstruction": np.zeros((24, 20, 6))}, "image has shape"),
    ],
)
def test_bad_input_is_refused_with_the_subject_named(change, message):
    with pytest.raises(ValueError, match=rf"^case7: .*{message}"):
        DetectionMetrics().update("case7", **(subject(0) | change))


def test_a_subject_twice_and_no_subject_are_refused():
    metrics = DetectionMetrics()
    with pytest.raises(ValueError, match="no subject"):
        metrics.compute()
    metrics.update("s", **subject(0))
    with pytest.raises(ValueError, match="s: was added before"):
        metrics.update("s", **subject(0))


def test_subjects_measured_apart_are_as_those_measured_together():
    together, joined = DetectionMetrics(), DetectionMetrics()
    for name, one in cohort().items():
        apart = DetectionMetrics()
        for metrics in (together, apart):
            metrics.update(name, **one, threshold=0.2)
        joined.merge(pickle.loads(pickle.dumps(apart)))  # noqa: S301 - our own
    assert json.dumps(joined.compute(n_bootstrap=20)) == json.dumps(together.compute(n_bootstrap=20))
    with pytest.raises(ValueError, match="was added before; measure each subject once"):
        joined.merge(apart)
