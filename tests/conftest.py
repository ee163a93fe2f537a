"""A brain that is a formula of world coordinates, so that it can be stored on any grid, and cohorts of it."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

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
