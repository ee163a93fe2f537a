"""Cohorts: one CSV row per subject, turned into MONAI datalists."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from ..errors import CohortError

Split = Literal["train", "val", "test"]
OTHER_COLUMNS = ("subject", "split", "brain", "lesion")
SAMPLE_DIR = Path(__file__).parent / "sample"


def sample_dir() -> str:
    """Folder of the sample that the package ships: the MNI152 template with simulated lesions."""
    return str(SAMPLE_DIR)


def read_cohort(
    cohort: str | Path,
    modalities: Sequence[str],
    split: Split | None = None,
    healthy: bool | None = None,
    allow_empty: bool = False,
) -> list[dict[str, object]]:
    """The rows of a cohort CSV as a datalist: subject, image (path, or one a modality); split, brain, lesion if given.

    The columns are `subject`, one per modality, `split` where one is asked for, and optionally `brain` and `lesion`
    (empty: none; a subject without `lesion` is healthy). Paths are relative to the CSV.

    Args:
        split: only rows of this split.
        healthy: only healthy subjects, or only those with a lesion.
        allow_empty: return an empty datalist where nothing is left.
    Raises CohortError where a column is missing, a subject appears twice or in two splits, or nothing is left.
    """
    path = Path(cohort)
    columns, rows = _read_csv(path)
    missing = [c for c in ("subject", *(["split"] if split else []), *modalities) if c not in columns]
    if missing:
        raise CohortError(path, f"no column {', '.join(missing)}", "see the README for the columns of a cohort")
    check_subjects(path, [row["subject"] for row in rows])
    datalist = [_item(path, row, modalities) for row in rows if split is None or row["split"] == split]
    if healthy is not None:
        datalist = [item for item in datalist if ("lesion" not in item) is healthy]
    if not datalist and not allow_empty:
        raise CohortError(path, f"no row with split={split}, healthy={healthy}", "check the columns split and lesion")
    return datalist


def cohort_modalities(cohort: str | Path) -> list[str]:
    """The modalities of a cohort CSV: its columns beside those that every cohort has. Raises CohortError."""
    modalities = [column for column in _read_csv(Path(cohort))[0] if column not in OTHER_COLUMNS]
    if not modalities:
        raise CohortError(cohort, "no column of a modality", "name one as the bundles do: T1, T2, FLAIR, ...")
    return modalities


def _read_csv(path: Path) -> tuple[Sequence[str], list[dict[str, str]]]:
    if not path.is_file():
        raise CohortError(path, "no such cohort CSV", "check the path")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            return reader.fieldnames or [], list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CohortError(path, f"not a CSV in UTF-8 ({error})", "save it as CSV UTF-8") from error


def check_subjects(path: Path, subjects: list[str]) -> None:
    """Every row is another subject; a name is used in file names. Raises CohortError."""
    twice = {s for s in subjects if subjects.count(s) > 1}
    if twice:
        raise CohortError(path, f"subject {sorted(twice)[0]!r} appears more than once", "give each subject one row")
    for subject in subjects:
        if not subject or subject == ".." or Path(subject).name != subject:
            raise CohortError(path, f"subject {subject!r} cannot name a folder", "use letters, digits, - and _")


def _item(path: Path, row: dict[str, str], modalities: Sequence[str]) -> dict[str, object]:
    def resolve(column: str) -> str | None:
        return str(path.parent / row[column]) if row.get(column) else None

    images = [resolve(modality) for modality in modalities]
    if None in images:
        raise CohortError(path, f"subject {row['subject']!r} lacks an image", f"give all of {', '.join(modalities)}")
    item: dict[str, object] = {"subject": row["subject"], "image": images[0] if len(images) == 1 else images}
    others = {"split": row.get("split"), "brain": resolve("brain"), "lesion": resolve("lesion")}
    return item | {column: value for column, value in others.items() if value}  # MONAI's collation takes no None
