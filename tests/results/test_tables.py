"""The tables of many cases hold what is in their folders, once, and nothing that is half-written."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from common.detection.calibration import Calibration
from common.detection.reliability import verdict
from common.errors import OutputError
from common.results.case import Case, write_case
from common.results.tables import CASE_COLUMNS, LESION_COLUMNS, check_tables, write_tables

BLOBS = ((2, 2, 2), (9, 9, 9))
HEADER = "case\tstatus\tseconds\tmessage\n"


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Write a case with two blobs of 8 and 1 voxels of 8 mm3 into `out`."""
    monkeypatch.setattr("common.results.case.save_preview", lambda case, threshold, path, *others: path.touch())

    def made(name, doubts=(), to_mni=None, entities=None, bundle="dae"):
        ones = np.ones((12, 12, 12), np.float32)
        mask = np.zeros_like(ones)
        mask[2:4, 2:4, 2:4] = mask[9, 9, 9] = 1
        affine = np.diag([2.0, 2.0, 2.0, 1.0])
        maps = {"image": ones, "brain": ones, "anomaly_map": mask, "reconstruction": ones, "segmentation": mask}
        volumes = {key: MetaTensor(torch.from_numpy(x.copy())[None], affine=affine) for key, x in maps.items()}
        calibration = Calibration()
        calibration.fit(0.5, 0.01, torch.linspace(0, 2, 20))
        case = Case(name, **volumes, to_mni=to_mni)
        numbers = calibration.describe(case.anomaly_map.as_tensor(), case.brain.as_tensor(), 0.5)
        run = {"bundle": bundle, "weights_sha256": "ab", "input_sha256": {}, "settings": {}, "seconds": 1.5}
        found = numbers | {"tissue_modes": [0.2, 0.6, 0.8]} | verdict(doubts)
        folder = tmp_path / "out" / ("sub" if entities else name)
        write_case(folder, entities, case, found, run)
        return folder

    return made


def rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_case_and_its_lesions(make, tmp_path):
    to_mni = np.array([[1.0, 0, 0, 10], [0, 1, 0, 20], [0, 0, 1, 30], [0, 0, 0, 1]])
    make("a", to_mni=to_mni)
    make("b", ["another contrast"])
    out = tmp_path / "out"
    (out / "status.tsv").write_text(f"{HEADER}a\tok\t1.00\t\nb\tunreliable\t1.00\tanother contrast\n", encoding="utf-8")
    write_tables(out)
    first, second = rows(out / "cases.csv")
    assert tuple(first) == CASE_COLUMNS
    run = json.loads((out / "a" / "run.json").read_text(encoding="utf-8"))
    for column in ("volume_score", "volume_score_percentile", "threshold", "lesion_volume_ml", "abnormal_share"):
        assert float(first[column]) == run[column]
    assert (first["case"], first["status"], first["reliability"], first["bundle"]) == ("a", "ok", "ok", "dae")
    assert (first["lesions"], first["seconds"], first["reasons"]) == ("2", "1.5", "")
    assert float(first["brain_mask_ml"]) == pytest.approx(12**3 * 0.008)
    assert {name: float(first[name]) for name in run["quality"]} == run["quality"]
    assert float(first["tissue_contrast"]) == 0.25
    assert (second["status"], second["reliability"], second["reasons"]) == (*["unreliable"] * 2, "another contrast")
    assert second["registration_dice"] == ""

    lesions = rows(out / "lesions_all.csv")
    assert tuple(lesions[0]) == LESION_COLUMNS
    assert [(row["case"], row["lesion"]) for row in lesions] == [("a", "1"), ("a", "2"), ("b", "1"), ("b", "2")]
    assert [float(row["volume_ml"]) for row in lesions] == [0.064, 0.008] * 2
    assert [lesions[1][f"{axis}_mm"] for axis in "xyz"] == ["18.0"] * 3
    assert [float(lesions[1][f"mni_{axis}_mm"]) for axis in "xyz"] == [28, 38, 48]
    assert lesions[3]["mni_x_mm"] == "" and lesions[3]["reliability"] == "unreliable"


def test_failed_case_has_its_reason_and_no_numbers(make, tmp_path):
    """Not those of an earlier run; where only the DICOM objects are lacking, the numbers are there."""
    out = tmp_path / "out"
    for name in ("old", "nifti"):
        make(name)
    lines = ["bad\tImageShapeError\t0.1\tbad.nii.gz: no volume", "old\tOutputError\t0.1\tother settings"]
    lines += ["nifti\tDicomError\t1.0\tno series"]
    (out / "status_1-of-2.tsv").write_text(HEADER + "\n".join(lines) + "\n", encoding="utf-8")
    write_tables(out)
    bad, nifti, old = rows(out / "cases.csv")
    assert (bad["case"], bad["status"], bad["reasons"]) == ("bad", "ImageShapeError", "bad.nii.gz: no volume")
    assert (old["case"], old["volume_score"], old["reliability"]) == ("old", "", "")
    assert nifti["status"] == "DicomError" and float(nifti["volume_score"]) > 0
    assert {row["case"] for row in rows(out / "lesions_all.csv")} == {"nifti"}


def test_broken_record_does_not_hide_the_others(make, tmp_path):
    make("a")
    (make("b") / "run.json").write_text("{", encoding="utf-8")
    write_tables(tmp_path / "out")
    first, second = rows(tmp_path / "out" / "cases.csv")
    assert (first["status"], second["status"]) == ("ok", "ResultError")
    assert "run.json" in second["reasons"]


def test_case_of_a_bids_derivative_goes_by_its_subject(make, tmp_path):
    make("sub-01_T1w", entities="sub-01")
    (tmp_path / "out" / "status.tsv").write_text(f"{HEADER}sub-01_T1w\tok\t1.00\t\n", encoding="utf-8")
    write_tables(tmp_path / "out")
    assert [row["case"] for row in rows(tmp_path / "out" / "cases.csv")] == ["sub-01_T1w"]


def test_results_of_several_methods_have_a_row_each(make, tmp_path):
    for bundle in ("vae", "dae"):
        make("sub-01", entities=f"sub-01_desc-{bundle}", bundle=bundle)
    (tmp_path / "out" / "status.tsv").write_text(f"{HEADER}sub-01\tok\t1.00\t\n", encoding="utf-8")
    write_tables(tmp_path / "out")
    assert [(row["case"], row["bundle"]) for row in rows(tmp_path / "out" / "cases.csv")] == [
        ("sub-01", "dae"),
        ("sub-01", "vae"),
    ]
    assert [row["bundle"] for row in rows(tmp_path / "out" / "lesions_all.csv")] == ["dae", "dae", "vae", "vae"]


def test_same_cases_same_bytes_and_nothing_is_left(make, tmp_path):
    out = tmp_path / "out"
    for name in ("b", "a"):
        make(name)
    write_tables(out)
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert set(before) == {"cases.csv", "lesions_all.csv"}
    write_tables(out)
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before


def test_table_of_somebody_else_is_left_alone(tmp_path):
    check_tables(tmp_path)
    write_tables(tmp_path)
    check_tables(tmp_path)
    (tmp_path / "cases.csv").write_text("case,age\n", encoding="utf-8")
    with pytest.raises(OutputError, match=r"cases.csv: is there already and is not a table of uad detect"):
        check_tables(tmp_path)


def test_disk_that_is_full_is_one_line(make, tmp_path, monkeypatch):
    make("a")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("common.results.tables._write", full)
    with pytest.raises(OutputError, match="tables cannot be written"):
        write_tables(tmp_path / "out")
