"""The result of an evaluation as a table for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..detection.calibration import origin_in_words
from .benchmark_table import FEW, FEW_EXPLAINED, LESIONS, SUBJECTS, VOXELS, cell

OF_BASELINES = ("auprc", "max_dice_pooled", "image_auroc", "volume_auroc")  # the others need a threshold


def evaluation_table(result: Mapping[str, Any]) -> str:
    """Lines of text: each metric of the method that is defined, then some of them for the baselines."""
    names = {**VOXELS, **SUBJECTS, **{name: f"lesions: {title}" for name, title in LESIONS.items()}}
    about = (
        f"{result['bundle']}: {result['n_subjects']} subjects, {result['n_lesion_subjects']} of them with "
        f"{result['n_lesions']} lesions in {result['n_lesion_slices']} slices; threshold {result['threshold']:.4g}, "
        f"{origin_in_words(result['threshold_origin'])}"
    )
    rows = [[title, cell(result[name])] for name, title in names.items() if result[name]["value"] is not None]
    lines = [about, "", *_aligned([["metric", "value (95 % interval)"], *rows])]
    if baselines := result.get("baselines"):
        header = ["baseline that costs nothing", *(names[name] for name in OF_BASELINES)]
        of_each = [[key, *(cell(found[name]) for name in OF_BASELINES)] for key, found in baselines.items()]
        lines += ["", *_aligned([header, *of_each])]
    if any(FEW in line for line in lines):
        lines += ["", FEW_EXPLAINED]
    return "\n".join(lines)


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
