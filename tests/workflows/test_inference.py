"""What is written of a case: its verdict, what counts as finished, and DICOM objects of reliable results only."""

from __future__ import annotations

import json

import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor

from common.detection.calibration import Calibration
from common.detection.method import AnomalyDetector
from common.detection.reliability import verdict
from common.detection.volume import VolumeDetector
from common.errors import DicomError, OutputError
from common.results.dicom import OBJECTS
from common.transforms.pipeline import BrainPreprocessing
from common.transforms.postprocess import Postprocessing
from common.weights import save_weights, sha256
from common.workflows.inference import SaveDetections

pytestmark = pytest.mark.usefixtures("no_picture")

DOUBT = ["slices of 5.0 mm, the networks were trained on thin ones"]


class Half(AnomalyDetector):
    """A method whose map is half of the image."""

    def _detect(self, image, foreground, generators):
        return image / 2, image


@pytest.fixture
def scan(phantom, save_nifti, tmp_path):
    shape, affine = phantom.grid(spacing_mm=(6, 6, 6))
    return save_nifti(tmp_path / "scan.nii.gz", phantom.on_grid(shape, affine)[0], affine)


@pytest.fixture
def saver(tmp_path):
    """Make the handler of an evaluator that says `outputs`; the weights are the same each time."""
    weights = tmp_path / "weights" / "model.pt"

    def make(spacing_mm=2.0, method=Half, **options):
        network = VolumeDetector(method()).eval()
        if not weights.is_file():
            save_weights(network.state_dict(), weights)
        preprocessing = BrainPreprocessing(spacing_mm=spacing_mm, percentile=98.0, upper=0.8, canvas=96)
        segmentation = {"threshold": 0.1, "min_volume_ml": 0.02, "save_map": False}
        evaluator = Engine(lambda engine, batch: engine.outputs)
        evaluator.state.device = torch.device("cpu")
        vars(evaluator).update(
            bundle="dae", engine="torch", network=network, weights=str(weights), preprocessing=preprocessing
        )
        evaluator.postprocessing = Postprocessing(preprocessing, str(weights), segmentation)
        handler = SaveDetections(str(tmp_path / "out"), **options)
        handler.attach(evaluator)
        return handler

    return make


def run(handler, scan, doubts=(), **found):
    """Let a case pass as the evaluator does, which has `found` more."""
    ones = MetaTensor(torch.ones(1, 5, 6, 7), meta={"filename_or_obj": str(scan)})
    outputs = {"anomaly_map": ones * 0.2, "reconstruction": ones, "segmentation": ones.to(torch.uint8)}
    numbers = Calibration().describe(outputs["anomaly_map"].as_tensor(), ones.as_tensor(), 0.1)
    batch = {"subject": "scan", "input": ones, "brain": ones.bool(), "brain_source": "stripped"}
    batch["image_sha256"] = sha256(scan)
    handler.evaluator.outputs = [outputs | {"image": ones / 4, "result": numbers | verdict(doubts)} | found]
    handler.evaluator.run([[batch]], max_epochs=1)


def item(scan):
    return {"subject": "scan", "image": str(scan)}


def record_of(handler):
    return json.loads((handler.output_dir / "scan" / "run.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("doubts", [[], DOUBT])
def test_verdict_is_kept_and_recorded(doubts, saver, scan):
    handler = saver()
    run(handler, scan, doubts)
    assert handler.verdicts == {"scan": verdict(doubts)}
    record = record_of(handler)
    assert {name: record[name] for name in ("reliability", "doubts")} == verdict(doubts)
    assert [f"unreliable, do not interpret: {doubt}" in record["warnings"] for doubt in doubts] == [True] * len(doubts)


def test_finished_is_the_record_of_the_same_settings(saver, scan):
    assert saver().finished(item(scan)) is None
    run(saver(), scan, DOUBT)
    record = saver().finished(item(scan))
    assert record == record_of(saver())
    assert record["reliability"] == "unreliable"
    with pytest.raises(OutputError, match=r"holds another result \(settings.spacing_mm: 2 before, 3 now\)"):
        saver(spacing_mm=3.0).finished(item(scan))


@pytest.mark.parametrize("text", ["", '{"subject": "scan"'])
def test_record_that_was_cut_is_not_finished(text, saver, scan):
    run(saver(), scan)
    (saver().output_dir / "scan" / "run.json").write_text(text, encoding="utf-8")
    assert saver().finished(item(scan)) is None


def test_objects_that_are_missing_are_wanted_of_a_reliable_result_or_by_force(saver, scan):
    run(saver(), scan)
    assert saver(dicom=True).finished(item(scan)) is None
    for name in OBJECTS:
        (saver().output_dir / "scan" / name).touch()
    assert saver(dicom=True).finished(item(scan)) is not None


def test_objects_of_an_unreliable_result_are_wanted_by_force_alone(saver, scan, capsys):
    run(saver(dicom=True), scan, DOUBT)  # of a NIfTI file there can be none
    withheld = "scan: no DICOM objects are written of an unreliable result, unless they are forced"
    assert withheld in record_of(saver())["warnings"]
    assert f"Warning: {withheld}\n" in capsys.readouterr().err
    assert saver(dicom=True).finished(item(scan)) is not None
    assert saver(dicom=True, force=True).finished(item(scan)) is None


@pytest.mark.parametrize(("doubts", "force"), [([], False), (DOUBT, True)])
def test_objects_that_cannot_be_made_are_said_and_the_rest_is_written(doubts, force, saver, scan):
    handler = saver(dicom=True, force=force)
    with pytest.raises(DicomError, match="no DICOM series"):
        run(handler, scan, doubts)
    assert handler.verdicts == {"scan": verdict(doubts)}
    assert not any("unless they are forced" in warning for warning in record_of(handler)["warnings"])
    assert any("no DICOM series" in warning for warning in record_of(handler)["warnings"])


class Costly(Half):
    """Its image-level score, which takes a pass of its own, is the sum of the slice."""

    def score(self, image, foreground, generators):
        return image.sum(dim=(1, 2, 3))


def test_score_that_comes_with_the_map_is_recorded(saver, scan):
    run(saver(), scan, slice_scores=torch.tensor([1.0, torch.nan, 4.0]))
    assert record_of(saver())["method_score"] == 2.5


@pytest.mark.parametrize("method", [Half, Costly])
def test_score_that_costs_is_not_made_unasked(method, saver, scan):
    run(saver(method=method), scan)
    assert record_of(saver())["method_score"] is None


def test_score_that_costs_is_made_where_it_is_asked_for(saver, scan):
    run(saver(method=Costly, method_score=True), scan)
    assert record_of(saver())["method_score"] == 5 * 6 / 4  # the mean over seven like slices
    run(saver(method_score=True), scan)
    assert record_of(saver())["method_score"] is None  # this method has none


def test_result_without_the_score_that_is_asked_for_is_not_finished(saver, scan):
    run(saver(method=Costly), scan)
    assert saver(method=Costly).finished(item(scan)) is not None
    assert saver(method=Costly, method_score=True).finished(item(scan)) is None
    run(saver(method=Costly, method_score=True), scan)
    assert saver(method=Costly, method_score=True).finished(item(scan)) is not None
    assert saver(method=Costly).finished(item(scan)) is not None
    run(saver(), scan)
    assert saver(method_score=True).finished(item(scan)) is not None  # a method that has none to give
