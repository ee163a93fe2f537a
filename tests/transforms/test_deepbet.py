"""The brain within a head by a package that may be missing, whose weights may be others, or which may find nothing."""

from __future__ import annotations

import hashlib
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from typer.testing import CliRunner

from common.cli import FAILED, app
from common.cohorts.table import SAMPLE_DIR
from common.errors import SkullStripError
from common.transforms import deepbet
from common.transforms.brain import BrainMaskd
from common.transforms.deepbet import deepbet_brain_mask
from common.transforms.strip import atlas_brain_mask

ROOT = Path(__file__).parents[2]
WEIGHTS = {"model.pt": b"the network", "bbox_model.pt": b"the network of the box"}


class Extraction:
    """The interface of `deepbet.BrainExtraction`: the brain is what is brighter than 150."""

    fails: Exception | None = None

    def __init__(self, no_gpu=False, model_path=None, bbox_model_path=None):
        assert no_gpu
        assert {"model.pt": model_path.read(), "bbox_model.pt": bbox_model_path.read()} == WEIGHTS

    def run(self, input, brain_path=None, mask_path=None, tiv_path=None, threshold=0.5, n_dilate=0):
        if self.fails:
            raise self.fails
        mask = np.asarray(input.dataobj) > 150
        return input, nib.Nifti1Image(mask, input.affine, input.header), float(mask.sum())


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A package `deepbet` as pip installs it, with weights of its own."""
    package = ModuleType("deepbet")
    package.__file__ = str(tmp_path / "deepbet" / "__init__.py")
    package.BrainExtraction = type("BrainExtraction", (Extraction,), {})
    models = tmp_path / "data" / "models"
    models.mkdir(parents=True)
    for name, content in WEIGHTS.items():
        (models / name).write_bytes(content)
    monkeypatch.setitem(sys.modules, "deepbet", package)
    return package, models


@pytest.fixture
def known(monkeypatch):
    """The weights of `library` are those that are known."""
    monkeypatch.setattr(
        deepbet, "SHA256", {name: hashlib.sha256(content).hexdigest() for name, content in WEIGHTS.items()}
    )


@pytest.fixture(scope="module")
def head():
    """A ball of 1400 ml in noise, on a grid that is oblique and runs from right to left and from the top down."""
    rng = np.random.default_rng(0)
    volume = rng.uniform(1, 60, (64, 72, 56)).astype(np.float32)
    around = np.indices(volume.shape) - np.array([30, 36, 28])[:, None, None, None]
    volume[np.linalg.norm(around, axis=0) < 23] += 200
    turn = np.array([[-0.96, 0.28, 0], [0.28, 0.96, 0], [0, 0, -1]]) * 3
    return MetaTensor(torch.from_numpy(volume)[None], affine=nib.affines.from_matvec(turn, [90, -110, 80]))


def test_brain_is_what_the_package_finds(head, library, known):
    before = head.clone()
    result = BrainMaskd("image", strip="deepbet")({"image": head})
    assert result["brain_source"] == "deepbet"
    assert result["brain"].dtype == torch.bool
    assert torch.equal(result["brain"].as_tensor(), before.as_tensor() > 150)
    assert np.array_equal(result["brain"].affine, before.affine)
    assert torch.equal(head.as_tensor(), before.as_tensor())


@pytest.mark.parametrize("name", WEIGHTS)
def test_other_weights_are_refused_and_not_loaded(name, head, library, known):
    package, models = library
    package.BrainExtraction.__init__ = lambda *arguments: pytest.fail("loaded")
    (models / name).write_bytes(b"of another version")
    with pytest.raises(SkullStripError, match=rf"data/models/{name}: not the weights .*pip install deepbet==1.0.2"):
        deepbet_brain_mask(head)
    (models / name).unlink()
    with pytest.raises(SkullStripError, match=rf"data/models/{name}: .*cannot be read .*pip install deepbet==1.0.2"):
        deepbet_brain_mask(head)


def test_only_the_published_weights_are_known(head, library):
    with pytest.raises(SkullStripError, match="not de8ee7c69654"):
        deepbet_brain_mask(head)


@pytest.mark.parametrize("error", [AssertionError("Not enough\nforeground"), ValueError(), RuntimeError("no memory")])
def test_head_in_which_nothing_is_found(error, head, library, known):
    library[0].BrainExtraction.fails = error
    said = (str(error) or "ValueError").splitlines()[-1]
    with pytest.raises(SkullStripError, match=rf"deepbet failed \({said}\).*::strip atlas"):
        deepbet_brain_mask(head)


def test_without_the_extra_a_line_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "deepbet", None)
    head = SAMPLE_DIR / "head_lesions_T1.nii.gz"
    done = CliRunner().invoke(
        app, ["detect", str(head), "-m", "dae", "--strip", "deepbet", "-o", str(tmp_path / "out")]
    )
    assert done.exit_code == FAILED
    status = (tmp_path / "out" / "status.tsv").read_text(encoding="utf-8")
    assert "head_lesions_T1.nii.gz: deepbet does not import" in status
    assert "; pip install deepbet==1.0.2, or give --strip atlas" in status
    assert not list((tmp_path / "out").rglob("*.nii.gz"))


def test_extra_is_the_version_whose_weights_are_known():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert [f"pip install {package}" for package in project["optional-dependencies"]["deepbet"]] == [deepbet.INSTALL]


@pytest.mark.slow
def test_package_itself_finds_the_brain_with_any_number_of_threads():
    pytest.importorskip("deepbet", reason=f"the extra deepbet is not installed: {deepbet.INSTALL}")
    file = nib.load(SAMPLE_DIR / "head_lesions_T1.nii.gz")
    head = MetaTensor(torch.from_numpy(file.get_fdata(dtype=np.float32))[None], affine=file.affine)
    before, threads = head.clone(), torch.get_num_threads()
    masks = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            masks.append(deepbet_brain_mask(head))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*(mask.as_tensor() for mask in masks))
    assert torch.equal(head.as_tensor(), before.as_tensor())
    by_template = atlas_brain_mask(head).as_tensor()
    both = (masks[0].as_tensor() & by_template).sum()
    assert 2 * both / (masks[0].sum() + by_template.sum()) > 0.9
