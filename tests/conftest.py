"""A brain that is a formula of world coordinates, so that it can be stored on any grid, and cohorts of it."""

from __future__ import annotations

import csv
import gc
import importlib
import logging
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813 - its own name for itself
import torch
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid
from scipy.spatial.transform import Rotation
from typer.testing import CliRunner

from common.cli import app

# commands import these when they run; some set environment variables, which is not the doing of a test
for _name in ("api", "cohorts.kinds", "report.html", "sharing.export", "workflows.benchmark", "workflows.prepare"):
    importlib.import_module(f"common.{_name}")

RADII_MM = np.array([58.0, 70.0, 52.0])


@dataclass(frozen=True)
class Phantom:
    """An ellipsoid of 116 x 140 x 104 mm, 0.88 l, skull-stripped.

    It is brighter to the right, the front and the top, so that no mirror fits. A bright ball lies at `lesion_mm`.
    """

    centre_mm: tuple[float, float, float] = (3.0, -10.0, 7.0)
    lesion_mm: tuple[float, float, float] = (18.0, 12.0, 5.0)  # from the centre
    scale: float = 1.0
    lesion: bool = True

    def on_grid(self, shape, affine):
        """Image (H, W, D) float32, brain and lesion bool, on a grid."""
        points, radius = self.points(shape, affine)
        brain = radius <= 1
        distance = np.linalg.norm(points - self.lesion_mm, axis=-1)
        tissue = 400 + points @ np.array([2.0, 1.0, 1.5]) + 8 * np.sin(points.sum(axis=-1) / 9)
        tissue += 150 * np.exp(-((distance / 9) ** 2)) * self.lesion
        return np.where(brain, tissue, 0).astype(np.float32), brain, brain & (distance < 9) & self.lesion

    def points(self, shape, affine):
        """World coordinates from the centre, (H, W, D, 3) mm, and the radius (H, W, D), 1 on the brain's surface."""
        voxels = np.moveaxis(np.indices(shape), 0, -1)
        points = nib.affines.apply_affine(affine, voxels) - self.centre_mm
        return points, np.linalg.norm(points * self.scale / RADII_MM, axis=-1)

    def of_modality(self, modality, shape, affine, whole_head=False):
        """Image (H, W, D) float32 of any modality; whole heads have bone and scalp; CT is in grey values, air at 25."""
        image, brain, _ = self.on_grid(shape, affine)
        tissue = image / 6 if modality == "CT" else image * (1 + len(modality) / 10)
        bone, scalp, air = (255, 90, 25) if modality == "CT" else (80, 800, 0)
        radius = self.points(shape, affine)[1]
        around = np.select([radius <= 1.1, radius <= 1.2], [bone, scalp], air) if whole_head else 0
        return np.where(brain, tissue, around).astype(np.float32)

    def grid(self, spacing_mm=(2.0, 2.0, 2.0), rotation=None, margin_mm=8.0):
        """Shape and affine of a RAS grid around the brain, possibly rotated."""
        spacing_mm = np.asarray(spacing_mm, dtype=float)
        extent = 2 * (np.linalg.norm(RADII_MM) if rotation is not None else RADII_MM / self.scale) + 2 * margin_mm
        shape = np.ceil(np.broadcast_to(extent, 3) / spacing_mm).astype(int)
        matrix = (np.eye(3) if rotation is None else rotation) @ np.diag(spacing_mm)
        affine = nib.affines.from_matvec(matrix, np.asarray(self.centre_mm) - matrix @ ((shape - 1) / 2))
        return tuple(shape), affine.astype(np.float32).astype(np.float64)  # as NIfTI keeps it


def pytest_collection_finish():
    """What was imported stays anyway: without this pytest and Python search it for garbage for seconds at the end."""
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Each test, and each fixture that is made for it, draws the same numbers whatever ran before."""
    torch.manual_seed(0)
    np.random.seed(0)


OF_OTHERS = ("PYTEST_", "TORCHINDUCTOR_")  # torch sets the latter when a part of it is imported


def state_of_the_process():
    """What a test could leave behind for the next one."""
    return {
        "working directory": Path.cwd(),
        "sys.path": tuple(sys.path),
        "logging": logging.root.manager.disable,
        "threads": (torch.get_num_threads(), sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()),
        "torch": (torch.get_default_dtype(), torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled()),
    } | {f"${name}": value for name, value in os.environ.items() if not name.startswith(OF_OTHERS)}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """Names that are not UTF-8 stand in what a test logged; xdist ends a run on a report that has them."""
    report = yield
    report.sections = [(of, text.encode("utf-8", "backslashreplace").decode()) for of, text in report.sections]
    return report


@pytest.fixture(autouse=True)
def _process_is_left_as_it_was():
    """A test that changes what others see too fails itself, instead of one that runs later."""
    before = state_of_the_process()
    yield
    assert dict(state_of_the_process().items() ^ before.items()) == {}


@pytest.fixture(scope="session")
def phantom():
    return Phantom()


def save_nifti(path: Path, volume, affine=None) -> Path:
    """Write a volume, with 2 mm voxels unless told otherwise, and return the path."""
    nib.save(nib.Nifti1Image(volume, np.diag([2.0, 2.0, 2.0, 1.0]) if affine is None else affine), path)
    return path


@pytest.fixture(scope="session", name="save_nifti")
def save_nifti_fixture():
    return save_nifti


def write_cohort(folder, modalities=("T1",), whole_head=False) -> Path:
    """A cohort CSV of thin brains: one healthy subject to train, one to validate, two to test, one with a lesion."""
    rows = [("a", "train", False), ("b", "val", False), ("c", "test", False), ("d", "test", True)]
    with (folder / "cohort.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["subject", "split", *modalities, "brain", "lesion"])
        for index, (subject, split, has_lesion) in enumerate(rows):
            person = Phantom(scale=1 + index / 50, lesion=has_lesion)
            (height, width, depth), affine = person.grid(margin_mm=16.0 if whole_head else 8.0)
            affine[:3, 3] += affine[:3, :3] @ (0, 0, depth // 2 - 4)  # ten slices about the middle
            shape = (height, width, 10)
            names = [f"{subject}.nii.gz" if len(modalities) == 1 else f"{subject}_{m}.nii.gz" for m in modalities]
            for name, modality in zip(names, modalities, strict=True):
                save_nifti(folder / name, person.of_modality(modality, shape, affine, whole_head), affine)
            lesion = f"{subject}_lesion.nii.gz" if has_lesion else ""
            if lesion:
                save_nifti(folder / lesion, person.on_grid(shape, affine)[2].astype(np.uint8), affine)
            writer.writerow([subject, split, *names, "", lesion])
    return folder / "cohort.csv"


@pytest.fixture(scope="session", name="write_cohort")
def write_cohort_fixture():
    return write_cohort


@pytest.fixture(scope="session")
def cohort(tmp_path_factory):
    """`write_cohort` of skull-stripped T1."""
    return write_cohort(tmp_path_factory.mktemp("cohort"))


PLANES = {  # directions in RAS, as a scanner stores them: along a row, along a column, from slice to slice
    "axial": ((-1, 0, 0), (0, -1, 0), (0, 0, 1)),
    "sagittal": ((0, -1, 0), (0, 0, -1), (-1, 0, 0)),
    "coronal": ((-1, 0, 0), (0, 0, -1), (0, 1, 0)),
    "oblique": tuple(Rotation.from_euler("xyz", (20, -15, 25), degrees=True).apply(np.diag([-1.0, -1.0, 1.0]))),
}
PLANTED = {"PatientName": "PLANTED^NAME", "PatientID": "PLANTED-ID", "PatientBirthDate": "19010203"}
PLANTED |= {"AccessionNumber": "PLANTED-ACC"}


@dataclass(frozen=True)
class DicomSeries:
    """Files of a written series along the slices, and what they hold: RAS affine, image (columns, rows, slices)."""

    folder: Path
    files: list[Path]
    affine: np.ndarray
    image: np.ndarray
    lesion: np.ndarray

    def edit(self, change, files=None):
        """Rewrite files after `change(dataset, slice)`."""
        for index, path in enumerate(self.files):
            if files is None or index in files:
                dataset = pydicom.dcmread(path)
                change(dataset, index)
                dataset.save_as(path)


def write_series(
    folder: Path, plane="axial", is_reversed=False, slope=0.5, intercept=-20.0, modality="MR", **tags
) -> DicomSeries:
    """Write the phantom as classic single-frame DICOM, 2 x 3 mm pixels and slices every 4 mm.

    is_reversed: number the images (and name the files) from the last slice to the first.
    slope, intercept: a float each, or a function of the slice.
    tags: more DICOM keywords, or others of the defaults.
    """
    shape, spacing_mm = (72, 50, 36), np.array([2.0, 3.0, 4.0])  # columns, rows, slices
    matrix = np.array(PLANES[plane]).T * spacing_mm
    affine = nib.affines.from_matvec(matrix, np.array(Phantom.centre_mm) - matrix @ ((np.array(shape) - 1) / 2))
    image, _, lesion = Phantom().on_grid(shape, affine)
    sop_class = {"MR": MRImageStorage, "CT": CTImageStorage}[modality]
    series = {"StudyInstanceUID": generate_uid(), "SeriesInstanceUID": generate_uid()}
    series |= {"FrameOfReferenceUID": generate_uid(), "PositionReferenceIndicator": "", "SeriesNumber": 5}
    series |= {"SeriesDescription": "t1 phantom", "StudyID": "1", "StudyDate": "20200102", "StudyTime": "101112"}
    series |= {"Manufacturer": "none", "PatientSex": "O", "ReferringPhysicianName": "", "PatientAge": "050Y"}
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for k in range(shape[2]):
        number = shape[2] - k if is_reversed else k + 1
        scale, offset = (value(k) if callable(value) else value for value in (slope, intercept))
        origin = nib.affines.apply_affine(affine, (0, 0, k)) * (-1, -1, 1)  # DICOM's axes are left, posterior, superior
        dataset = Dataset()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = sop_class
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid()
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "M" if modality == "MR" else "AXIAL"]
        dataset.Modality, dataset.InstanceNumber, dataset.SliceThickness = modality, number, 4
        for keyword, value in (PLANTED | series | tags).items():
            setattr(dataset, keyword, value)
        dataset.Rows, dataset.Columns, dataset.PixelSpacing = shape[1], shape[0], [spacing_mm[1], spacing_mm[0]]
        dataset.ImagePositionPatient = [f"{value:.9g}" for value in origin]
        cosines = np.array(PLANES[plane])[:2] * (-1, -1, 1)
        dataset.ImageOrientationPatient = [f"{value:.9g}" for value in cosines.ravel()]
        dataset.RescaleSlope, dataset.RescaleIntercept = scale, offset
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
        dataset.PixelData = np.rint((image[:, :, k].T - offset) / scale).astype(np.uint16).tobytes()
        path = folder / f"IM{number:04d}"
        dataset.save_as(path, enforce_file_format=True)
        files.append(path)
    return DicomSeries(folder, files, affine, image, lesion)


@pytest.fixture(scope="session", name="write_series")
def write_series_fixture():
    return write_series


SCRIPTS = Path(__file__).parents[1] / "scripts"


def write_patient(path: Path, files, depth, tumour, is_copied=False):
    """A cylinder of tissue whose grey value says which modality and slice it is; tumour in `range` of the slices."""
    path.parent.mkdir(parents=True, exist_ok=True)
    disc = np.hypot(*(np.indices((28, 28)) - 13.5)) < 12
    grey = np.where(disc[..., None], 100 + np.arange(depth), 0)
    seg = np.zeros(grey.shape)
    seg[10:16, 10:16, list(tumour)] = 4
    for number, name in enumerate(files):
        image = grey * (2 if number and not is_copied else 1) + 200 * number * (grey > 0) * (not is_copied)
        save_nifti(path.with_name(f"{path.name}_{name}.nii.gz"), image.astype(np.int16), np.diag([-1.0, -1.0, 1.0, 1]))
    save_nifti(path.with_name(f"{path.name}_seg.nii.gz"), seg.astype(np.int16), np.diag([-1.0, -1.0, 1.0, 1]))


@pytest.fixture(scope="session")
def brats2020(tmp_path_factory):
    """Nine patients as BraTS 2020 unpacks, and the folder of the cohort that is made of them.

    The last one's modalities are copies; of the third and fourth only slice 128 of those used is without tumour.
    """
    data, out = tmp_path_factory.mktemp("brats2020"), tmp_path_factory.mktemp("brats2020_cohort")
    for number in range(1, 10):
        name = f"BraTS20_Training_{number:03d}"
        tumour = range(70, 128) if number in (3, 4) else range(60, 100 + number)
        write_patient(data / name / name, ("flair", "t1", "t1ce", "t2"), 155, tumour, is_copied=number == 9)
    make_cohort("glioma", data, out, "--layout", "brats2020")
    return data, out


@pytest.fixture(scope="session")
def oct2017(tmp_path_factory):
    """40 patients to train on, three of whom test too, as OCT2017 unpacks; and their cohort."""
    data, out = tmp_path_factory.mktemp("oct2017"), tmp_path_factory.mktemp("oct2017_cohort")
    names = [f"train/NORMAL/NORMAL-{patient}-{n}" for patient in range(100, 140) for n in (1, 2)]
    names += [f"test/{kind}/{kind}-{p}-{n}" for kind, p in (("NORMAL", 100), ("DRUSEN", 101)) for n in range(1, 13)]
    names += ["test/CNV/CNV-102-1"]
    random = np.random.default_rng(0)
    for name in names:
        path = data / f"{name}.jpeg"
        path.parent.mkdir(parents=True, exist_ok=True)
        layers = 90 + 60 * np.sin(np.arange(48) / 4 + random.uniform(0, 6))
        Image.fromarray(np.repeat(layers[:, None], random.integers(50, 80), axis=1).astype(np.uint8)).save(path)
    make_cohort("oct", data, out)
    return data, out


def make_cohort(kind, data, output, *options):
    """Run `uad cohort`."""
    done = CliRunner().invoke(app, ["cohort", kind, str(data), "-o", str(output), *options])
    assert done.exit_code == 0, done.output


@pytest.fixture(scope="session", name="make_cohort")
def make_cohort_fixture():
    return make_cohort


def run_script(name, *arguments):
    """Run one of `scripts/` in a process of its own; what it prints."""
    command = [sys.executable, SCRIPTS / name, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="session", name="run_script")
def run_script_fixture():
    return run_script


@pytest.fixture(scope="session", name="write_patient")
def write_patient_fixture():
    return write_patient
