"""Make a cohort CSV of brain tumour patients, of whose slices those without tumour are healthy.

    python scripts/make_tumour_cohort.py DATA OUT [--layout tcga_lgg | brats2020]

DATA holds `<patient>_<modality>.nii.gz` and `<patient>_seg.nii.gz`, in one folder (tcga_lgg) or one a patient
(brats2020, as it unpacks). Patients are split once, 60:15:25. Of those that train, only the slices without tumour are
kept, as a stack without lesion; those that validate have such a stack, `<patient>_healthy`, and the volume with its
lesion; those that test the volume. Patients of whom one modality is a copy of another are left out. Written: the
volumes and OUT/cohort.csv.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import nibabel as nib
import numpy as np
import typer
from scipy import ndimage

SEED = 0
SHARES = {"train": 0.6, "val": 0.15, "test": 0.25}


@dataclass(frozen=True)
class Layout:
    """Modalities as files name them, the axial slices used, and how close to a tumour a slice is not healthy."""

    modalities: dict[str, str]
    slices: slice
    margin: int


LAYOUTS = {
    # thick slices: beside the last that is marked the tumour goes on
    "tcga_lgg": Layout({"T1": "T1", "FLAIR": "FLAIR", "T1CE": "T1CE"}, slice(None), margin=1),
    # Wolleb et al. 2024: slices 80 to 128, the order of the channels that their images show
    "brats2020": Layout({"T1": "t1", "T1CE": "t1ce", "T2": "t2", "FLAIR": "flair"}, slice(80, 129), margin=0),
}


def main(
    data: Annotated[Path, typer.Argument(help="Folder of the patients.")],
    output: Annotated[Path, typer.Argument(help="Folder of the cohort.")],
    layout: Annotated[str, typer.Option(help="tcga_lgg or brats2020.")] = "tcga_lgg",
) -> None:
    """Write the volumes and cohort.csv."""
    kind = LAYOUTS[layout]
    output.mkdir(parents=True, exist_ok=True)
    patients = [p for p in find_patients(data) if not has_copies([load(p, name) for name in kind.modalities.values()])]
    rows = []
    for split, members in split_patients(patients).items():
        for patient in members:
            images = {name: load(patient, file)[..., kind.slices] for name, file in kind.modalities.items()}
            tumour = load(patient, "seg")[..., kind.slices] > 0
            affine = nib.load(f"{patient}_seg.nii.gz").affine
            healthy = ~ndimage.binary_dilation(tumour.any(axis=(0, 1)), np.ones(1 + 2 * kind.margin))
            if split != "test" and healthy.sum() > 1:  # one slice is no volume
                subject = patient.name + ("_healthy" if split == "val" else "")
                stacks = {name: image[..., healthy] for name, image in images.items()}
                rows.append([subject, split, *write(output, subject, stacks, affine), "", ""])
            if split != "train":
                files = write(output, patient.name, images | {"lesion": tumour.astype(np.uint8)}, affine)
                rows.append([patient.name, split, *files[:-1], "", files[-1]])
    with (output / "cohort.csv").open("w", newline="", encoding="utf-8") as file:
        header = ["subject", "split", *kind.modalities, "brain", "lesion"]
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def find_patients(data: Path) -> list[Path]:
    """Paths of the patients' files, without what follows the patient's name."""
    return sorted(path.with_name(path.name.removesuffix("_seg.nii.gz")) for path in data.rglob("*_seg.nii.gz"))


def load(patient: Path, name: str) -> np.ndarray[Any, Any]:
    """(H, W, D) as stored."""
    return np.asarray(nib.load(f"{patient}_{name}.nii.gz").dataobj)


def has_copies(images: list[np.ndarray[Any, Any]]) -> bool:
    """Whether a modality that was missing holds another."""
    return any(np.array_equal(a, b) for i, a in enumerate(images) for b in images[:i])


def split_patients(patients: list[Path]) -> dict[str, list[Path]]:
    """At random, by patient."""
    order = np.random.default_rng(SEED).permutation(len(patients))
    ends = np.round(np.cumsum(list(SHARES.values())) * len(patients)).astype(int)
    parts = np.split(order, ends[:-1])
    return {split: [patients[i] for i in sorted(part)] for split, part in zip(SHARES, parts, strict=True)}


def write(output: Path, subject: str, images: dict[str, np.ndarray[Any, Any]], affine: np.ndarray) -> list[str]:
    """Write the images of a subject and return their names."""
    names = [f"{subject}_{name}.nii.gz" for name in images]
    for name, image in zip(names, images.values(), strict=True):
        nib.save(nib.Nifti1Image(image, affine), output / name)
    return names


if __name__ == "__main__":
    typer.run(main)
