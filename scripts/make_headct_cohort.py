"""Make a cohort CSV of MedNIST's head CT slices: stacks of 10 slices as NIfTI, split once.

    python scripts/make_headct_cohort.py headct_64.npz OUT [--seed 1] [--onto anywhere | tissue] [--test-only]

300 images are kept aside, 100 to validate (thresholds, calibration) and 200 to test, none of which has an identical
twin (91 images have one) or is nearly empty; all others train. Of those that test the first 100 are contaminated with a
sprite each, as in Pinaya et al. 2022, which `--seed` chooses; `lesion` says where. A stack has no anatomy along its
third axis: slices are independent. Written: OUT/<subject>.nii.gz, OUT/cohort.csv and OUT/slices.csv (which image of the
archive is where), the record of the split.
"""

from __future__ import annotations

import csv
import hashlib
from collections import Counter
from pathlib import Path
from typing import Annotated

import nibabel as nib
import numpy as np
import typer

from common.transforms.head import head_mask
from common.transforms.sprites import DrawSprite

STACK, SEED = 10, 0
NUM_VAL, NUM_TEST, NUM_SPRITES = 100, 200, 100
HEAD, MIN_PIXELS = 45.0, 200  # grey values above air and pixels of them that are more than a nearly empty slice has
SPACING_MM = (3.6, 3.6, 5.0)  # nominal: the archive does not say


def main(
    archive: Annotated[Path, typer.Argument(help="npz with `images` (N, 64, 64) uint8 and `names`.")],
    output: Annotated[Path, typer.Argument(help="Folder of the cohort.")],
    seed: Annotated[int, typer.Option(help="Of the sprites; the split is always the same.")] = 0,
    onto: Annotated[str, typer.Option(help="Where sprites are drawn: anywhere, or only onto tissue.")] = "anywhere",
    test_only: Annotated[bool, typer.Option("--test-only", help="Leave out what trains and validates.")] = False,
) -> None:
    """Write the stacks, cohort.csv and slices.csv."""
    output.mkdir(parents=True, exist_ok=True)
    with np.load(archive) as data:
        images, names = data["images"], data["names"]
    draw = DrawSprite(seed, onto)
    rows, places = [], []
    for split, indices in split_images(images).items():
        if test_only and split != "test":
            continue
        for number, part in enumerate(np.array_split(indices, len(indices) // STACK)):
            subject, stack, lesion = f"{split}{number:03d}", images[part], ""
            if split == "test" and number < NUM_SPRITES // STACK:
                stack, sprites = contaminate(stack, names[part], draw)
                lesion = f"{subject}_lesion.nii.gz"
                save(sprites, output / lesion)
            save(stack, output / f"{subject}.nii.gz")
            rows.append([subject, split, f"{subject}.nii.gz", "", lesion])
            places += [[subject, place, names[index]] for place, index in enumerate(part)]
    write_csv(output / "cohort.csv", [["subject", "split", "CT", "brain", "lesion"], *rows])
    write_csv(output / "slices.csv", [["subject", "slice", "name"], *places])


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
    nib.save(nib.Nifti1Image(volume, affine), path)


def split_images(images: np.ndarray) -> dict[str, np.ndarray]:
    """Indices of (N, 64, 64) for each split."""
    digests = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
    copies = Counter(digests)
    single = [i for i, d in enumerate(digests) if copies[d] == 1 and (images[i] > HEAD).sum() >= MIN_PIXELS]
    kept = np.random.default_rng(SEED).permutation(single)[: NUM_VAL + NUM_TEST]
    return {"val": kept[:NUM_VAL], "test": kept[NUM_VAL:], "train": np.setdiff1d(np.arange(len(images)), kept)}


def write_csv(path: Path, lines: list[list[object]]) -> None:
    """Write lines, the first of them the header."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)


if __name__ == "__main__":
    typer.run(main)
