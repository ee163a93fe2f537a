"""Make a cohort CSV of OCT2017 (Kermany et al., Cell 2018): stacks of 10 B-scans as NIfTI, split by patient.

    python scripts/make_oct_cohort.py OCT2017 OUT

OCT2017 is the folder that holds `train` and `test` as they unpack, `<class>/<class>-<patient>-<number>.jpeg`. Of
train/NORMAL 5 % of the patients validate and the others train, those of `test` left out; of `test` all classes are
taken. Every image is resized to 256 x 256 as Wolleb et al. 2024 do. There are no masks: the `lesion` of a diseased
stack is all of it, so that only what is said of whole slices means something. Written: OUT/<subject>.nii.gz,
OUT/cohort.csv and OUT/slices.csv (which image is where).
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import nibabel as nib
import numpy as np
import typer
from PIL import Image

STACK, SEED, SIZE = 10, 0, 256
VAL_SHARE = 0.05  # of the patients that do not test
HEALTHY, DISEASED = "NORMAL", ("DRUSEN", "CNV", "DME")
AFFINE = np.diag([-1.0, -1.0, 1.0, 1.0])  # nominal: the archive does not say how large a pixel is


def main(
    data: Annotated[Path, typer.Argument(help="Folder with train and test.")],
    output: Annotated[Path, typer.Argument(help="Folder of the cohort.")],
) -> None:
    """Write the stacks, cohort.csv and slices.csv."""
    output.mkdir(parents=True, exist_ok=True)
    rows, places = [], []
    for (split, kind), files in split_images(data).items():
        for number, part in enumerate(np.array_split(np.array(files), max(1, len(files) // STACK))):
            subject = f"{split}_{kind.lower()}{number:04d}"
            stack = np.stack([read(path) for path in part], axis=2)
            lesion = "" if kind == HEALTHY else f"{subject}_lesion.nii.gz"
            nib.save(nib.Nifti1Image(stack, AFFINE), output / f"{subject}.nii.gz")
            if lesion:
                nib.save(nib.Nifti1Image(np.ones_like(stack), AFFINE), output / lesion)
            rows.append([subject, split, f"{subject}.nii.gz", "", lesion])
            places += [[subject, place, path.name] for place, path in enumerate(part)]
    write_csv(output / "cohort.csv", [["subject", "split", "OCT", "brain", "lesion"], *rows])
    write_csv(output / "slices.csv", [["subject", "slice", "name"], *places])


def split_images(data: Path) -> dict[tuple[str, str], list[Path]]:
    """Files of each split and class, at least 2: a stack is a volume."""
    test = {kind: find(data / "test" / kind) for kind in (HEALTHY, *DISEASED)}
    tested = {patient(path) for files in test.values() for path in files}
    healthy = [path for path in find(data / "train" / HEALTHY) if patient(path) not in tested]
    patients = np.random.default_rng(SEED).permutation(sorted({patient(path) for path in healthy}))
    kept = set(patients[: max(1, round(VAL_SHARE * len(patients)))])
    parts = {("train", HEALTHY): [path for path in healthy if patient(path) not in kept]}
    parts["val", HEALTHY] = [path for path in healthy if patient(path) in kept]
    parts |= {("test", kind): files for kind, files in test.items()}
    return {key: files for key, files in parts.items() if len(files) > 1}


def find(folder: Path) -> list[Path]:
    """Images of a class; none where there is no such folder."""
    return sorted(folder.glob("*.jpeg"))


def patient(path: Path) -> str:
    """`1016042` of NORMAL-1016042-3.jpeg."""
    return path.stem.split("-")[1]


def read(path: Path) -> np.ndarray:
    """(SIZE, SIZE) uint8, columns first, as NIfTI stores images: the affine turns them to left and posterior."""
    with Image.open(path) as image:
        return np.asarray(image.convert("L").resize((SIZE, SIZE))).T


def write_csv(path: Path, lines: Sequence[Sequence[object]]) -> None:
    """Write lines, the first of them the header."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)


if __name__ == "__main__":
    typer.run(main)
