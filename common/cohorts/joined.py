"""Several cohorts as one: healthy subjects of one data set to train on, patients of another to test."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from .table import read_cohort, write_cohort


def join_cohorts(
    cohorts: Iterable[Path], output: Path, modalities: Sequence[str], splits: Sequence[str] = ("train", "val", "test")
) -> None:
    """Write one cohort CSV of the rows of several that are in these splits; nothing is copied.

    Args:
        modalities: the columns that are kept; each cohort has them.
        splits: rows of others are left out.
    Raises CohortError where a cohort lacks a column, or nothing is left.
    """
    rows = []
    for cohort in cohorts:
        for item in read_cohort(cohort, modalities):
            if item.get("split") not in splits:
                continue
            images = item["image"] if isinstance(item["image"], list) else [item["image"]]
            files = dict(zip(modalities, images, strict=True))
            files |= {column: item[column] for column in ("brain", "lesion") if column in item}
            relative = {column: os.path.relpath(str(path), output.parent) for column, path in files.items()}
            texts = {column: str(item[column]) for column in ("subject", "split", "site") if column in item}
            rows.append(texts | relative)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_cohort(output, modalities, rows)
    read_cohort(output, modalities)
