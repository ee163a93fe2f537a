"""What cannot be used is refused with one line that names the file and says what to do; the other cases go on."""

from __future__ import annotations

import csv
import gzip
import os
import resource
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from monai.bundle import ConfigParser

from common.bundle import BUNDLES_DIR, load_workflow, run_inference
from common.errors import (
    BundleError,
    DicomError,
    ImageFileError,
    ImageGeometryError,
    ImageIntensityError,
    ImageShapeError,
    SkullStripError,
    UADError,
)
from common.transforms.load import load_image
from common.weights import save_weights
from common.workflows.batch import detect_cases

METHOD = "dae"  # what is checked here comes before the method
INFERENCE = BUNDLES_DIR / METHOD / "configs" / "inference.json"
SHAPE = (48, 56, 40)
SPACING_MM = 3.5  # with which the ball has 1.2 l


def ball(shape=SHAPE, radius=0.8):
    """(H, W, D) bool, of the half axes of the volume."""
    axes = np.meshgrid(*[np.linspace(-1, 1, size) for size in shape], indexing="ij")
    return np.linalg.norm(axes, axis=0) < radius


def brain(shape=SHAPE, radius=0.8):
    return np.where(ball(shape, radius), np.random.default_rng(0).normal(100, 15, shape), 0).astype(np.float32)


def head():
    """A scan before skull stripping, 200 x 240 x 200 mm: a head, and the noise of a scanner in the air around it."""
    shape, rng = (58, 70, 58), np.random.default_rng(0)
    air = np.abs(rng.normal(0, 3, shape))
    return np.where(ball(shape), rng.normal(100, 15, shape), air).astype(np.float32)


def with_voxel(value):
    volume = brain()
    volume[24, 28, 20] = value
    return volume


def with_affine(affine):
    """A file whose sform is written as it is, however wrong."""
    nifti = nib.Nifti1Image(brain(), None)
    nifti.header.set_sform(affine, code=1)
    nifti.header["pixdim"][1:4] = np.linalg.norm(np.asarray(affine)[:3, :3], axis=0)
    return nifti


def diagonal(*sizes):
    return with_affine(np.diag([*sizes, 1.0]))


def sheared():
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[0, 2] = 0.8  # a gantry tilted by 22 degrees
    return with_affine(affine)


def two_places():
    nifti = nib.Nifti1Image(brain(), None)
    nifti.header.set_sform(np.diag([2.0, 2.0, 2.0, 1.0]), code=1)
    nifti.header.set_qform(np.diag([-2.0, 2.0, 2.0, 1.0]), code=1)
    return nifti


def sform_unlike_pixdim():
    nifti = diagonal(1, 1, 1)
    nifti.header["pixdim"][1:4] = 2
    return nifti


def label_map():
    """Labels of structures of 4 voxels."""
    places = np.indices(SHAPE) // 4
    return (ball() * (1 + places[0] + 12 * places[1])).astype(np.int16)


def head_ct():
    """Hounsfield units in a gantry of air, 200 x 240 x 200 mm."""
    shape = (100, 120, 100)
    nifti = nib.Nifti1Image(np.where(ball(shape, 0.95), 10 * brain(shape, 0.95), -1000).astype(np.int16), None)
    nifti.header.set_sform(np.diag([2.0, 2.0, 2.0, 1.0]), code=1)
    nifti.header["pixdim"][1:4] = 2
    return nifti


def in_metres():
    nifti = nib.Nifti1Image(brain(), np.diag([2e-3, 2e-3, 2e-3, 1]))
    nifti.header.set_xyzt_units("meter")
    return nifti


VOLUMES = {
    "2D": (ImageShapeError, "2 spatial dimensions", lambda: brain()[:, :, 20]),
    "4D": (ImageShapeError, "3 volumes, not 1", lambda: np.stack([brain()] * 3, axis=-1)),
    "5D": (ImageShapeError, "spatial dimensions", lambda: np.ones((8, 8, 8, 2, 3), np.float32)),
    "one slice": (ImageShapeError, "a single slice", lambda: brain()[:, :, 20:21]),
    "RGB": (ImageIntensityError, "colour", lambda: np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])),
    "complex": (ImageIntensityError, "complex", lambda: brain().astype(np.complex64)),
    "NaN": (ImageIntensityError, "1 voxels are NaN", lambda: with_voxel(np.nan)),
    "Inf": (ImageIntensityError, "1 voxels are NaN or infinite", lambda: with_voxel(np.inf)),
    "all zero": (ImageIntensityError, "all voxels are zero", lambda: np.zeros(SHAPE, np.float32)),
    "constant": (ImageIntensityError, "all voxels are 7", lambda: np.full(SHAPE, 7, np.int16)),
    "negative": (SkullStripError, "brighter than the background", lambda: -1 - brain()),
    "mask as a scan": (ImageIntensityError, "a mask or a label map", lambda: ball().astype(np.uint8)),
    "label map as a scan": (ImageIntensityError, "as in a mask or a label map", label_map),
    "brain of a mouse": (SkullStripError, "a brain of 0 ml", lambda: diagonal(0.2, 0.2, 0.2)),
    "half as large": (SkullStripError, "800 to 2300 ml", lambda: diagonal(1.75, 1.75, 1.75)),
    "sform unlike pixdim": (ImageGeometryError, "in its pixdim", sform_unlike_pixdim),
    "head": (SkullStripError, "no brain alone", head),
    "head CT": (SkullStripError, "no brain alone", head_ct),
    "singular affine": (ImageGeometryError, "singular", lambda: diagonal(2, 0, 2)),
    "NaN affine": (ImageGeometryError, "not finite", lambda: diagonal(2, np.nan, 2)),
    "no affine": (ImageGeometryError, "neither sform nor qform", lambda: nib.Nifti1Image(brain(), None)),
    "sheared affine": (ImageGeometryError, "sheared", sheared),
    "sform unlike qform": (ImageGeometryError, "sform and qform contradict", two_places),
    "micrometres": (ImageGeometryError, "2000.0", lambda: diagonal(2000, 2000, 2000)),
    "metres": (ImageGeometryError, "0.002", in_metres),
    "voxels of 0.05 mm": (ImageGeometryError, "0.05", lambda: diagonal(0.05, 0.05, 0.05)),
    "voxels of 50 mm": (ImageGeometryError, "50.0", lambda: diagonal(2, 2, 50)),
}


def saved(folder, content=None, name="scan.nii.gz"):
    """The path of a file with this NIfTI, array or (by default) good brain."""
    content = brain() if content is None else content
    if not isinstance(content, nib.Nifti1Image):
        content = nib.Nifti1Image(content, np.diag([SPACING_MM] * 3 + [1.0]))
    nib.save(content, folder / name)
    return folder / name


def patched(path, replace):
    """The path of a file whose bytes have been changed."""
    path.write_bytes(replace(path.read_bytes()))
    return path


def with_shape(path, shape):
    """The path of a compressed file whose header says another shape than it has."""
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[42:48] = np.array(shape, "<i2").tobytes()
    path.write_bytes(gzip.compress(bytes(content)))
    return path


def link(path):
    path.symlink_to(path.parent / "gone.nii.gz")
    return path


# how each file is damaged: what is said of it, and its path
FILES = {
    "missing": ("no such file", lambda folder: folder / "scan.nii.gz"),
    "dangling link": ("no such file", lambda folder: link(folder / "scan.nii.gz")),
    "truncated": ("truncated", lambda folder: patched(saved(folder), lambda b: b[: len(b) // 2])),
    "truncated header": ("truncated or damaged", lambda folder: patched(saved(folder), lambda b: b[:60])),
    "truncated, not compressed": (
        "truncated",
        lambda folder: patched(saved(folder, name="scan.nii"), lambda b: b[:20_000]),
    ),
    "wrong checksum": ("damaged", lambda folder: patched(saved(folder), lambda b: b[:-8] + bytes(4) + b[-4:])),
    "named .gz": (
        "named .gz but not compressed",
        lambda folder: saved(folder, name="scan.nii").rename(folder / "scan.nii.gz"),
    ),
    "compressed, not named .gz": ("not named .gz", lambda folder: saved(folder).rename(folder / "scan.nii")),
    "wrong magic": (
        "not a NIfTI image",
        lambda folder: patched(saved(folder, name="scan.nii"), lambda b: b[:344] + b"nope" + b[348:]),
    ),
    "empty": ("not a NIfTI image", lambda folder: patched(saved(folder), lambda b: b"")),
    "huge header, small file": ("too small", lambda folder: with_shape(saved(folder), (500, 500, 500))),
    "text": (
        "named .gz but not compressed",
        lambda folder: patched(saved(folder), lambda b: b"subject,age\nsub-01,54\n"),
    ),
    "huge header": ("voxels", lambda folder: with_shape(saved(folder), (1000, 1000, 1000))),
    "text as NRRD": ("not", lambda folder: patched(saved(folder).rename(folder / "scan.nrrd"), lambda b: b"hello")),
}


def given_mask(kind, folder):
    """An item with a brain mask that does not fit."""
    mask = ball((40, 56, 40)) if kind == "mask of another grid" else np.zeros(SHAPE)
    return {"image": str(saved(folder)), "brain": str(saved(folder, mask.astype(np.uint8), "mask.nii.gz"))}


MASKS = {"mask of another grid": "on another grid", "empty mask": "mask is empty"}


def without_slices(series):
    for path in series.files[10:12]:
        path.unlink()


def two_mixed(series):
    """A second series of the same size in the same folder."""
    other = pydicom.uid.generate_uid()
    for path in series.files:
        dataset = pydicom.dcmread(path)
        dataset.SeriesInstanceUID, dataset.SeriesDescription = other, "t2 phantom"
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
        dataset.save_as(path.with_name(f"B{path.name}"))


def turned(dataset, index):
    dataset.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]


def not_decodable(dataset, index):
    """A transfer syntax that names a video."""
    dataset.PixelData = pydicom.encaps.encapsulate([b"\x00\x00\x01\xba" * 8])
    dataset["PixelData"].VR = "OB"
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.MPEG2MPML


# what is done to a good series, and what is said of it
DICOM = {
    "DICOM with missing slices": ("missing", without_slices),
    "two series mixed": ("2 series", two_mixed),
    "RTSTRUCT": ("RTSTRUCT", lambda series: series.edit(lambda d, i: setattr(d, "Modality", "RTSTRUCT"))),
    "localizer": (
        "localizer",
        lambda series: series.edit(lambda d, i: setattr(d, "ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER"])),
    ),
    "mixed geometry": ("ImageOrientationPatient", lambda series: series.edit(turned, files=[7])),
    "one DICOM slice": ("single image", lambda series: [path.unlink() for path in series.files[1:]]),
    "unsupported compression": ("cannot be decoded", lambda series: series.edit(not_decodable, files=[3])),
    "truncated DICOM": (
        "cannot be decoded",
        lambda series: patched(series.files[3], lambda b: b[: len(b) - 2000]),
    ),
}
OTHERS = ("two images for one modality", "folder without images", "empty DICOM folder", "one DICOM file")
KINDS = [*VOLUMES, *FILES, *MASKS, *DICOM, *OTHERS]


def make_item(kind, folder, write_series):
    """A bad item, and what is to be said of it: its path, the type of error, a part of the message."""
    if kind in VOLUMES:
        expected, fact, make = VOLUMES[kind]
        path = saved(folder, make())
    elif kind in FILES:
        (fact, make), expected = FILES[kind], ImageShapeError if kind == "huge header" else ImageFileError
        path = make(folder)
    elif kind in DICOM:
        (fact, damage), expected, path = DICOM[kind], DicomError, folder
        damage(write_series(folder))
    elif kind in MASKS:
        item = given_mask(kind, folder)
        return item, item["brain"], SkullStripError, MASKS[kind]
    elif kind == "two images for one modality":
        paths = [str(saved(folder)), str(saved(folder, name="other.nii.gz"))]
        return {"image": paths}, paths[0], ImageShapeError, "2 volumes, not 1"
    elif kind == "one DICOM file":
        path, expected, fact = write_series(folder).files[0].rename(folder / "one.dcm"), DicomError, "single image"
    else:
        path, expected, fact = folder, DicomError, "no DICOM"
        if kind == "folder without images":
            (folder / "notes.txt").write_text("hello", encoding="utf-8")
    return {"image": str(path)}, str(path), expected, fact


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


@pytest.fixture(scope="module")
def run(weights, write_series, tmp_path_factory):
    """One run over all bad inputs between two good ones: what was said to the user, expected and in status.tsv."""
    inputs, output = tmp_path_factory.mktemp("inputs"), tmp_path_factory.mktemp("out") / "results"
    good = inputs / "a folder, with spaces and Umläuten 脳"
    good.mkdir()
    items = [{"subject": "first", "image": str(saved(good))}]
    expected = {}
    for kind in KINDS:
        folder = inputs / kind
        folder.mkdir()
        item, *expected[kind] = make_item(kind, folder, write_series)
        items.append({"subject": kind, **item})
    items.append({"subject": "last", "image": str(saved(good, name="letzte Größe.nii.gz"))})
    workflow = load_workflow(METHOD, ["inference.json"], weights=str(weights), output_dir=str(output))
    workflow.initialize()
    failed = detect_cases(workflow, items)
    with (output / "status.tsv").open(newline="", encoding="utf-8") as file:
        rows = {row["case"]: row for row in csv.DictReader(file, delimiter="\t")}
    return failed, output, expected, rows


def test_at_least_thirty_kinds():
    assert len(KINDS) >= 30


def test_the_others_go_on(run):
    failed, output, _, rows = run
    assert failed == len(KINDS)
    assert list(rows) == ["first", *KINDS, "last"]
    tables = {"status.tsv", "cases.csv", "lesions_all.csv"}
    assert {path.name for path in output.iterdir()} == {"first", "last", *tables}
    for name in ("first", "last"):
        assert rows[name]["status"] == "unreliable"  # a ball of one tissue is no T1 brain
        assert len(list((output / name).iterdir())) == 6


@pytest.mark.parametrize("kind", KINDS)
def test_refused(kind, run):
    *_, expected, rows = run
    path, error, fact = expected[kind]
    row = rows[kind]
    assert row["status"] == error.__name__, row["message"]
    assert row["message"].startswith(f"{path}: ")
    assert fact in row["message"]
    assert "; " in row["message"]  # the remedy
    assert "PLANTED" not in row["message"]


def test_messages_are_one_line_of_file_fact_and_remedy(weights, tmp_path):
    path = saved(tmp_path, with_voxel(np.nan))
    with pytest.raises(UADError) as caught:
        run_inference(
            METHOD, ["inference.json"], image=str(path), weights=str(weights), output_dir=str(tmp_path / "out")
        )
    error = caught.value
    assert str(error) == f"{path}: {error.fact}; {error.remedy}"
    assert not (tmp_path / "out").exists()


def test_weights_of_another_network_are_refused(tmp_path):
    save_weights({"weight": torch.zeros(1)}, tmp_path / "model.pt")
    path = saved(tmp_path)
    for weights in (tmp_path / "model.pt", tmp_path / "none.pt", path):
        with pytest.raises(BundleError):
            run_inference(
                METHOD, ["inference.json"], image=str(path), weights=str(weights), output_dir=str(tmp_path / "out")
            )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path):
    path = saved(tmp_path)
    path.chmod(0)
    with pytest.raises(ImageFileError, match="Permission denied"):
        load_image(path)


@pytest.mark.skipif("UAD_TEST_DATA" not in os.environ, reason="UAD_TEST_DATA names a folder with ixi_heads/*_T1.nii.gz")
def test_real_heads_are_refused(weights, tmp_path):
    heads = sorted(Path(os.environ["UAD_TEST_DATA"]).glob("ixi_heads/*_T1.nii.gz"))
    assert heads
    for path in heads:
        with pytest.raises(SkullStripError, match="::strip atlas"):
            run_inference(METHOD, ["inference.json"], image=str(path), weights=str(weights), output_dir=str(tmp_path))


@pytest.fixture(scope="module")
def bad_scan(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("bad"), with_voxel(np.nan))


def uad(*arguments, **settings):
    """Without progress, whose lines depend on the time."""
    command = [sys.executable, "-m", "common", "detect", "-q", *map(str, arguments), "-m", METHOD]
    return subprocess.run(command, capture_output=True, text=True, check=False, **settings)


def test_command_says_one_line_and_exits_with_3(bad_scan, tmp_path):
    done = uad(bad_scan, "-o", tmp_path / "out")
    assert done.returncode == 3
    assert done.stderr.startswith(f"ImageIntensityError: {bad_scan}: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == f"0 of 1 cases done: {tmp_path / 'out' / 'status.tsv'}\n"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["status.tsv"]


def test_output_folder_that_cannot_be_made(bad_scan, tmp_path):
    (tmp_path / "file").touch()
    done = uad(bad_scan, "-o", tmp_path / "file" / "out")
    assert done.returncode == 3
    assert done.stderr.startswith(f"OutputError: {tmp_path / 'file' / 'out'}: cannot be written")
    assert done.stderr.count("\n") == 1


def test_output_folder_that_is_full(tmp_path):
    """Files may not grow beyond 4 kB here, which fails as a full disk does."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # noqa: E731
    done = uad(saved(tmp_path), "-o", tmp_path / "out", preexec_fn=limit)
    assert done.returncode == 3
    assert done.stderr.startswith(f"OutputError: {tmp_path / 'out' / 'scan'}: cannot be written (File too large)")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["status.tsv"]


def test_monai_ends_with_the_same_line(bad_scan, weights, tmp_path):
    settings = {"config_file": INFERENCE, "image": bad_scan, "weights": weights, "output_dir": tmp_path / "out"}
    command = [sys.executable, "-m", "monai.bundle", "run", *[f"--{key}={value}" for key, value in settings.items()]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith(f"ImageIntensityError: {bad_scan}: ")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
