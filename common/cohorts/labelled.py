"""A labelled cohort, checked as a whole before hours are spent on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import nibabel as nib
import numpy as np

from ..errors import CohortError, UADError
from ..images.pointer import check_fetched
from ..transforms.load import load_image, read_affine
from .table import Split, cell_error, read_cohort, read_rows

SPLITS = get_args(Split)
USED = ("train", "test")  # train: by the mean healthy image


def check_labelled_cohort(cohort: str | Path, modalities: Sequence[str], needs_healthy: bool = True) -> None:
    """Refuse a cohort on which methods cannot be measured; only the headers of NIfTI files are read.

    Args:
        modalities: the columns that are used.
        needs_healthy: whether a test subject must be healthy, for the false positives.
    Raises CohortError, with row and column, where `read_cohort` does, a split has another name, a file of the splits
    `train` and `test` is missing, an image is in two splits, a lesion mask is on another grid than its image, or no
    test subject has a lesion (or none is healthy).
    """
    path = Path(cohort)
    read_cohort(path, modalities, split="test")
    _, rows = read_rows(path)
    for number, row in rows.items():
        if row["split"] not in SPLITS:
            raise cell_error(path, number, "split", f"no such split {row['split']!r}", f"use {', '.join(SPLITS)}")
    _check_files(path, {number: row for number, row in rows.items() if row["split"] in USED}, modalities)
    tested = {number: row for number, row in rows.items() if row["split"] == "test"}
    for number, row in tested.items():
        if row.get("lesion"):
            _check_lesion(path, number, row, modalities[0])
    kinds = {bool(row.get("lesion")) for row in tested.values()}
    if True not in kinds:
        raise CohortError(path, "column lesion: no test subject has a lesion", "give the lesion masks")
    if needs_healthy and False not in kinds:
        fact = "column lesion: no test subject is healthy, so there is no false-positive share"
        raise CohortError(path, fact, "add healthy rows to the split test", no_healthy="")


def _check_files(path: Path, rows: Mapping[int, Mapping[str, str]], modalities: Sequence[str]) -> None:
    """Every file is there, and no image in two splits."""
    images: dict[Path, tuple[int, str]] = {}
    cells = [(n, c, row) for n, row in rows.items() for c in (*modalities, "brain", "lesion") if row.get(c)]
    for number, column, row in cells:
        file = path.parent / row[column]
        try:
            check_fetched(file)
        except UADError as error:
            raise cell_error(path, number, column, f"{error.source}: {error.fact}", error.remedy) from error
        if not file.exists():
            raise cell_error(path, number, column, f"no such file {file}", "check the path, relative to the CSV")
        if column in modalities:
            first, split = images.setdefault(file.resolve(), (number, row["split"]))
            if split != row["split"]:
                fact = f"the image of row {first}, which is in split {split}"
                raise cell_error(path, number, column, fact, "leave a subject in one split only")


def _check_lesion(path: Path, number: int, row: dict[str, str], modality: str) -> None:
    grids = []
    for column in (modality, "lesion"):
        try:
            grids.append(_grid(path.parent / row[column]))
        except UADError as error:
            raise cell_error(path, number, column, f"{error.source}: {error.fact}", error.remedy) from error
        except Exception as error:  # nibabel has many for what is no image
            fact = f"{path.parent / row[column]} cannot be read ({type(error).__name__})"
            raise cell_error(path, number, column, fact, "check the file") from error
    (shape, affine), (lesion_shape, lesion_affine) = grids
    if shape != lesion_shape or not np.allclose(affine, lesion_affine, atol=1e-3):
        fact = f"the lesion mask, {lesion_shape}, is on another grid than the image, {shape}"
        raise cell_error(path, number, "lesion", fact, "resample it to the image's grid")


def _grid(file: Path) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape of the volume and its affine; of a NIfTI file without reading the voxels."""
    if file.name.lower().endswith((".nii", ".nii.gz")):
        affine = read_affine(file)
        return tuple(nib.load(file).shape[:3]), affine  # type: ignore[attr-defined]
    image = load_image(file)
    return tuple(image.shape[1:]), np.asarray(image.affine)
