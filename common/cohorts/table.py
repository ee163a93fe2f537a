"""Cohorts: one CSV row per subject, turned into MONAI datalists."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from ..errors import CohortError, OutputError
from ..files import replacing
from ..outputs import check_file, is_safe_name

Split = Literal["train", "val", "test"]
OTHER_COLUMNS = ("subject", "split", "site", "brain", "lesion")
SAMPLE_DIR = Path(__file__).parent / "sample"


def sample_dir() -> str:
    """Folder of the sample that the package ships: the MNI152 template with simulated lesions."""
    return str(SAMPLE_DIR)


def write_sample(folder: Path) -> list[Path]:
    """Copy the files of `sample_dir` into a folder, which is made; where they are.

    Raises OutputError where a file of the name of one is there and is another, or where it cannot be written.
    """
    content = {folder / source.name: source.read_bytes() for source in sorted(SAMPLE_DIR.iterdir())}
    for path, voxels in content.items():
        check_file(path, path.is_file() and path.read_bytes() == voxels, "a file of the sample")
    try:
        for path, voxels in content.items():
            with replacing(path) as temporary:
                temporary.write_bytes(voxels)
    except OSError as error:
        raise OutputError(folder, f"cannot be written ({error.strerror or error})", "choose another folder") from error
    return list(content)


def read_cohort(
    cohort: str | Path,
    modalities: Sequence[str],
    split: Split | None = None,
    healthy: bool | None = None,
    allow_empty: bool = False,
) -> list[dict[str, object]]:
    """The rows of a cohort CSV as a datalist: subject, image (path, or one a modality); the other columns if given.

    The columns are `subject`, one per modality, `split` where one is asked for, and optionally `site` (the scanner or
    hospital), `brain` and `lesion` (empty: none; a subject without `lesion` is healthy). Paths are relative to the CSV.

    Args:
        split: only rows of this split.
        healthy: only healthy subjects, or only those with a lesion.
        allow_empty: return an empty datalist where nothing is left.
    Raises CohortError, which names row and column, where a column is missing, a subject appears twice or in two
    splits, an image is not given, or nothing is left.
    """
    path = Path(cohort)
    columns, rows = read_rows(path)
    missing = [c for c in ("subject", *(["split"] if split else []), *modalities) if c not in columns]
    if missing:
        raise CohortError(path, f"no column {', '.join(missing)}", "see the README for the columns of a cohort")
    check_subjects(path, rows)
    chosen = {number: row for number, row in rows.items() if split is None or row["split"] == split}
    datalist = [_item(path, number, row, modalities) for number, row in chosen.items()]
    if healthy is not None:
        datalist = [item for item in datalist if ("lesion" not in item) is healthy]
    if not datalist and not allow_empty:
        raise CohortError(path, f"no row with split={split}, healthy={healthy}", "check the columns split and lesion")
    return datalist


def healthy_subjects(cohort: str | Path, modalities: Sequence[str]) -> dict[Split, list[dict[str, object]]]:
    """`read_cohort` of the healthy subjects of `train` and `val`, what a method is trained on. Raises CohortError."""
    splits: tuple[Split, ...] = ("train", "val")
    return {split: read_cohort(cohort, modalities, split, healthy=True) for split in splits}


def cohort_modalities(cohort: str | Path) -> list[str]:
    """The modalities of a cohort CSV: its columns beside those that every cohort has. Raises CohortError."""
    modalities = [column for column in read_rows(Path(cohort))[0] if column not in OTHER_COLUMNS]
    if not modalities:
        raise CohortError(cohort, "no column of a modality", "name one as the bundles do: T1, T2, FLAIR, ...")
    if unsafe := [modality for modality in modalities if not is_safe_name(modality)]:
        fact = f"the column {unsafe[0]!r} cannot name a file of a modality"
        raise CohortError(cohort, fact, "name it as the bundles do: T1, T2, FLAIR, ...")
    return modalities


def cohort_files(cohort: str | Path) -> list[Path]:
    """The CSV itself and all files and folders that its rows name, of all splits. Raises CohortError."""
    path = Path(cohort)
    columns, rows = read_rows(path)
    named = [row[column] for row in rows.values() for column in columns if column not in ("subject", "split")]
    return [path, *(path.parent / name for name in named if name)]


def read_rows(path: Path) -> tuple[Sequence[str], dict[int, dict[str, str]]]:
    """The columns of a cohort CSV, and its rows by their number in the file, of which the header is 1.

    Raises CohortError.
    """
    if not path.is_file():
        raise CohortError(path, "no such cohort CSV", "check the path")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            return reader.fieldnames or [], dict((reader.line_num, row) for row in reader)  # noqa: C402 - after the row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CohortError(path, f"not a CSV in UTF-8 ({error})", "save it as CSV UTF-8") from error


def write_cohort(path: Path, modalities: Sequence[str], rows: Iterable[Mapping[str, str]]) -> None:
    """Write a cohort CSV; the rows have its columns, of which `brain` and `lesion` may be empty, and `site` lacking."""
    rows = list(rows)
    site = ["site"] if any("site" in row for row in rows) else []
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        columns = ["subject", "split", *site, *modalities, "brain", "lesion"]
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def cell_error(path: Path, row: int, column: str, fact: str, remedy: str) -> CohortError:
    """What is wrong with a cell of a cohort CSV, said with its row (as in `read_rows`) and column."""
    return CohortError(path, f"row {row}, column {column}: {fact}", remedy)


def check_subjects(path: Path, rows: Mapping[int, Mapping[str, str]]) -> None:
    """Every row is another subject; a name is used in file names. Raises CohortError."""
    seen: dict[str, int] = {}
    for number, row in rows.items():
        subject = row["subject"]
        if not is_safe_name(subject):
            fact = f"subject {subject!r} cannot name a folder"
            raise cell_error(path, number, "subject", fact, "use letters, digits, - and _")
        if subject in seen:
            first = rows[seen[subject]]
            splits = sorted({first.get("split") or "", row.get("split") or ""})
            where = f", in the splits {' and '.join(splits)}" if len(splits) > 1 else ""
            fact = f"subject {subject!r} appears more than once (row {seen[subject]}{where})"
            raise cell_error(path, number, "subject", fact, "give each subject one row")
        seen[subject] = number


def _item(path: Path, number: int, row: dict[str, str], modalities: Sequence[str]) -> dict[str, object]:
    def resolve(column: str) -> str | None:
        return str(path.parent / row[column]) if row.get(column) else None

    images = [resolve(modality) for modality in modalities]
    if None in images:
        fact = f"subject {row['subject']!r} lacks an image"
        remedy = f"give all of {', '.join(modalities)}"
        raise cell_error(path, number, modalities[images.index(None)], fact, remedy)
    item: dict[str, object] = {"subject": row["subject"], "image": images[0] if len(images) == 1 else images}
    others = {
        "split": row.get("split"),
        "site": row.get("site"),
        "brain": resolve("brain"),
        "lesion": resolve("lesion"),
    }
    return item | {column: value for column, value in others.items() if value}  # MONAI's collation takes no None
