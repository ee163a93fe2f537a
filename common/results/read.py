"""What `uad detect` left in a folder, read back: the record of a case, its lesions, and what became of many cases."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monai.utils import optional_import

from ..detection.reliability import OK, UNRELIABLE
from ..errors import ResultError
from ..outputs import BIDS_NAMES, RECORD

sitk, _ = optional_import("SimpleITK")

AGAIN = "run uad detect on this case again"
LESION_COLUMNS = ("volume_ml", "x_mm", "y_mm", "z_mm", "mean_map", "max_map")
NUMBERS = ("threshold", "volume_score", "lesions", "lesion_volume_ml", "abnormal_share")
TEXTS = ("bundle", "weights_sha256")
OBJECTS: dict[str, Any] = {"input_sha256": {}, "settings": {}, "threshold_origin": {}}
OTHERS = OBJECTS | {
    "reliability": OK,
    "doubts": [],
    "map_scale": None,
    "brain_mask": "-",
    "seed": "-",
    "device": "-",
    "seconds": "-",
}


@dataclass(frozen=True)
class CaseFiles:
    """Where the files of a case are: in a folder of its own, or by the names of a BIDS derivative in a shared one.

    entities: what these names begin with, `sub-01_desc-dae`.
    """

    name: str
    folder: Path
    entities: str | None = None

    def path(self, name: str) -> Path:
        """Of a file by its name in a case's own folder, `anomaly_map.nii.gz`."""
        return self.folder / (name if self.entities is None else f"{self.entities}_{BIDS_NAMES[name]}")

    @classmethod
    def of_record(cls, record: Path) -> CaseFiles:
        """The case that a run.json belongs to."""
        if record.name == RECORD:
            return cls(record.resolve().parent.name, record.parent)
        entities = record.name.removesuffix(f"_{BIDS_NAMES[RECORD]}")
        return cls(entities.rpartition("_desc-")[0], record.parent, entities)


@dataclass(frozen=True)
class Outcome:
    """A line of status.tsv: `ok`, `unreliable` with the reasons, or the kind of error and what is wrong."""

    case: str
    status: str
    message: str

    @property
    def failed(self) -> bool:
        """Whether there is no result of the case."""
        return self.status not in (OK, UNRELIABLE)


def records_in(folder: Path) -> list[Path]:
    """The run.json of every case at or below a folder, sorted; what is half-written is left out."""
    found = [*folder.rglob(RECORD), *folder.rglob(f"*_desc-*_{BIDS_NAMES[RECORD]}")]
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def read_run(files: CaseFiles) -> dict[str, Any]:
    """The record of a case. Raises ResultError where it is not one."""
    path = files.path(RECORD)
    run = OTHERS | read_json(path, AGAIN)
    number = (int, float)
    wrong = [key for key in NUMBERS if not isinstance(run.get(key), number) or not math.isfinite(run[key])]
    wrong += [key for key in TEXTS if not isinstance(run.get(key), str)]
    wrong += [key for key in ("versions", *OBJECTS) if not isinstance(run.get(key), dict)]
    wrong += [] if isinstance(run.get("warnings"), list) else ["warnings"]
    percentile = run.get("volume_score_percentile")
    if percentile is not None and not isinstance(percentile, number):
        wrong.append("volume_score_percentile")
    if wrong:
        raise ResultError(path, f"not the record of a case ({', '.join(wrong)} missing or wrong)", AGAIN)
    return run


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """A JSON object from a file. Raises ResultError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        cause = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise ResultError(path, f"cannot be read ({cause})", remedy) from error
    if not isinstance(content, Mapping):
        raise ResultError(path, "not a JSON object", remedy)
    return dict(content)


def read_lesions(files: CaseFiles) -> list[dict[str, float]]:
    """The rows of lesions.csv, largest first. Raises ResultError."""
    path = files.path("lesions.csv")
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [{name: float(row[name]) for name in LESION_COLUMNS} for row in csv.DictReader(file)]
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise ResultError(path, f"not a table of lesions ({type(error).__name__}: {error})", AGAIN) from error
    return rows


def read_to_mni(files: CaseFiles) -> Any:
    """The transform of points of the scan to MNI152 (ITK, LPS mm); None where the case was not registered.

    Raises ResultError.
    """
    path = files.path("to_mni.tfm")
    if not path.is_file():
        return None
    try:
        return sitk.ReadTransform(str(path)).GetInverse()  # the file maps MNI152 to the scan, see write_tfm
    except RuntimeError as error:
        raise ResultError(path, "not a transform that ITK reads", AGAIN) from error


def mni_point(to_mni: Any, point_mm: tuple[float, float, float]) -> tuple[float, float, float]:
    """A point of the scan in MNI152; both RAS mm."""
    x, y, z = point_mm
    left, posterior, superior = to_mni.TransformPoint((-x, -y, z))
    return -left, -posterior, superior


def located_lesions(files: CaseFiles) -> list[dict[str, Any]]:
    """The lesions, largest first, with `mni_mm`, (x, y, z) in RAS mm; None where the case was not registered.

    Raises ResultError.
    """
    to_mni = read_to_mni(files)

    def mni_mm(lesion: dict[str, float]) -> tuple[float, float, float] | None:
        return to_mni and mni_point(to_mni, (lesion["x_mm"], lesion["y_mm"], lesion["z_mm"]))

    return [{**lesion, "mni_mm": mni_mm(lesion)} for lesion in read_lesions(files)]


def one_cell(text: str) -> str:
    """Text in one line, of characters that UTF-8 has: those of a name that is not UTF-8 are written as escapes."""
    return " ".join(text.encode("utf-8", "backslashreplace").decode().split())


def read_outcomes(folder: Path) -> list[Outcome]:
    """The lines of status.tsv, or of all parts of it; the last line of a case counts. Raises ResultError."""
    outcomes = {}
    for path in sorted(folder.glob("status*.tsv")):
        try:
            with path.open(newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
                    outcomes[row["case"]] = Outcome(row["case"], row["status"] or "", row["message"] or "")
        except (OSError, UnicodeDecodeError, KeyError, csv.Error) as error:
            raise ResultError(path, "not a status table of uad detect", "run uad detect again") from error
    return list(outcomes.values())
