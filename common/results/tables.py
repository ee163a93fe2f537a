"""The tables of a folder of many cases: `cases.csv`, one row a case, and `lesions_all.csv`, one row a lesion."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..detection.reliability import OK, UNRELIABLE
from ..errors import DicomError, OutputError, ResultError
from ..files import replacing
from ..locks import locked
from ..outputs import check_file
from .quality import QUALITY
from .read import CaseFiles, Outcome, located_lesions, one_cell, read_outcomes, read_run, records_in

CASES, LESIONS = "cases.csv", "lesions_all.csv"
MEASURED = (
    "volume_score",
    "volume_score_percentile",
    "threshold",
    "lesions",
    "lesion_volume_ml",
    "abnormal_share",
    "map_scale",
)
CASE_COLUMNS = ("case", "status", "reliability", "bundle", *MEASURED, *QUALITY, "seconds", "reasons")
OF_A_LESION = ("volume_ml", "x_mm", "y_mm", "z_mm", "mean_map", "max_map", "mni_x_mm", "mni_y_mm", "mni_z_mm")
LESION_COLUMNS = ("case", "bundle", "reliability", "lesion", *OF_A_LESION)
COLUMNS = {CASES: CASE_COLUMNS, LESIONS: LESION_COLUMNS}
WITH_RESULT = {OK, UNRELIABLE, DicomError.__name__}  # of the last, all but the DICOM objects was written


def check_tables(folder: Path) -> None:
    """Raises OutputError where a file by the name of one of the tables is there and is none of them."""
    for name, columns in COLUMNS.items():
        check_file(folder / name, _begins_with(folder / name, ",".join(columns[:3])), "a table of uad detect")


def _begins_with(path: Path, text: str) -> bool:
    return path.is_file() and path.read_bytes().startswith(text.encode())


def write_tables(folder: Path) -> None:
    """Write both tables of all cases at or below a folder, by the name of the case; whole, over those that were there.

    Several processes may do so at once: each reads all that is there, so the last one has all.
    Raises OutputError where they cannot be written.
    """
    try:
        with locked(folder, CASES):
            cases, lesions = rows_of(folder)
            for name, rows in ((CASES, cases), (LESIONS, lesions)):
                _write(folder / name, COLUMNS[name], rows)
    except OSError as error:
        fact = f"its tables cannot be written ({error.strerror or error})"
        raise OutputError(folder, fact, "make room, and run uad detect again") from error


def rows_of(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of `cases.csv` and of `lesions_all.csv`. Raises ResultError where a status table is broken."""
    outcomes = {outcome.case: outcome for outcome in read_outcomes(folder)}
    cases: list[dict[str, Any]] = []
    lesions: list[dict[str, Any]] = []
    for record in records_in(folder):
        files = CaseFiles.of_record(record)
        try:
            run = read_run(files)
            case = one_cell(str(run.get("subject", files.name)))
            found = located_lesions(files)
        except ResultError as error:  # one broken case does not hide the others
            cases.append(_without_result(Outcome(one_cell(files.name), type(error).__name__, str(error))))
            continue
        outcome = outcomes.get(case) or Outcome(case, run["reliability"], "; ".join(run["doubts"]))
        if outcome.status in WITH_RESULT:
            cases.append(_with_result(outcome, run))
            lesions += [_lesion(case, run, number, each) for number, each in enumerate(found, 1)]
        else:  # what is there is of an earlier run, or of other settings
            cases.append(_without_result(outcome))
    there = {row["case"] for row in cases}
    cases += [_without_result(outcome) for case, outcome in outcomes.items() if case not in there]
    return sorted(cases, key=_place), sorted(lesions, key=_place)


def _place(row: Mapping[str, Any]) -> tuple[str, str, int]:
    """By case, then by method, for one dataset may have the results of several, then by lesion."""
    return row["case"], row.get("bundle", ""), row.get("lesion", 0)


def _without_result(outcome: Outcome) -> dict[str, Any]:
    return {"case": outcome.case, "status": outcome.status, "reasons": outcome.message}


def _with_result(outcome: Outcome, run: Mapping[str, Any]) -> dict[str, Any]:
    numbers = {name: run.get(name) for name in MEASURED}
    numbers |= {name: (run.get("quality") or {}).get(name) for name in QUALITY}
    seconds = run["seconds"] if isinstance(run["seconds"], (int, float)) else None  # earlier versions have none
    about = {"reliability": run["reliability"], "bundle": run["bundle"], "seconds": seconds}
    return {**_without_result(outcome), **about, **numbers}


def _lesion(case: str, run: Mapping[str, Any], number: int, lesion: Mapping[str, Any]) -> dict[str, Any]:
    place = [None] * 3 if lesion["mni_mm"] is None else [round(value, 2) for value in lesion["mni_mm"]]
    mni = dict(zip(OF_A_LESION[-3:], place, strict=True))
    about = {"case": case, "bundle": run["bundle"], "reliability": run["reliability"], "lesion": number}
    return about | {name: lesion[name] for name in OF_A_LESION[:-3]} | mni


def _write(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """What a row lacks stays empty."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
