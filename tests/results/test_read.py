"""What `uad detect` left is read back as it was written; what is broken is named."""

from __future__ import annotations

import json

import numpy as np
import pytest

from common.errors import ResultError
from common.outputs import RECORD
from common.results.read import (
    CaseFiles,
    mni_point,
    read_lesions,
    read_outcomes,
    read_run,
    read_to_mni,
    records_in,
)
from common.transforms.registration import write_tfm

RUN = {
    "bundle": "dae",
    "weights_sha256": "ab",
    "versions": {},
    "warnings": [],
    "threshold": 0.1,
    "volume_score": 0.2,
    "lesions": 1,
    "lesion_volume_ml": 0.5,
    "abnormal_share": 0.01,
}


def write_run(folder, name=RECORD, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(RUN | changes), encoding="utf-8")
    return folder / name


def test_names_of_a_case_and_of_a_bids_derivative(tmp_path):
    alone = CaseFiles.of_record(write_run(tmp_path / "scan1"))
    assert (alone.name, alone.path("lesions.csv")) == ("scan1", tmp_path / "scan1" / "lesions.csv")
    shared = CaseFiles.of_record(write_run(tmp_path / "sub-1", "sub-1_ses-2_desc-dae_run.json"))
    assert shared.name == "sub-1_ses-2"
    assert shared.path("segmentation.nii.gz") == tmp_path / "sub-1" / "sub-1_ses-2_desc-dae_mask.nii.gz"


def test_records_are_found_but_for_what_is_half_written(tmp_path):
    found = [write_run(tmp_path / "b"), write_run(tmp_path / "a" / "deep")]
    found.append(write_run(tmp_path / "c", "sub-1_desc-dae_run.json"))
    write_run(tmp_path / ".scan1.partial")
    assert records_in(tmp_path) == sorted(found)
    assert records_in(tmp_path / ".scan1.partial") == [tmp_path / ".scan1.partial" / RECORD]  # if asked for itself


def test_record_of_an_older_version_has_what_it_lacks(tmp_path):
    run = read_run(CaseFiles.of_record(write_run(tmp_path, volume_score_percentile=None)))
    assert run["threshold"] == 0.1
    assert (run["reliability"], run["doubts"], run["input_sha256"]) == ("ok", [], {})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"threshold": None}, "threshold"),
        ({"threshold": float("nan")}, "threshold"),
        ({"bundle": 3}, "bundle"),
        ({"settings": []}, "settings"),
        ({"warnings": "none"}, "warnings"),
        ({"volume_score_percentile": "high"}, "volume_score_percentile"),
    ],
)
def test_record_that_is_none_is_refused(changes, named, tmp_path):
    with pytest.raises(ResultError, match=rf"not the record of a case \({named} missing or wrong\)"):
        read_run(CaseFiles.of_record(write_run(tmp_path, **changes)))


def test_lesions_are_numbers(tmp_path):
    text = "lesion,volume_ml,x_mm,y_mm,z_mm,mean_map,max_map\n1,2.5,-1,2,3,0.25,0.5\n"
    (tmp_path / "lesions.csv").write_text(text, encoding="utf-8")
    expected = {"volume_ml": 2.5, "x_mm": -1, "y_mm": 2, "z_mm": 3, "mean_map": 0.25, "max_map": 0.5}
    assert read_lesions(CaseFiles("scan", tmp_path)) == [expected]


def test_points_go_to_mni_as_the_matrix_says(tmp_path):
    files = CaseFiles("scan", tmp_path)
    assert read_to_mni(files) is None
    to_mni = np.array([[1.1, 0.1, 0, 5], [0, 0.9, 0, -7], [0, 0.2, 1, 3], [0, 0, 0, 1.0]])
    write_tfm(to_mni, tmp_path / "to_mni.tfm")
    assert mni_point(read_to_mni(files), (10, 20, 30)) == pytest.approx((to_mni @ [10, 20, 30, 1])[:3])


def test_last_line_of_a_case_counts(tmp_path):
    """Over all parts of the table that processes side by side have written."""
    head = "case\tstatus\tseconds\tmessage\n"
    (tmp_path / "status.tsv").write_text(f'{head}a\tImageShapeError\t1\tflat "scan"\nb\tok\t1\t\n', encoding="utf-8")
    (tmp_path / "status_2.tsv").write_text(f"{head}a\tok\t1\t\nc\tunreliable\t1\tthick slices\n", encoding="utf-8")
    outcomes = {outcome.case: outcome for outcome in read_outcomes(tmp_path)}
    assert {name: outcome.status for name, outcome in outcomes.items()} == {"a": "ok", "b": "ok", "c": "unreliable"}
    assert outcomes["c"].message == "thick slices"
    assert not any(outcome.failed for outcome in outcomes.values())
    (tmp_path / "status_2.tsv").unlink()
    failed = read_outcomes(tmp_path)[0]
    assert (failed.failed, failed.message) == (True, 'flat "scan"')


def test_other_table_is_no_status_table(tmp_path):
    (tmp_path / "status.tsv").write_text("a\tb\n1\t2\n", encoding="utf-8")
    with pytest.raises(ResultError, match=r"not a status table of uad detect"):
        read_outcomes(tmp_path)
