"""Measure registration to MNI152 and the stripping of skulls on images at hand.

    python scripts/measure_registration.py IMAGE_OR_FOLDER... [--heads FOLDER] [--strip atlas|deepbet] [-o result.json]

Each skull-stripped image is moved by random affines (20 degrees, 25 mm, scale 0.85 to 1.15 along each axis) and stored
in a random order of axes, or resampled; the target registration error is how far a point of its brain ends from where
the unmoved image puts it. A folder of heads holds `NAME_T1.nii.gz` and `NAME_brain_mask.nii.gz`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import nibabel as nib
import numpy as np
import torch
import typer
from monai.data import MetaTensor
from scipy.spatial.transform import Rotation

from common.errors import one_line
from common.transforms.brain import brain_mask
from common.transforms.deepbet import deepbet_brain_mask
from common.transforms.load import load_image
from common.transforms.registration import RegisterToMNI, mni_transform, onto, upright_grid, world_points
from common.transforms.strip import atlas_brain_mask

MAX_ANGLE_DEG, MAX_SHIFT_MM, SCALES = 20.0, 25.0, (0.85, 1.15)
LESION_RADIUS_MM = 5.0
EVERY = 50  # of the brain's voxels is a target point
STRIPS = {"atlas": atlas_brain_mask, "deepbet": deepbet_brain_mask}


def main(
    images: Annotated[list[Path] | None, typer.Argument(help="NIfTI files, or folders of them.")] = None,
    heads: Annotated[Path | None, typer.Option(help="Folder of heads with brain masks.")] = None,
    strip: Annotated[
        Literal["atlas", "deepbet"], typer.Option(help="How the brains of the heads are found.")
    ] = "atlas",
    first: Annotated[int | None, typer.Option(help="Only so many images of each folder.")] = None,
    perturbations: Annotated[int, typer.Option(help="Of each image.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the perturbations.")] = 0,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The JSON.")] = None,
) -> None:
    """Print a line an image and write all figures as JSON."""
    torch.set_num_threads(1)
    files = [f for path in images or () for f in (sorted(path.glob("*.nii*"))[:first] if path.is_dir() else [path])]
    result: dict[str, dict[str, dict[str, float]]] = {"registration": {}, "strip": {}}
    for number, file in enumerate(files):
        rng = np.random.default_rng([seed, number])
        result["registration"][file.name] = report(file, measure(load_image(file), perturbations, rng))
    for file in sorted(heads.glob("*_T1.nii.gz")) if heads else []:
        mask = load_image(str(file).replace("_T1", "_brain_mask"))
        result["strip"][file.name] = report(file, measure_strip(load_image(file), mask, STRIPS[strip]))
    if output:
        output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def measure(image: MetaTensor, perturbations: int, rng: np.random.Generator) -> dict[str, float]:
    """Target registration error (mm), seconds, and Dice of labels that went to MNI152 and back."""
    brain = brain_mask(image)
    points = world_points(brain)[::EVERY]
    reference = mni_transform(image, brain)
    errors, seconds = [], []
    for number in range(perturbations):
        moved_image, moved_brain, movement = perturb(image, brain, rng, resampled=number % 4 == 3)
        start = time.perf_counter()
        estimate = mni_transform(moved_image, moved_brain) @ movement
        seconds.append(time.perf_counter() - start)
        apart = nib.affines.apply_affine(estimate, points) - nib.affines.apply_affine(reference, points)
        errors.append(np.linalg.norm(apart, axis=1))
    lesion = MetaTensor(ball(brain, LESION_RADIUS_MM), affine=brain.affine)
    figures = {
        "tre_median_mm": float(np.median(errors)),
        "tre_worst_mm": float(np.max(errors)),
        "seconds_median": float(np.median(seconds)),
        "seconds_worst": max(seconds),
    }
    for spacing_mm in (1.0, 2.0):
        register = RegisterToMNI(spacing_mm, mode="nearest")
        for name, label in (("brain", brain), ("lesion", lesion)):
            back = register.inverse(register(label.float(), to_mni=reference))
            figures[f"{name}_back_dice_{spacing_mm:g}mm"] = dice(back.as_tensor() > 0, label.as_tensor() > 0)
    return figures


def measure_strip(
    head: MetaTensor, mask: MetaTensor, find: Callable[[MetaTensor], MetaTensor] = atlas_brain_mask
) -> dict[str, float]:
    """Dice of the mask that is found, its excess and what it misses, as shares of the brain, and seconds."""
    start = time.perf_counter()
    found, true = find(head).as_tensor(), mask.as_tensor() > 0
    return {
        "dice": dice(found, true),
        "excess": float((found & ~true).sum() / true.sum()),
        "missed": float((true & ~found).sum() / true.sum()),
        "seconds": time.perf_counter() - start,
    }


def perturb(
    image: MetaTensor, brain: MetaTensor, rng: np.random.Generator, resampled: bool
) -> tuple[MetaTensor, MetaTensor, np.ndarray]:
    """Move a brain in its world and store it in a random order of axes, or interpolated on a grid of another size."""
    turn = Rotation.from_euler("xyz", rng.uniform(-MAX_ANGLE_DEG, MAX_ANGLE_DEG, 3), degrees=True).as_matrix()
    matrix = turn @ np.diag(rng.uniform(*SCALES, 3))
    centre = world_points(brain).mean(axis=0)
    movement = nib.affines.from_matvec(matrix, centre - matrix @ centre + rng.uniform(-MAX_SHIFT_MM, MAX_SHIFT_MM, 3))
    affine = movement @ np.asarray(image.affine, dtype=float)
    if resampled:
        moved = MetaTensor(brain.as_tensor().float(), affine=affine)
        grid = upright_grid(world_points(moved) + rng.uniform(0, 2, 3), margin_mm=rng.uniform(2, 20))
        image, brain = onto(MetaTensor(image.as_tensor(), affine=affine), grid), onto(moved, grid)
        return image, MetaTensor(brain.as_tensor() >= 0.5, affine=brain.affine), movement
    order = np.stack([rng.permutation(3), rng.choice([-1, 1], 3)], axis=1)
    stored = affine @ nib.orientations.inv_ornt_aff(order, image.shape[1:])
    arrays = [nib.orientations.apply_orientation(one.as_tensor()[0].numpy(), order) for one in (image, brain)]
    image, brain = (MetaTensor(torch.from_numpy(array.copy())[None], affine=stored) for array in arrays)
    return image, brain, movement


def ball(brain: MetaTensor, radius_mm: float) -> torch.Tensor:
    """(1, H, W, D) bool: a ball in the right hemisphere."""
    voxels = np.moveaxis(np.indices(brain.shape[1:]), 0, -1)
    points = nib.affines.apply_affine(np.asarray(brain.affine, dtype=float), voxels)
    centre = world_points(brain).mean(axis=0) + np.array([25, 0, 15])
    return torch.from_numpy(np.linalg.norm(points - centre, axis=-1) <= radius_mm)[None]


def dice(a: torch.Tensor, b: torch.Tensor) -> float:
    """Overlap of two masks."""
    return 2 * float((a & b).sum()) / float(a.sum() + b.sum())


def report(file: Path, figures: dict[str, float]) -> dict[str, float]:
    """Print the figures of an image and return them, rounded."""
    rounded = {name: round(value, 3) for name, value in figures.items()}
    print(file.name, rounded, flush=True)
    return rounded


if __name__ == "__main__":
    typer.run(one_line(main))
