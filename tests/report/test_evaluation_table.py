"""What `uad evaluate` prints."""

from __future__ import annotations

from scored import cohort, evaluate

from common.report.evaluation_table import evaluation_table

ABOUT = {"bundle": "dae", "threshold": 2.421, "threshold_origin": {"kind": "calibrated", "subjects": 20}}


def test_each_defined_metric_is_a_line_and_each_baseline():
    result, other = evaluate(cohort(n_lesion=5, n_healthy=5)), evaluate(cohort(n_lesion=5, n_healthy=5), seed=1)
    table = evaluation_table(result | ABOUT | {"baselines": {"intensity_dark": other}})
    lines = [" ".join(line.split()) for line in table.splitlines()]
    assert lines[0].startswith(
        "dae: 10 subjects, 5 of them with 5 lesions in 15 slices; threshold 2.421, calibrated on 20 healthy subjects"
    )
    low, high = result["auprc"]["ci95"]
    assert f"AUPRC {result['auprc']['value']:.3f} ({low:.3f}-{high:.3f})" in lines
    assert not [line for line in lines if line.startswith("PSNR")]  # without a reconstruction there is none
    (baseline,) = [line for line in lines if line.startswith("intensity_dark")]
    assert baseline.split()[1] == f"{other['auprc']['value']:.3f}"
    assert "†" not in table


def test_intervals_over_few_subjects_are_explained():
    lines = evaluation_table(evaluate(cohort(n_lesion=3, n_healthy=5)) | ABOUT).splitlines()
    assert next(line for line in lines if line.startswith("AUPRC")).endswith("†")
    assert lines[-1] == "† marks an interval over fewer than 5 subjects, who say little about others."
