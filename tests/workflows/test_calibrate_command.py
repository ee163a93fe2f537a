"""`uad calibrate`: the threshold of a user's own scanner, from a few healthy scans."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from common.bundle import BUNDLES_DIR
from common.cli import app
from common.cohorts.table import write_cohort
from common.errors import CohortError
from common.weights import load_weights, save_weights
from common.workflows.calibrate import Calibrate, healthy_cases

SHIPPED = BUNDLES_DIR / "dae" / "models" / "model.pt"
THIN = "preprocessing::brain_volume_ml=[1,2300]"  # of the ten slices of a thin brain


@pytest.fixture(scope="module")
def healthy(phantom, save_nifti, tmp_path_factory):
    """Four thin brains with noise."""
    folder, scans = tmp_path_factory.mktemp("healthy"), []
    for index in range(4):
        person = replace(phantom, scale=1 + index / 50, lesion=False)
        (height, width, depth), affine = person.grid()
        affine[:3, 3] += affine[:3, :3] @ (0, 0, depth // 2 - 5)
        image, brain, _ = person.on_grid((height, width, 10), affine)
        noise = np.random.default_rng(index).normal(0, 12, image.shape)
        noisy = np.where(brain, image + noise, 0).astype(np.float32)
        scans.append(save_nifti(folder / f"h{index}.nii.gz", noisy, affine))
    return scans


def calibrate(scans, output, *options, method="dae"):
    given = ["-m", method, "-o", output, "--device", "cpu", "--set", THIN, *options]
    arguments = ["calibrate", "-q", *scans, *given]  # without progress, whose lines depend on the time
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture(scope="module")
def done(healthy, tmp_path_factory):
    """The weights, and what was said."""
    output = tmp_path_factory.mktemp("calibrated") / "mine.pt"
    before = hashlib.sha256(SHIPPED.read_bytes()).hexdigest()
    result = calibrate(healthy, output)
    assert result.exit_code == 0, result.output
    assert hashlib.sha256(SHIPPED.read_bytes()).hexdigest() == before
    return output, result.stdout


def refused(result, kind, *words):
    """One line, the exit of a refusal."""
    assert result.exit_code == 3, result.output
    line = result.stderr.strip()
    assert line.startswith(f"{kind}: "), line
    assert "\n" not in line
    for word in words:
        assert word in line
    return line


def test_of_few_scans_all_but_the_atlas_is_fitted(done):
    stored, shipped = load_weights(done[0]), load_weights(SHIPPED)
    assert stored.keys() == shipped.keys()
    fitted = {name for name in stored if not torch.equal(stored[name], shipped[name])}
    assert {"calibration.threshold", "calibration.score_quantiles", "normalisation.scale_quantiles"} <= fitted
    assert all(name.split(".")[0] in ("calibration", "normalisation") for name in fitted)
    assert "normalisation.atlas" not in fitted
    assert stored["calibration.subjects"] == 4


def test_it_says_how_uncertain_it_is(done):
    output, said = done
    stored = load_weights(output)
    low, high = stored["calibration.threshold_interval"].tolist()
    assert low < stored["calibration.threshold"] < high
    assert f"95 % interval {low:.4g} to {high:.4g}" in said
    assert "4 healthy subjects" in said
    assert "the atlas of the weights is kept" in said
    report = json.loads(output.with_suffix(".calibration.json").read_text(encoding="utf-8"))
    assert report["threshold"] == float(stored["calibration.threshold"])
    assert report["interval"] == [low, high]
    assert report["sites"][""]["subjects"] == 4
    assert report["sites"][""]["healthy_share"] == pytest.approx(0.01, abs=0.002)
    assert sorted(path.name for path in output.parent.iterdir()) == ["mine.calibration.json", "mine.pt"]


def test_detection_says_where_its_threshold_comes_from(done, healthy, tmp_path):
    arguments = ["detect", healthy[0], "-m", "dae", "-o", tmp_path / "out", "--weights", done[0], "--device", "cpu"]
    result = CliRunner().invoke(app, list(map(str, [*arguments, "--set", THIN])))
    assert result.exit_code == 0, result.output
    run = json.loads((tmp_path / "out" / "h0" / "run.json").read_text(encoding="utf-8"))
    stored = load_weights(done[0])
    assert run["threshold"] == float(stored["calibration.threshold"])
    assert run["threshold_origin"] == {
        "kind": "calibrated",
        "false_positive_share": 0.01,
        "subjects": 4,
        "interval": stored["calibration.threshold_interval"].tolist(),
    }
    assert not any("other settings" in warning for warning in run["warnings"])


def test_it_can_be_done_again_to_the_same_bits(done, healthy):
    before = load_weights(done[0])
    assert calibrate(healthy, done[0]).exit_code == 0
    after = load_weights(done[0])
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_method_with_a_threshold_of_its_own_fits_it_on_the_same_scans(healthy, tmp_path, monkeypatch):
    """`Calibrate.start` gives the slices of the user's scans to the method, which has its own tests."""
    given = []
    monkeypatch.setattr("common.methods.auto_ddpm.AutoDDPM.fit_threshold", lambda self, batches: given.extend(batches))
    monkeypatch.setattr("common.workflows.engines.DetectionEvaluator.run", lambda self: None)
    tasks = []
    attach = Calibrate.attach
    monkeypatch.setattr(Calibrate, "attach", lambda self, engine: (tasks.append(self), attach(self, engine)))
    result = calibrate(healthy, tmp_path / "mine.pt", method="auto_ddpm")
    assert result.exit_code == 0, result.output
    tasks[0].start(None)
    assert sum(len(batch) for batch in given) == 4 * 10
    assert given[0].shape[1:] == (1, 96, 96)


def test_one_bad_scan_is_named_and_nothing_written(healthy, tmp_path):
    bad = tmp_path / "bad.nii.gz"
    bad.write_bytes(b"\x1f\x8bno scan")
    (tmp_path / "out").mkdir()
    refused(calibrate([healthy[0], bad, *healthy[1:]], tmp_path / "out" / "mine.pt"), "ImageFileError", str(bad))
    assert not list((tmp_path / "out").iterdir())


def test_copies_of_a_scan_are_no_other_subjects(healthy, tmp_path):
    copy = tmp_path / "copy.nii.gz"
    copy.write_bytes(healthy[0].read_bytes())
    result = calibrate([healthy[0], copy, *healthy[1:3]], tmp_path / "out" / "mine.pt")
    refused(result, "CohortError", "copy", "same image", "h0")
    assert not (tmp_path / "out").exists()


def test_too_few_are_refused_with_the_reason(healthy, tmp_path):
    line = refused(calibrate(healthy[:3], tmp_path / "mine.pt"), "CohortError", "3 healthy subjects", "at least 4")
    assert "threshold" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["itself", "link", "hard link", "report", "other file", "other report", "of a bundle"])
def test_nothing_but_an_earlier_calibration_is_written_over(kind, healthy, tmp_path):
    """The weights that are read, also through links; scans; files of another kind; what the bundles ship."""
    mine, output = tmp_path / "weights.pt", tmp_path / "out.pt"
    save_weights({"calibration.threshold": torch.tensor(1.0)}, mine)
    if kind == "itself":
        output = mine
    elif kind == "link":
        output.symlink_to(mine)
    elif kind == "hard link":
        os.link(mine, output)
    elif kind == "report":
        mine = mine.rename(output.with_suffix(".calibration.json"))
    elif kind == "other file":
        output.write_text("a thesis", encoding="utf-8")
    elif kind == "other report":
        output.with_suffix(".calibration.json").write_text('{"threshold": 1}', encoding="utf-8")
    else:
        output = BUNDLES_DIR / "vae" / "models" / "model.pt"
    before = {path: path.read_bytes() for path in (*tmp_path.iterdir(), *healthy)}
    refused(calibrate(healthy, output, "--weights", mine), "OutputError")
    assert {path: path.read_bytes() for path in before} == before
    assert set(tmp_path.iterdir()) <= before.keys()


def test_a_cohort_gives_its_healthy_rows(healthy, tmp_path, monkeypatch):
    """All of them, or those of the split `val`; a path that begins with "$" is a path."""
    rows = [{"subject": f"$s{i}", "split": "train", "T1": str(healthy[i % 4]), "site": "AB"[i % 2]} for i in range(7)]
    rows.append({"subject": "ill", "split": "train", "T1": str(healthy[0]), "lesion": str(healthy[0]), "site": "A"})
    write_cohort(tmp_path / "cohort.csv", ["T1"], rows)
    given = []
    monkeypatch.setattr("common.cli.run_inference", lambda name, configs, **override: given.append(override))
    result = calibrate([tmp_path / "cohort.csv"], tmp_path / "mine.pt")
    assert result.exit_code == 0, result.output
    assert "7 healthy subjects; 1 with a lesion left out" in result.stdout
    assert [item["subject"] for item in given[0]["dataset::data"]] == [f"$s{i}" for i in range(7)]
    for row in rows[1:6]:
        row["split"] = "val"
    write_cohort(tmp_path / "cohort.csv", ["T1"], rows)
    result = calibrate([tmp_path / "cohort.csv"], tmp_path / "mine.pt")
    assert "5 healthy subjects of the split val" in result.stdout
    assert [item["subject"] for item in given[1]["dataset::data"]] == [f"$s{i}" for i in range(1, 6)]


def test_subjects_with_a_lesion_do_not_count(healthy):
    items = [{"subject": str(i), "image": str(path), "lesion": "mask.nii.gz"} for i, path in enumerate(healthy)]
    with pytest.raises(CohortError, match="0 healthy subjects"):
        healthy_cases(items)
