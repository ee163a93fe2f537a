"""Maps with lesions to be measured, and what torchmetrics says of them."""

from __future__ import annotations

import numpy as np
import torch
from torchmetrics.functional.classification import binary_auroc, binary_average_precision

from common.metrics import DetectionMetrics

VOXEL_METRICS = ("auprc", "auroc", "max_dice_pooled", "max_dice_mean", "dice_at_threshold", "lesion_share")


def subject(seed, shape=(24, 20, 6), lesion=True, scale=1.0):
    """A noisy map that is higher in a box-shaped lesion; the foreground leaves out the border and the last slice."""
    rng = np.random.default_rng(seed)
    foreground = np.zeros(shape, dtype=bool)
    foreground[2:-2, 2:-2, :-1] = True
    lesions = np.zeros(shape, dtype=bool)
    if lesion:
        x, y = rng.integers(3, 10, size=2)
        lesions[x : x + 4 + seed % 3, y : y + 6, 1:4] = True
    scores = scale * rng.gamma(2.0, 0.05, shape) * np.where(lesions, rng.uniform(1.5, 4), 1)
    return {"anomaly_map": scores.astype(np.float32), "lesion": lesions, "foreground": foreground}


def evaluate(subjects, threshold=0.2, axis=-1, seed=0, n_bootstrap=200):
    metrics = DetectionMetrics(axis)
    for name, volumes in subjects.items():
        metrics.update(name, threshold=threshold, **volumes)
    return metrics.compute(seed=seed, n_bootstrap=n_bootstrap)


def cohort(n_lesion=4, n_healthy=3, **kwargs):
    return {f"s{i}": subject(i, lesion=i < n_lesion, **kwargs) for i in range(n_lesion + n_healthy)}


def pooled(subjects):
    """Foreground voxels of the subjects with a lesion."""
    chosen = [s for s in subjects.values() if s["lesion"].any()]
    scores = np.concatenate([s["anomaly_map"][s["foreground"]] for s in chosen])
    return scores, np.concatenate([s["lesion"][s["foreground"]] for s in chosen])


def dice(predicted, lesions):
    return 2 * (predicted & lesions).sum() / (predicted.sum() + lesions.sum())


def exact(scores, labels):
    """AUPRC and AUROC by torchmetrics; scores in [0, 1], because it passes others through a sigmoid."""
    scaled = torch.from_numpy(np.asarray(scores, dtype=np.float64) / max(float(np.max(scores)), 1e-30))
    target = torch.from_numpy(np.asarray(labels)).long()
    return float(binary_average_precision(scaled, target)), float(binary_auroc(scaled, target))


SHAPE = (10, 40, 40)  # slices first


def boxes(*corners, size=4):
    """A mask with a cube at each corner."""
    mask = np.zeros(SHAPE, dtype=bool)
    for z, y, x in corners:
        mask[z : z + size, y : y + size, x : x + size] = True
    return mask


def volumes(lesion, predicted):
    """Arguments of `update`, slices last, with a map of 1 where something is predicted."""
    moved = [np.moveaxis(mask, 0, -1) for mask in (predicted.astype(np.float32), lesion)]
    return {"anomaly_map": moved[0], "lesion": moved[1], "foreground": np.ones_like(moved[1]), "threshold": 0.5}
