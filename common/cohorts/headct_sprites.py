"""MedNIST's head CT slices as stacks, some with a sprite each: the synthetic experiment of Pinaya et al. 2022."""

from __future__ import annotations

import csv
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import nibabel as nib
import numpy as np
import typer
from PIL import Image

from ..errors import CohortError
from ..files import replacing
from ..transforms.head import head_mask
from .options import DataDir, Output, Seed
from .sprites import DrawSprite
from .stacks import STACK, write_places
from .table import write_cohort

SPLIT = Path(__file__).with_name("headct_split.csv")
NUM_SPRITES = 100
HEAD = 45.0  # grey values above are no air
SPACING_MM = (3.6, 3.6, 5.0)  # nominal: the archive does not say


class Onto(StrEnum):
    """Where sprites are drawn."""

    ANYWHERE = "anywhere"
    TISSUE = "tissue"


def make_headct_sprites(
    data_dir: DataDir,
    output: Output,
    seed: Seed = 0,
    onto: Annotated[Onto, typer.Option(help="Where sprites are drawn: anywhere, or only onto tissue.")] = Onto.ANYWHERE,
    test_only: Annotated[bool, typer.Option("--test-only", help="Leave out what trains and validates.")] = False,
) -> None:
    """Head CT of MedNIST: the folder HeadCT of its JPEG images, or an npz of `images` (N, 64, 64) and `names`.

    The recorded split keeps 300 images aside, 100 to validate (thresholds, calibration) and 200 to test, none of which
    has an identical twin or is nearly empty; all others train. Of those that test the first 100 get a sprite each,
    which --seed chooses. Slices are independent: a stack of 10 has no anatomy along its third axis. Written:
    <subject>.nii.gz, <subject>_lesion.nii.gz, cohort.csv and slices.csv (which image is where).
    """
    images, names = read_images(data_dir)
    splits = split_images(names)
    if min(map(len, splits.values())) < STACK:
        counts = ", ".join(f"{len(indices)} of {split}" for split, indices in splits.items())
        raise CohortError(data_dir, f"too few images of the recorded split ({counts})", "unpack MedNIST anew")
    output.mkdir(parents=True, exist_ok=True)
    draw = DrawSprite(seed, onto.value)
    rows, places = [], {}
    for split, indices in splits.items():
        if test_only and split != "test":
            continue
        for number, part in enumerate(np.array_split(indices, len(indices) // STACK)):
            subject, stack, lesion = f"{split}{number:03d}", images[part], ""
            if split == "test" and number < NUM_SPRITES // STACK:
                stack, sprites = contaminate(stack, names[part], draw)
                lesion = f"{subject}_lesion.nii.gz"
                save(sprites, output / lesion)
            save(stack, output / f"{subject}.nii.gz")
            rows.append({"subject": subject, "split": split, "CT": f"{subject}.nii.gz", "lesion": lesion})
            places[subject] = names[part]
    write_places(output / "slices.csv", places)
    write_cohort(output / "cohort.csv", ["CT"], rows)


def read_images(data_dir: Path) -> tuple[np.ndarray, np.ndarray]:
    """Slices (N, 64, 64) uint8 and their names. Raises CohortError."""
    archives = sorted(data_dir.glob("*.npz"))
    if archives:
        with np.load(archives[0]) as data:
            return data["images"], data["names"]
    files = sorted(data_dir.glob("*.jpeg"))
    if not files:
        raise CohortError(data_dir, "no JPEG images, and no npz", "give MedNIST's folder HeadCT, see docs/data.md")
    return np.stack([np.asarray(Image.open(path).convert("L")) for path in files]), np.array([p.name for p in files])


def contaminate(stack: np.ndarray, names: np.ndarray, draw: DrawSprite) -> tuple[np.ndarray, np.ndarray]:
    """A sprite on each slice, (N, 64, 64), and the sprites, the same."""
    heads = head_mask(stack, HEAD, axial=0)
    pairs = [draw(i[None], h[None], str(n)) for i, h, n in zip(stack, heads, names, strict=True)]
    drawn, sprites = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    return drawn, sprites


def save(stack: np.ndarray, path: Path) -> None:
    """Write slices (N, 64, 64) as a volume."""
    volume = np.ascontiguousarray(stack.transpose(2, 1, 0))  # rows run to the back, columns to the left
    affine = np.diag([-SPACING_MM[0], -SPACING_MM[1], SPACING_MM[2], 1])
    with replacing(path) as temporary:
        nib.save(nib.Nifti1Image(volume, affine), temporary)


def split_images(names: np.ndarray) -> dict[str, np.ndarray]:
    """Indices of the images of each split; those that are not in the record train."""
    with SPLIT.open(newline="", encoding="utf-8") as file:
        split = {row["name"]: row["split"] for row in csv.DictReader(file)}
    where = {str(name): index for index, name in enumerate(names)}
    parts = {kind: [where[n] for n, s in split.items() if s == kind and n in where] for kind in ("val", "test")}
    parts["train"] = [index for name, index in where.items() if name not in split]
    return {kind: np.array(indices) for kind, indices in parts.items()}
