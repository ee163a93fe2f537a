"""A picture of one case: input, reconstruction, map over input, outline of the segmentation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from monai.data import MetaTensor
from monai.transforms import Orientation
from scipy import ndimage

if TYPE_CHECKING:
    from .case import Case

COLUMNS = 6


def save_preview(case: Case, threshold: float, path: Path, doubts: Sequence[str] = (), title: str = "") -> None:
    """Write a PNG of axial slices: those with the most abnormal tissue and, between them, an even sample.

    Radiological view: the patient's left is on the right. The colour scale of the map is the same for every case of a
    bundle: it begins at the threshold and is full at three times the threshold.

    doubts: reasons not to interpret the result, which stand above the slices in red. title: above the slices.
    """
    image, brain, anomaly_map, reconstruction, mask = (
        _axial(volume) for volume in (case.image, case.brain, case.anomaly_map, case.reconstruction, case.segmentation)
    )
    spacing = cast(MetaTensor, Orientation("RAS", labels=None)(case.image)).pixdim
    box = ndimage.find_objects((brain > 0).astype(np.uint8))[0]  # the air around a brain shows nothing
    image, brain, anomaly_map, reconstruction, mask = (
        volume[box] for volume in (image, brain, anomaly_map, reconstruction, mask)
    )
    chosen = choose_slices(np.where(brain > 0, anomaly_map, 0), brain > 0)
    low, top = np.percentile(image[brain > 0].astype(np.float64), (0.5, 99.5))
    figure = Figure(figsize=(2 * len(chosen), 8.6), facecolor="black", layout="constrained")
    axes = figure.subplots(4, len(chosen), squeeze=False)
    for column, index in enumerate(chosen):
        for row, picture in enumerate((image, reconstruction, image, image)):
            axis = axes[row, column]
            axis.imshow(picture[index], cmap="gray", vmin=min(low, 0.0), vmax=top, aspect=spacing[1] / spacing[0])
            axis.set_axis_off()
        heat = anomaly_map[index]
        alpha = (heat > threshold).astype(float)
        axes[2, column].imshow(
            heat, cmap="hot", vmin=0, vmax=3 * threshold, alpha=alpha, aspect=spacing[1] / spacing[0]
        )
        if mask[index].any():
            axes[3, column].contour(mask[index] > 0, levels=[0.5], colors="red", linewidths=0.8)
    for row, name in enumerate(("input", "reconstruction", "anomaly map", "segmentation")):
        axes[row, 0].set_title(name, color="white", fontsize=10, loc="left")
    if doubts:
        figure.suptitle(
            f"UNRELIABLE, do not interpret: {doubts[0]}", color="white", backgroundcolor="#b00020", wrap=True
        )
    elif title:
        figure.suptitle(title, color="white", fontsize=11)
    FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})


def _axial(volume: MetaTensor) -> np.ndarray:
    """(1, H, W, D) on any grid -> (slices from below, rows from the front, columns from the patient's right)."""
    ras = np.asarray(Orientation("RAS", labels=None)(volume.to(torch.float32)).cpu())[0]
    return ras.transpose(2, 1, 0)[:, ::-1, :].copy()[:, :, ::-1]


def choose_slices(anomaly_map: np.ndarray, brain: np.ndarray, count: int = COLUMNS) -> list[int]:
    """Indices of slices (axis 0), rising: half an even sample of the brain, half those with the largest map sum."""
    present = np.flatnonzero(brain.any(axis=(1, 2)))
    even = present[np.linspace(0, len(present) - 1, count // 2 + 2).astype(int)[1:-1]].tolist()
    gap = max(1, len(present) // (3 * count))
    chosen = list(even)
    for index in np.argsort(-anomaly_map.sum(axis=(1, 2), dtype=np.float64), kind="stable").tolist():
        if len(chosen) == min(count, len(present)):
            break
        if all(abs(index - other) >= gap for other in chosen) and index in present:
            chosen.append(index)
    return sorted(set(chosen))
