"""A brain that is a formula of world coordinates, so that it can be stored on any grid, and cohorts of it."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid
from scipy.spatial.transform import Rotation

RADII_MM = np.array([45.0, 55.0, 40.0])


@dataclass(frozen=True)
class Phantom:
    """An ellipsoid of 90 x 110 x 80 mm, skull-stripped; brighter to the right, the front and the top, no mirror fits.

    A bright ball lies at `lesion_mm`.
    """

    centre_mm: tuple[float, float, float] = (3.0, -10.0, 7.0)
    lesion_mm: tuple[float, float, float] = (18.0, 12.0, 5.0)  # from the centre
    scale: float = 1.0
    lesion: bool = True

    def on_grid(self, shape, affine):
        """Image (H, W, D) float32, brain and lesion bool, on a grid."""
        voxels = np.moveaxis(np.indices(shape), 0, -1)
        points = nib.affines.apply_affine(affine, voxels) - self.centre_mm
        brain = np.linalg.norm(points * self.scale / RADII_MM, axis=-1) <= 1
        distance = np.linalg.norm(points - self.lesion_mm, axis=-1)
        tissue = 400 + points @ np.array([2.0, 1.0, 1.5]) + 8 * np.sin(points.sum(axis=-1) / 9)
        tissue += 150 * np.exp(-((distance / 9) ** 2)) * self.lesion
        return np.where(brain, tissue, 0).astype(np.float32), brain, brain & (distance < 9) & self.lesion

    def grid(self, spacing_mm=(2.0, 2.0, 2.0), rotation=None, margin_mm=8.0):
        """Shape and affine of a RAS grid around the brain, possibly rotated."""
        spacing_mm = np.asarray(spacing_mm, dtype=float)
        extent = 2 * (np.linalg.norm(RADII_MM) if rotation is not None else RADII_MM / self.scale) + 2 * margin_mm
        shape = np.ceil(np.broadcast_to(extent, 3) / spacing_mm).astype(int)
        matrix = (np.eye(3) if rotation is None else rotation) @ np.diag(spacing_mm)
        affine = nib.affines.from_matvec(matrix, np.asarray(self.centre_mm) - matrix @ ((shape - 1) / 2))
        return tuple(shape), affine.astype(np.float32).astype(np.float64)  # as NIfTI keeps it


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


@pytest.fixture(scope="session")
def cohort(tmp_path_factory):
    """A cohort CSV of thin brains: one healthy subject to train, one to validate, two to test, one with a lesion."""
    folder = tmp_path_factory.mktemp("cohort")
    rows = [("a", "train", False), ("b", "val", False), ("c", "test", False), ("d", "test", True)]
    with (folder / "cohort.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["subject", "split", "T1", "brain", "lesion"])
        for index, (subject, split, has_lesion) in enumerate(rows):
            person = Phantom(scale=1 + index / 50, lesion=has_lesion)
            (height, width, depth), affine = person.grid()
            affine[:3, 3] += affine[:3, :3] @ (0, 0, depth // 2 - 4)  # ten slices about the middle
            image, _, lesion = person.on_grid((height, width, 10), affine)
            save_nifti(folder / f"{subject}.nii.gz", image, affine)
            if has_lesion:
                save_nifti(folder / f"{subject}_lesion.nii.gz", lesion.astype(np.uint8), affine)
            writer.writerow([subject, split, f"{subject}.nii.gz", "", f"{subject}_lesion.nii.gz" if has_lesion else ""])
    return folder / "cohort.csv"


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
