"""IXI's healthy adults (T1, 3 T) by the recorded split, with simulated lesions in the test subjects.

The lesions are for evaluation only: training rows are untouched.
"""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Hashable, Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import nibabel as nib
import typer
from tqdm import tqdm

from ..data.cohort import write_cohort
from ..errors import CohortError
from ..files import replacing
from ..transforms.brain import BrainMaskd
from ..transforms.load import LoadImageCheckedd, read_affine
from ..transforms.strip import Strip
from ..transforms.synthetic_lesions import InsertLesionsd
from .options import DataDir, Output, Seed

SPLIT = Path(__file__).with_name("ixi_split.csv")
STRIPPED = "stripped"  # what `BrainMaskd` says of an image whose foreground is the brain


class Lesions(StrEnum):
    """Kinds of simulated lesions, see `common.transforms.synthetic_lesions`."""

    BLOBS = "blobs"
    ATLAS = "atlas"
    TEXTURE = "texture"
    DEFORMATION = "deformation"


class InsertInto(StrEnum):
    """Splits that may get lesions."""

    TEST = "test"
    VAL = "val"


def make_ixi_lesions(
    data_dir: DataDir,
    output: Output,
    lesions: Annotated[list[Lesions], typer.Option(help="May be repeated: a row each.")] = [Lesions.BLOBS],  # noqa: B006
    atlas: Annotated[
        list[Path] | None, typer.Option(help="Lesion mask in MNI152 space, for --lesions atlas; may be repeated.")
    ] = None,
    strip: Annotated[Strip | None, typer.Option(help="Find the brain in images of heads, as IXI's are.")] = None,
    seed: Seed = 0,
    insert_into: Annotated[InsertInto, typer.Option(help="The split that gets lesions.")] = InsertInto.TEST,
) -> None:
    """IXI T1 (IXI012-HH-1211-T1.nii.gz as downloaded, or IXI012_T1.nii.gz) with simulated lesions.

    Subjects of the recorded split that are not in DATA_DIR are left out. Written: cohort.csv; with --strip a brain mask
    of each subject, kept if it is there; <subject>-<lesions>_{T1,lesion}.nii.gz.
    """
    subjects = list(find_subjects(data_dir))
    if not subjects:
        fact = "no image of the recorded split, such as IXI012-HH-1211-T1.nii.gz or IXI012_T1.nii.gz"
        raise CohortError(data_dir, fact, "see docs/data.md for where IXI is obtained")
    output.mkdir(parents=True, exist_ok=True)
    rows = []
    for subject, split, path in tqdm(subjects, unit="subject", disable=None):
        row = {"subject": subject, "split": split, "T1": os.path.relpath(path, output), "brain": "", "lesion": ""}
        if strip is not None:
            row["brain"] = write_brain(path, output / f"{subject}_brain.nii.gz", strip)
        rows.append(row)
        for kind in lesions if split == insert_into else ():
            name = f"{subject}-{kind}"
            files = insert(path, output, row["brain"], name, kind, atlas, seed)
            rows.append({**row, "subject": name, **files})
    write_cohort(output / "cohort.csv", ["T1"], rows)


def find_subjects(data_dir: Path) -> Iterator[tuple[str, str, Path]]:
    """Subject, split and T1 image of each subject of the recorded split that is in a folder; says how many are not."""
    with SPLIT.open(newline="", encoding="utf-8") as file:
        split = list(csv.DictReader(file))
    missing = 0
    for row in split:
        subject = row["subject"]
        found = sorted(p for pattern in (f"{subject}_T1.nii*", f"{subject}-*-T1.nii*") for p in data_dir.glob(pattern))
        if found:
            yield subject, row["split"], found[0]
        missing += not found
    if missing:
        print(f"{missing} of {len(split)} subjects of the recorded split are not in {data_dir}", file=sys.stderr)


def write_brain(path: Path, mask: Path, strip: Strip) -> str:
    """Write the brain mask of an image and return its name; none, and "", of an image that is stripped."""
    if not mask.is_file():
        item = BrainMaskd("image", "brain", strip.value)(LoadImageCheckedd("image")({"image": str(path)}))
        if item["brain_source"] == STRIPPED:
            return ""
        save(item["brain"].numpy()[0].astype("uint8"), path, mask)
    return mask.name


def insert(
    path: Path, output: Path, brain: str, name: str, kind: Lesions, atlas: Sequence[Path] | None, seed: int
) -> dict[str, str]:
    """Write one image with lesions and their mask; return the cells of its row."""
    given: dict[Hashable, Any] = {"image": str(path), "subject": name}
    if brain:
        given["brain"] = str(output / brain)
    loaded = LoadImageCheckedd(("image", "brain"), allow_missing_keys=True)(given)
    masks = [str(p) for p in atlas] if atlas else None
    if kind == Lesions.ATLAS and masks is None:
        raise CohortError(
            output, "lesions of kind atlas need masks in MNI152 space", "choose another kind", atlas="MASK"
        )
    transform = InsertLesionsd(brain_key="brain", subject_key="subject", kind=kind.value, seed=seed, atlas_mask=masks)
    item = transform(BrainMaskd("image")(loaded))
    files = {"T1": f"{name}_T1.nii.gz", "lesion": f"{name}_lesion.nii.gz"}
    save(item["image"].numpy()[0].astype("float32"), path, output / files["T1"])
    save(item["lesion"].numpy()[0].astype("uint8"), path, output / files["lesion"])
    return files


def save(volume: Any, like: Path, path: Path) -> None:
    """Write a volume on the grid of an image."""
    with replacing(path) as temporary:
        nib.save(nib.Nifti1Image(volume, read_affine(like)), temporary)
