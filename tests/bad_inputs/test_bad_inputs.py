"""What cannot be used is refused with one line that names the file and says what to do, and leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

from common.bundle import BUNDLES_DIR, run_inference
from common.errors import (
    BundleError,
    ImageFileError,
    ImageGeometryError,
    ImageIntensityError,
    ImageShapeError,
    SkullStripError,
    UADError,
)
from common.weights import save_weights

METHOD = "dae"  # what is checked here comes before the method
INFERENCE = BUNDLES_DIR / METHOD / "configs" / "inference.json"
SHAPE = (48, 56, 40)


def ball(shape=SHAPE, radius=0.8):
    """(H, W, D) bool, of the half axes of the volume."""
    axes = np.meshgrid(*[np.linspace(-1, 1, size) for size in shape], indexing="ij")
    return np.linalg.norm(axes, axis=0) < radius


def brain(shape=SHAPE):
    return np.where(ball(shape), np.random.default_rng(0).normal(100, 15, shape), 0).astype(np.float32)


def head():
    """A scan before skull stripping, 200 x 240 x 200 mm: a head, and the noise of a scanner in the air around it."""
    shape, rng = (100, 120, 100), np.random.default_rng(0)
    air = np.abs(rng.normal(0, 3, shape))
    return np.where(ball(shape), rng.normal(100, 15, shape), air).astype(np.float32)


def with_voxel(value):
    volume = brain()
    volume[24, 28, 20] = value
    return volume


def with_affine(diagonal):
    """A file whose sform is written as it is, however wrong."""
    nifti = nib.Nifti1Image(brain(), None)
    nifti.header.set_sform(np.diag([*diagonal, 1.0]), code=1)
    return nifti


def in_metres():
    nifti = nib.Nifti1Image(brain(), np.diag([2e-3, 2e-3, 2e-3, 1]))
    nifti.header.set_xyzt_units("meter")
    return nifti


VOLUMES = {
    "2D": (ImageShapeError, lambda: brain()[:, :, 20]),
    "4D": (ImageShapeError, lambda: np.stack([brain()] * 3, axis=-1)),
    "one slice": (ImageShapeError, lambda: brain()[:, :, 20:21]),
    "NaN": (ImageIntensityError, lambda: with_voxel(np.nan)),
    "Inf": (ImageIntensityError, lambda: with_voxel(np.inf)),
    "all zero": (ImageIntensityError, lambda: np.zeros(SHAPE, np.float32)),
    "constant": (ImageIntensityError, lambda: np.full(SHAPE, 7, np.int16)),
    "negative": (SkullStripError, lambda: -1 - brain()),
    "complex": (ImageIntensityError, lambda: brain().astype(np.complex64)),
    "head": (SkullStripError, head),
    "head CT": (SkullStripError, lambda: np.where(ball(), 40, -1000).astype(np.int16)),
    "singular affine": (ImageGeometryError, lambda: with_affine((2, 0, 2))),
    "NaN affine": (ImageGeometryError, lambda: with_affine((2, np.nan, 2))),
    "no affine": (ImageGeometryError, lambda: nib.Nifti1Image(brain(), None)),
    "micrometres": (ImageGeometryError, lambda: with_affine((2000, 2000, 2000))),
    "metres": (ImageGeometryError, in_metres),
}


def not_an_image(kind, folder):
    """A path that is not a whole NIfTI file, and what is said of it."""
    path = folder / "scan.nii.gz"
    if kind == "missing":
        return path, "no such file"
    if kind == "empty folder":
        return folder, "a folder without NIfTI files"
    if kind in ("truncated", "truncated header"):
        nib.save(nib.Nifti1Image(brain(), np.eye(4)), path)
        content = path.read_bytes()
        path.write_bytes(content[: 60 if kind == "truncated header" else len(content) // 2])
        return path, "not a NIfTI image" if kind == "truncated header" else "truncated"
    if kind == "truncated, not compressed":
        path = folder / "scan.nii"
        nib.save(nib.Nifti1Image(brain(), np.eye(4)), path)
        path.write_bytes(path.read_bytes()[:20_000])
        return path, "cannot be read"
    path.write_bytes(b"" if kind == "empty" else b"subject,age\nsub-01,54\n")
    return path, "not a NIfTI image"


NOT_IMAGES = ["missing", "empty folder", "truncated", "truncated header", "truncated, not compressed", "empty", "text"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights of an untrained network, so that these tests need none that are shipped."""
    parser = ConfigParser()
    parser.read_config(INFERENCE)
    network = parser.get_parsed_content("network_def")
    network.calibration.fit(0.1, 0.01, torch.rand(12))
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    save_weights(network.state_dict(), path)
    return path


def refused(image, weights, output: Path) -> UADError:
    """Run the bundle's own workflow on an image that it must refuse, without leaving anything."""
    with pytest.raises(UADError) as caught:
        run_inference(METHOD, ["inference.json"], image=image, weights=str(weights), output_dir=str(output))
    assert not output.exists() or not list(output.iterdir())
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.remedy
    assert message == " ".join(f"{caught.value.source}: {caught.value.fact}; {caught.value.remedy}".split())
    return caught.value


@pytest.mark.parametrize("kind", VOLUMES)
def test_volume_is_refused(kind, weights, save_nifti, tmp_path):
    expected, make = VOLUMES[kind]
    path, content = tmp_path / "scan.nii.gz", make()
    nib.save(content, path) if isinstance(content, nib.Nifti1Image) else save_nifti(path, content)
    error = refused(str(path), weights, tmp_path / "out")
    assert type(error) is expected
    assert error.source == str(path)


@pytest.mark.parametrize("kind", NOT_IMAGES)
def test_what_is_no_image_is_refused(kind, weights, tmp_path):
    path, fact = not_an_image(kind, tmp_path)
    error = refused(str(path), weights, tmp_path / "out")
    assert type(error) is ImageFileError
    assert error.source == str(path)
    assert fact in error.fact


def test_weights_of_another_network_are_refused(save_nifti, tmp_path):
    save_weights({"weight": torch.zeros(1)}, tmp_path / "model.pt")
    path = save_nifti(tmp_path / "scan.nii.gz", brain())
    for weights in (tmp_path / "model.pt", tmp_path / "none.pt", path):
        assert type(refused(str(path), weights, tmp_path / "out")) is BundleError


def test_good_cases_before_a_bad_one_are_whole(weights, save_nifti, tmp_path):
    good = save_nifti(tmp_path / "good.nii.gz", brain())
    bad = save_nifti(tmp_path / "bad.nii.gz", with_voxel(np.nan))
    with pytest.raises(ImageIntensityError, match=r"bad\.nii\.gz"):
        run_inference(
            METHOD,
            ["inference.json"],
            image=[str(good), str(bad)],
            weights=str(weights),
            output_dir=str(tmp_path / "out"),
        )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["good"]
    assert len(list((tmp_path / "out" / "good").iterdir())) == 6


@pytest.mark.skipif("UAD_TEST_DATA" not in os.environ, reason="UAD_TEST_DATA names a folder with ixi_heads/*_T1.nii.gz")
def test_real_heads_are_refused(weights, tmp_path):
    heads = sorted(Path(os.environ["UAD_TEST_DATA"]).glob("ixi_heads/*_T1.nii.gz"))
    assert heads
    for path in heads:
        assert type(refused(str(path), weights, tmp_path / "out")) is SkullStripError


@pytest.fixture(scope="module")
def bad_scan(tmp_path_factory, save_nifti):
    return save_nifti(tmp_path_factory.mktemp("bad") / "scan.nii.gz", with_voxel(np.nan))


def test_command_says_one_line_and_exits_with_3(bad_scan, tmp_path):
    command = [sys.executable, "-m", "common", "detect", bad_scan, "-m", METHOD, "-o", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stderr.startswith(f"ImageIntensityError: {bad_scan}: ")
    assert done.stderr.count("\n") == 1
    assert not done.stdout
    assert not (tmp_path / "out").exists()


def test_monai_ends_with_the_same_line(bad_scan, weights, tmp_path):
    settings = {"config_file": INFERENCE, "image": bad_scan, "weights": weights, "output_dir": tmp_path / "out"}
    command = [sys.executable, "-m", "monai.bundle", "run", *[f"--{key}={value}" for key, value in settings.items()]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith(f"ImageIntensityError: {bad_scan}: ")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
