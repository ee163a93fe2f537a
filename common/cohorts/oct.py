"""OCT2017 (Kermany et al., Cell 2018): stacks of B-scans, split by patient."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image

from ..errors import CohortError
from ..files import replacing
from .options import DataDir, Output
from .stacks import STACK, write_places
from .table import write_cohort

SEED, SIZE = 0, 256
VAL_SHARE = 0.05  # of the patients that do not test
HEALTHY, DISEASED = "NORMAL", ("DRUSEN", "CNV", "DME")
AFFINE = np.diag([-1.0, -1.0, 1.0, 1.0])  # nominal: the archive does not say how large a pixel is


def make_oct(data_dir: DataDir, output: Output) -> None:
    """OCT2017: the folder of `train` and `test` as they unpack, <class>/<class>-<patient>-<number>.jpeg.

    Of train/NORMAL 5 % of the patients validate and the others train, those of `test` left out; of `test` all classes
    are taken. Every image is resized to 256 x 256 as Wolleb et al. 2024 do. There are no masks: the lesion of a
    diseased stack of 10 is all of it, so that only what is said of whole slices means something. Written:
    <subject>.nii.gz, <subject>_lesion.nii.gz, cohort.csv and slices.csv (which image is where).
    """
    parts = split_images(data_dir)
    if ("train", HEALTHY) not in parts:
        raise CohortError(data_dir, f"no images in train/{HEALTHY}", "give the folder OCT2017, see docs/data.md")
    output.mkdir(parents=True, exist_ok=True)
    rows, places = [], {}
    for (split, kind), files in parts.items():
        for number, part in enumerate(np.array_split(np.array(files), max(1, len(files) // STACK))):
            subject = f"{split}_{kind.lower()}{number:04d}"
            stack = np.stack([read(path) for path in part], axis=2)
            lesion = "" if kind == HEALTHY else f"{subject}_lesion.nii.gz"
            save(stack, output / f"{subject}.nii.gz")
            if lesion:
                save(np.ones_like(stack), output / lesion)
            rows.append({"subject": subject, "split": split, "OCT": f"{subject}.nii.gz", "lesion": lesion})
            places[subject] = [path.name for path in part]
    write_places(output / "slices.csv", places)
    write_cohort(output / "cohort.csv", ["OCT"], rows)


def save(stack: np.ndarray, path: Path) -> None:
    """Write slices as a volume."""
    with replacing(path) as temporary:
        nib.save(nib.Nifti1Image(stack, AFFINE), temporary)


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
