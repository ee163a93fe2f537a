"""Patients with brain tumours, of whose slices those without tumour are healthy."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import nibabel as nib
import numpy as np
import typer
from scipy import ndimage

from ..errors import CohortError
from ..files import replacing
from .options import DataDir, Output
from .patients import find
from .table import write_cohort

SPLIT = Path(__file__).with_name("glioma_split.csv")
SEED = 0
SHARES = {"train": 0.6, "val": 0.15, "test": 0.25}
# Wolleb et al. 2024 test on 1,743 slices, about 36 patients of 49 slices, and train on 5,598 healthy ones, as many as
# about 286 patients have; whom they took is not published
BRATS2020_SHARES = {"train": 286 / 369, "val": 47 / 369, "test": 36 / 369}
BRATS2021_SHARES = {"train": 0.8, "val": 0.1, "test": 0.1}


@dataclass(frozen=True)
class Layout:
    """Modalities as files name them, the axial slices used, and how close to a tumour a slice is not healthy.

    Where there is a recorded split, patients that it does not name test; else all are split at random, by `shares`.
    """

    modalities: dict[str, str]
    slices: slice
    margin: int
    split: Path | None = None
    shares: Mapping[str, float] = field(default_factory=lambda: SHARES)


BRATS = {"T1": "t1", "T1CE": "t1ce", "T2": "t2", "FLAIR": "flair"}
LAYOUTS = {
    # thick slices: beside the last that is marked the tumour goes on
    "tcga_lgg": Layout({"T1": "T1", "FLAIR": "FLAIR", "T1CE": "T1CE"}, slice(None), 1, SPLIT),
    # Wolleb et al. 2024: slices 80 to 128, the order of the channels that their images show
    "brats2020": Layout(BRATS, slice(80, 129), 0, shares=BRATS2020_SHARES),
    # Liang et al. 2024, and Beizaee et al. 2025 after them: slices 70 to 89, 80:10:10
    "brats2021": Layout(BRATS, slice(70, 90), 0, shares=BRATS2021_SHARES),
}


class LayoutName(StrEnum):
    """Keys of `LAYOUTS`."""

    TCGA_LGG = "tcga_lgg"
    BRATS2020 = "brats2020"
    BRATS2021 = "brats2021"


def make_glioma(
    data_dir: DataDir,
    output: Output,
    layout: Annotated[LayoutName, typer.Option(help="In one folder, or a folder each as BraTS unpacks.")],
) -> None:
    """Patients of <patient>_<modality>.nii.gz and <patient>_seg.nii.gz, split as the papers that use them say.

    BraTS 2020: slices 80 to 128, 286:47:36 of 369 patients; BraTS 2021: slices 70 to 89, 80:10:10; TCGA-LGG: all
    slices, 60:15:25 as recorded.

    Of those that train, only the slices without tumour are kept, as a stack without lesion; those that validate have
    such a stack, <patient>_healthy, and the volume with its lesion; those that test the volume. Patients of whom one
    modality is a copy of another are left out. Written: the volumes and cohort.csv.
    """
    kind = LAYOUTS[layout.value]
    patients = [p for p in find_patients(data_dir) if not has_copies([load(p, m) for m in kind.modalities.values()])]
    if not patients:
        names = ", ".join(f"<patient>_{name}.nii.gz" for name in kind.modalities.values())
        fact = "no <patient>_seg.nii.gz of other images"
        raise CohortError(data_dir, fact, f"the layout {layout.value} has {names} beside it, see docs/data.md")
    output.mkdir(parents=True, exist_ok=True)
    rows = []
    for split, members in (recorded(patients, kind.split) if kind.split else at_random(patients, kind.shares)).items():
        for patient in members:
            images = {name: load(patient, file)[..., kind.slices] for name, file in kind.modalities.items()}
            tumour = load(patient, "seg")[..., kind.slices] > 0
            affine = open_image(patient, "seg").affine
            healthy = ~ndimage.binary_dilation(tumour.any(axis=(0, 1)), np.ones(1 + 2 * kind.margin))
            if split != "test" and healthy.sum() > 1:  # one slice is no volume
                subject = patient.name + ("_healthy" if split == "val" else "")
                stacks = {name: image[..., healthy] for name, image in images.items()}
                rows.append({"subject": subject, "split": split, **write(output, subject, stacks, affine)})
            if split != "train":
                files = write(output, patient.name, images | {"lesion": tumour.astype(np.uint8)}, affine)
                rows.append({"subject": patient.name, "split": split, **files})
    write_cohort(output / "cohort.csv", list(kind.modalities), rows)


def find_patients(data: Path) -> list[Path]:
    """Paths of the patients' files, without what follows the patient's name."""
    return sorted(path.with_name(path.name.removesuffix("_seg.nii.gz")) for path in data.rglob("*_seg.nii.gz"))


def open_image(patient: Path, name: str) -> nib.Nifti1Image:
    """A file of a patient. Raises CohortError where it is not there."""
    return nib.Nifti1Image.from_filename(find(Path(f"{patient}_{name}.nii.gz")))


def load(patient: Path, name: str) -> np.ndarray[Any, Any]:
    """(H, W, D) as stored."""
    return np.asarray(open_image(patient, name).dataobj)


def has_copies(images: list[np.ndarray[Any, Any]]) -> bool:
    """Whether a modality that was missing holds another."""
    return any(np.array_equal(a, b) for i, a in enumerate(images) for b in images[:i])


def recorded(patients: list[Path], path: Path) -> dict[str, list[Path]]:
    """Patients of each split."""
    with path.open(newline="", encoding="utf-8") as file:
        split = {row["subject"]: row["split"] for row in csv.DictReader(file)}
    return {part: [p for p in patients if split.get(p.name, "test") == part] for part in SHARES}


def at_random(patients: list[Path], shares: Mapping[str, float]) -> dict[str, list[Path]]:
    """Patients of each split by its share, at least one to validate and to test where there are three."""
    order = np.random.default_rng(SEED).permutation(len(patients))
    val, test = (max(1, round(shares[split] * len(patients))) for split in ("val", "test"))
    parts = np.split(order, [max(0, len(patients) - val - test), max(0, len(patients) - test)])
    return {split: [patients[i] for i in sorted(part)] for split, part in zip(SHARES, parts, strict=True)}


def write(output: Path, subject: str, images: dict[str, np.ndarray[Any, Any]], affine: np.ndarray) -> dict[str, str]:
    """Write the images of a subject and return their names."""
    names = {name: f"{subject}_{name}.nii.gz" for name in images}
    for name, image in images.items():
        with replacing(output / names[name]) as temporary:
            nib.save(nib.Nifti1Image(image, affine), temporary)
    return names
