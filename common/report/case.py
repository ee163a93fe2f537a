"""The outputs of one case: NIfTI on the input's own grid, lesions as a table, a record of the run, and a picture."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from scipy import ndimage

from ..calibration import Calibration
from ..methods.base import top_mean
from ..transforms.check import voxel_volume_ml
from .preview import save_preview


@dataclass(frozen=True)
class Case:
    """One volume and what was found, all (1, H, W, D) on the input's own grid; images in the input's own units."""

    subject: str
    image: MetaTensor
    brain: MetaTensor
    anomaly_map: MetaTensor
    reconstruction: MetaTensor
    segmentation: MetaTensor

    @property
    def affine(self) -> np.ndarray:
        """Voxel to world (RAS, mm), exactly the input's."""
        return np.asarray(self.image.affine, dtype=np.float64)


def versions() -> dict[str, str]:
    """What a result was made with: this project and the packages that numbers depend on."""
    return {name: version(name) for name in ("uad-bundles", "torch", "monai", "numpy", "nibabel")}


def volume_score(anomaly_map: torch.Tensor, brain: torch.Tensor) -> float:
    """Score of a volume: the mean of the highest 1 % of the brain's map values."""
    return float(top_mean(anomaly_map[brain.bool()]))


def write_case(folder: Path, case: Case, threshold: float, calibration: Calibration, run: Mapping[str, Any]) -> None:
    """Write the six files of a case into `folder`, which appears whole or not at all; an older one is replaced.

    anomaly_map.nii.gz (float32, raw), segmentation.nii.gz (uint8), reconstruction.nii.gz (float32, input's units),
    lesions.csv, run.json, preview.png.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        for name in ("anomaly_map", "reconstruction", "segmentation"):
            save_nifti(getattr(case, name), case.affine, partial / f"{name}.nii.gz")
        lesions = find_lesions(case)
        save_lesions(lesions, partial / "lesions.csv")
        record = {**run, **describe(case, threshold, calibration, lesions)}
        (partial / "run.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        save_preview(case, threshold, partial / "preview.png")
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def save_nifti(volume: MetaTensor, affine: np.ndarray, path: Path) -> None:
    """Write (1, H, W, D) with a fresh header: nothing of the patient is copied from the input's."""
    nifti = nib.Nifti1Image(volume.as_tensor()[0].cpu().numpy(), affine)
    nifti.header.set_xyzt_units("mm")
    nib.save(nifti, path)


def find_lesions(case: Case) -> list[dict[str, float]]:
    """Connected components of the segmentation, largest first: volume, centroid in RAS mm, map's mean and maximum."""
    mask = case.segmentation.as_tensor()[0].cpu().numpy() > 0
    values = case.anomaly_map.as_tensor()[0].cpu().numpy()
    labels, count = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    index = np.arange(1, count + 1)
    voxel_ml = voxel_volume_ml(case.image)
    volumes = ndimage.sum_labels(mask, labels, index) * voxel_ml
    centroids = np.array(ndimage.center_of_mass(mask, labels, index)).reshape(-1, 3)
    world = centroids @ case.affine[:3, :3].T + case.affine[:3, 3]
    means, maxima = ndimage.mean(values, labels, index), ndimage.maximum(values, labels, index)
    return [
        {
            "volume_ml": round(float(volumes[i]), 4),
            "x_mm": round(float(world[i, 0]), 2),
            "y_mm": round(float(world[i, 1]), 2),
            "z_mm": round(float(world[i, 2]), 2),
            "mean_map": round(float(means[i]), 6),
            "max_map": round(float(maxima[i]), 6),
        }
        for i in np.argsort(-volumes, kind="stable")
    ]


def save_lesions(lesions: list[dict[str, float]], path: Path) -> None:
    """Write the table, with its header even where nothing was found."""
    columns = ["lesion", "volume_ml", "x_mm", "y_mm", "z_mm", "mean_map", "max_map"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({"lesion": number, **lesion} for number, lesion in enumerate(lesions, 1))


def describe(case: Case, threshold: float, calibration: Calibration, lesions: list[dict[str, float]]) -> dict[str, Any]:
    """What run.json says of a case beside the run itself."""
    score = volume_score(case.anomaly_map.as_tensor(), case.brain.as_tensor())
    brain_voxels = float(case.brain.sum())
    warnings = []
    share = float((case.anomaly_map > threshold).sum()) / brain_voxels
    if share > 0.2:
        warnings.append(f"{share:.0%} of the brain is above the threshold: the image may be unlike the training images")
    return {
        "threshold": threshold,
        "volume_score": score,
        "volume_score_percentile": calibration.percentile(score) if calibration.is_fitted else None,
        "abnormal_share": share,
        "lesions": len(lesions),
        "lesion_volume_ml": round(sum(lesion["volume_ml"] for lesion in lesions), 4),
        "versions": versions(),
        "warnings": warnings,
    }
