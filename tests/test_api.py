"""Detection from Python: in memory, of any kind of image, the same bits as the command."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - its own name for itself
import torch
from monai.data import MetaTensor
from typer.testing import CliRunner

import common
from common.cli import app
from common.cohorts.table import SAMPLE_DIR
from common.errors import (
    BundleError,
    ImageFileError,
    ImageGeometryError,
    ImageIntensityError,
    ImageShapeError,
    SettingError,
)

SAMPLE = SAMPLE_DIR / "mni152_lesions_T1.nii.gz"
VOLUMES = ("anomaly_map", "segmentation", "reconstruction")


@pytest.fixture(scope="module")
def detector():
    return common.load_detector("dae", device="cpu")


@pytest.fixture(scope="module")
def found(detector):
    return detector(SAMPLE)


def same(one, other):
    """Both detections, bit by bit."""
    for name in VOLUMES:
        a, b = getattr(one, name), getattr(other, name)
        np.testing.assert_array_equal(np.asarray(a.dataobj), np.asarray(b.dataobj), err_msg=name)
        np.testing.assert_array_equal(a.affine, b.affine)
    assert one.lesions == other.lesions


def test_importing_it_imports_nothing_heavy():
    heavy = "[name for name in ('torch', 'monai', 'numpy', 'nibabel') if name in sys.modules]"
    command = f"import sys, common; assert 'detect' in common.__all__; print({heavy})"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    with pytest.raises(AttributeError, match="nonsense"):
        common.nonsense  # noqa: B018


def test_it_is_what_the_command_writes(found, tmp_path):
    arguments = ["detect", SAMPLE, "-m", "dae", "-o", tmp_path, "--device", "cpu"]
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    case = tmp_path / "mni152_lesions_T1"
    for name in VOLUMES:
        written, ours = nib.load(case / f"{name}.nii.gz"), getattr(found, name)
        assert written.get_data_dtype() == ours.get_data_dtype()
        np.testing.assert_array_equal(np.asarray(written.dataobj), np.asarray(ours.dataobj), err_msg=name)
        np.testing.assert_array_equal(written.affine, ours.affine)
    with (case / "lesions.csv").open(newline="", encoding="utf-8") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert found.lesions == rows != []
    run = json.loads((case / "run.json").read_text(encoding="utf-8"))
    del run["image"], run["seconds"]
    assert {name: value for name, value in found.record.items() if name != "seconds"} == run
    assert str(SAMPLE_DIR) not in json.dumps(found.record)


@pytest.mark.parametrize("kind", ["nibabel", "SimpleITK", "MetaTensor", "array"])
def test_an_image_in_memory_gives_the_same_and_stays(kind, detector, found):
    file = nib.load(SAMPLE)
    values = np.asarray(file.dataobj).astype(np.float32)
    given = {
        "nibabel": lambda: nib.Nifti1Image(values, file.affine),
        "SimpleITK": lambda: sitk.ReadImage(str(SAMPLE), sitk.sitkFloat32),
        "MetaTensor": lambda: MetaTensor(torch.from_numpy(values)[None], affine=torch.as_tensor(file.affine)),
        "array": lambda: values,
    }[kind]()
    before = values.copy()
    result = detector(given, affine=file.affine if kind == "array" else None)
    same(result, found)
    np.testing.assert_array_equal(values, before)
    assert result.record["input_sha256"] == {}
    assert result.record["subject"] == "image"
    differing = {name for name in found.record if found.record[name] != result.record[name]}
    assert differing <= {"subject", "input_sha256", "seconds"}


def test_errors_are_those_of_the_command(detector, tmp_path):
    affine, brain = np.diag([2.0, 2.0, 2.0, 1.0]), np.ones((8, 8, 8), dtype=np.float32)
    noisy = np.random.default_rng(0).normal(size=(8, 8, 8))
    noisy[0, 0, 0] = np.nan
    vector = sitk.GetImageFromArray(np.zeros((4, 4, 4, 3), np.float32), isVector=True)
    unplaced = nib.Nifti1Image(brain, None)
    unplaced.header["sform_code"] = unplaced.header["qform_code"] = 0
    bad = [
        (tmp_path / "none.nii.gz", {}, ImageFileError),
        (42, {}, ImageFileError),
        ([], {}, ImageFileError),
        (brain, {}, ImageGeometryError),
        (unplaced, {}, ImageGeometryError),
        (MetaTensor(torch.from_numpy(brain), affine=torch.eye(4), meta={"space": "LPS"}), {}, ImageGeometryError),
        (brain, {"affine": affine}, ImageIntensityError),
        (noisy, {"affine": affine}, ImageIntensityError),
        (brain[0], {"affine": affine}, ImageShapeError),
        (vector, {}, ImageShapeError),
    ]
    for image, options, kind in bad:
        with pytest.raises(kind) as raised:
            detector(image, **options)
        assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_a_detector_that_cannot_be_made_says_why(tmp_path):
    for options, kind in [
        ({"bundle": "nonsense"}, BundleError),
        ({"bundle": "dae", "weights": tmp_path / "none.pt"}, BundleError),
        ({"bundle": "dae", "device": "abacus"}, SettingError),
        ({"bundle": "dae", "settings": {"no_such_item": 1}}, SettingError),
    ]:
        with pytest.raises(kind):
            common.load_detector(**options)


def test_it_leaves_the_hook_for_errors_as_it_was(monkeypatch):
    """MONAI's `initialize` of a bundle sets one for the whole process."""
    hook = lambda *_: None  # noqa: E731
    monkeypatch.setattr(sys, "excepthook", hook)
    common.load_detector("dae", device="cpu")
    assert sys.excepthook is hook
