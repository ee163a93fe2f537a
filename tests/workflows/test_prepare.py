"""A prepared cohort is a cohort: the same images for training, only faster."""

from __future__ import annotations

import csv

import nibabel as nib
import numpy as np
import torch

from common.cohorts.table import read_cohort
from common.transforms.pipeline import BrainPreprocessing
from common.workflows import prepare
from common.workflows.batch import StatusTable
from common.workflows.prepare import preparation_of, prepare_cohort, prepared_files

SETTINGS = {"spacing_mm": 4.0, "percentile": 98.0, "upper": 0.8, "canvas": 0}


def test_prepared_is_what_training_reads(cohort, tmp_path):
    assert prepare_cohort(cohort, tmp_path, 4.0, register=False, strip=None) == 0
    preprocessing = BrainPreprocessing(**SETTINGS)
    items, prepared = read_cohort(cohort, ["T1"]), read_cohort(tmp_path / "cohort.csv", ["T1"])
    assert [item["split"] for item in prepared] == [item["split"] for item in items]
    for old, new in zip(items, prepared, strict=True):
        want, got = preprocessing(old)["image"], preprocessing(new)["image"]
        assert want.shape == got.shape
        assert torch.allclose(want.as_tensor(), got.as_tensor(), atol=0.01)
        assert torch.equal(want > 0, got > 0)
        assert np.allclose(want.affine, got.affine)
    lesions = [item for item in prepared if "lesion" in item]
    assert [item["subject"] for item in lesions] == ["d"]
    old, new = nib.load(items[-1]["lesion"]), nib.load(lesions[0]["lesion"])
    volumes = [np.asarray(mask.dataobj).sum() * abs(np.linalg.det(mask.affine)) for mask in (old, new)]
    assert abs(volumes[0] - volumes[1]) < 0.2 * volumes[0]
    assert new.shape == nib.load(lesions[0]["image"]).shape


def test_bad_subjects_are_left_out_and_done_again(cohort, tmp_path):
    text = cohort.read_text(encoding="utf-8").replace("b.nii.gz", "none.nii.gz", 1)
    broken = cohort.with_name("broken.csv")
    broken.write_text(text, encoding="utf-8")
    assert prepare_cohort(broken, tmp_path, 4.0, register=False, strip=None) == 1
    with (tmp_path / "status.tsv").open(newline="", encoding="utf-8") as file:
        rows = {row["case"]: row for row in csv.DictReader(file, delimiter="\t")}
    assert rows["b"]["status"] == "ImageFileError"
    assert "no such file" in rows["b"]["message"]
    assert [item["subject"] for item in read_cohort(tmp_path / "cohort.csv", ["T1"])] == ["a", "c", "d"]
    written = (tmp_path / "a" / "T1.nii.gz").stat().st_mtime_ns
    assert prepare_cohort(cohort, tmp_path, 4.0, register=False, strip=None) == 0
    assert [item["subject"] for item in read_cohort(tmp_path / "cohort.csv", ["T1"])] == ["a", "b", "c", "d"]
    assert (tmp_path / "a" / "T1.nii.gz").stat().st_mtime_ns == written


def test_the_table_is_read_once_for_all_that_is_done(cohort, tmp_path, monkeypatch):
    """And again where another process has done a subject since."""
    preparation, items = preparation_of(cohort, tmp_path / "out", 4.0, register=False, strip=None)
    for item in items:
        for name in prepared_files(item, ["T1"]).values():
            (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "out" / name).touch()
    read, times = prepare.read_status, []
    monkeypatch.setattr(prepare, "read_status", lambda path: times.append(path) or read(path))
    with StatusTable(preparation.table_path) as table:
        for item in items[:-1]:
            table.add(item["subject"], "ok", 1)
        assert [preparation.run(item).was_there for item in items[:-1]] == [True] * (len(items) - 1)
        assert len(times) == 1
        table.add(items[-1]["subject"], "ok", 1)
        assert preparation.run(items[-1]).was_there
        assert len(times) == 2


def test_the_site_of_a_subject_is_kept(cohort, tmp_path):
    with cohort.open(newline="", encoding="utf-8") as file:
        row = next(csv.DictReader(file))
    source = tmp_path / "cohort.csv"
    with source.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*row, "site"])
        writer.writeheader()
        writer.writerow({**row, "T1": str(cohort.parent / row["T1"]), "site": "north"})
    assert prepare_cohort(source, tmp_path / "out", 4.0, register=False, strip=None) == 0
    assert read_cohort(tmp_path / "out" / "cohort.csv", ["T1"])[0]["site"] == "north"
