"""Where results may be written: never onto what is read, and never over what is no earlier result.

The one place for these rules; commands ask it before anything is read, and handlers before the first case.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import OutputError

RECORD = "run.json"
DESCRIPTION = "dataset_description.json"
BIDSIGNORE = ".bidsignore"
GENERATOR = "uad-bundles"  # how BIDS derivatives and reports name what made them
REPORT = "report.html"
INPUT_KEYS = ("image", "brain", "lesion")
OTHER_PLACE = "choose another output folder"

# the outputs of a case of a BIDS dataset, after its entities, the last of which is the method. Of these BIDS has a name
# for the mask alone. A reconstruction is not named as a scan (`_T1w`): other programs would take it for one.
BIDS_NAMES = {
    "anomaly_map.nii.gz": "map.nii.gz",
    "segmentation.nii.gz": "mask.nii.gz",
    "reconstruction.nii.gz": "reconstruction.nii.gz",
    "lesions.csv": "lesions.csv",
    "preview.png": "preview.png",
    "to_mni.tfm": "xfm.tfm",
    RECORD: RECORD,
}
OWN_NAMES = {*BIDS_NAMES, "segmentation.dcm", "anomaly_map.dcm", REPORT}  # of a case in a folder of its own
# JSON beside the images of a BIDS derivative, which says what they are and what they were made of
SIDECARS = {
    name.replace(".nii.gz", ".json"): bids.replace(".nii.gz", ".json")
    for name, bids in BIDS_NAMES.items()
    if name.endswith(".nii.gz")
}


def is_safe_name(name: str) -> bool:
    """Whether a name is one visible part of a path on every system: not empty, no leading dot, no separator, no
    control character, nothing that is not Unicode."""
    return bool(name) and name[0] != "." and safe_characters(name) == name


def safe_characters(name: str) -> str:
    """A name with `_` for separators, control characters and bytes that are not UTF-8."""
    return "".join("_" if char in "/\\" or unicodedata.category(char) in ("Cc", "Cs") else char for char in name)


class Inputs:
    """Files and folders that are read and must stay as they are.

    Links are resolved, and two paths to one file of a disk (hard links, mounts, letter case) are the same place.
    """

    def __init__(self, paths: Iterable[str | Path]) -> None:
        self._keys: dict[Path, set[object]] = {}  # of folders that were looked at: many files share theirs
        self._at: dict[object, str | Path] = {}
        self._above: dict[object, str | Path] = {}
        for path in paths:
            for place in _spellings(path):
                self._at |= dict.fromkeys(_identities(place), path)
                for folder in place.parents:
                    for key in self._of_folder(folder):
                        self._above.setdefault(key, path)

    def _of_folder(self, folder: Path) -> set[object]:
        if folder not in self._keys:
            self._keys[folder] = _identities(folder)
        return self._keys[folder]

    def check(self, targets: Iterable[str | Path]) -> None:
        """Raises OutputError where a file or folder to be written is an input, holds one, or lies in one."""
        for target in targets:
            for place in _spellings(target):
                for key in _identities(place):
                    if key in self._at:
                        raise OutputError(target, "would be written over the input", OTHER_PLACE)
                    if key in self._above:
                        fact = f"would be written over the folder of the input {self._above[key]}"
                        raise OutputError(target, fact, OTHER_PLACE)
                for folder in place.parents:
                    for key in self._of_folder(folder) & self._at.keys():
                        fact = f"lies in the input {self._at[key]}, which is only read"
                        raise OutputError(target, fact, "choose an output folder outside of it")


def _spellings(path: str | Path) -> set[Path]:
    """Where a path leads to, and where it is itself, if its last part is a link."""
    path = Path(path)
    places = {Path(os.path.realpath(path))}
    if path.name not in ("", ".."):
        places.add(Path(os.path.realpath(path.parent)) / path.name)
    return places


def _identities(place: Path) -> set[object]:
    keys: set[object] = {str(place)}
    try:
        status = place.stat()
    except (OSError, ValueError):
        return keys
    return keys | {(status.st_dev, status.st_ino)}


def input_files(items: Iterable[Mapping[str, Any]]) -> Iterator[str | Path]:
    """All paths that the items of a datalist name; images that are in memory have none."""
    for item in items:
        for key in INPUT_KEYS:
            value = item.get(key, ())
            yield from (part for part in ([value] if isinstance(value, (str, Path)) else value) if _is_path(part))


def _is_path(value: object) -> bool:
    return isinstance(value, (str, Path))


def bids_label(bundle: str) -> str:
    """The key of a bundle as a label of BIDS, which has letters and digits only: `anoDdpm` for `ano_ddpm`."""
    return re.sub("_+(.?)", lambda match: match[1].upper(), bundle)


def case_place(output_dir: Path, item: Mapping[str, Any], bundle: str) -> tuple[Path, str | None]:
    """The folder of a case, and None; of a case of a BIDS dataset the folder it shares, and what its names begin with.

    Raises OutputError where the name of the case is no name of a folder.
    """
    parts = str(item.get("derivative") or item["subject"]).split("/")
    if not all(map(is_safe_name, parts)) or (len(parts) > 1 and "derivative" not in item):
        raise OutputError(output_dir, f"the case {item['subject']!r} cannot name a folder", "rename the case")
    path = output_dir.joinpath(*parts)
    return (path.parent, f"{path.name}_desc-{bids_label(bundle)}") if "derivative" in item else (path, None)


def check_places(
    output_dir: Path,
    items: Sequence[Mapping[str, Any]],
    bundle: str,
    others: Iterable[str | Path] = (),
    files: Iterable[Path] = (),
) -> None:
    """Refuse to write the cases of a datalist where an input or something else than an earlier result of theirs is.

    Args:
        output_dir: as of `uad detect`.
        items: of the datalist, with `subject` and `image`.
        bundle: the key of it.
        others: inputs beside the images: weights, the table of a cohort.
        files: to be written beside the cases.
    Raises OutputError.
    """
    inputs = Inputs([*input_files(items), *others])
    if len({item["dataset"] for item in items if "dataset" in item}) > 1:
        remedy = "give one at a time, each with an output folder of its own"
        raise OutputError(output_dir, "would hold the results of several BIDS datasets", remedy)
    if output_dir.exists() and not output_dir.is_dir():
        raise OutputError(output_dir, "is not a folder", OTHER_PLACE)
    inputs.check(files)
    for item in items:
        folder, entities = case_place(output_dir, item, bundle)
        if entities is None:
            inputs.check([folder])
            check_case_folder(folder, str(item["subject"]), bundle)
        else:
            written = [folder / f"{entities}_{name}" for name in (*BIDS_NAMES.values(), *SIDECARS.values())]
            inputs.check([output_dir / DESCRIPTION, output_dir / BIDSIGNORE, *written])
            check_derivative(output_dir, written, bundle)


def check_case_folder(folder: Path, subject: str, bundle: str) -> None:
    """Raises OutputError where the folder of a case holds anything that is no earlier result of it."""
    if folder.is_symlink():
        raise OutputError(folder, "is a link, which no result replaces", OTHER_PLACE)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    record = _read_object(folder / RECORD)
    if record is None or not isinstance(record.get("bundle"), str):
        fact = f"is there already and is no earlier result of the case (no {RECORD} of one in it)"
        raise OutputError(folder, fact, f"{OTHER_PLACE}, or move it away")
    found = (record.get("subject", subject), record["bundle"])  # earlier versions did not record the subject
    if found != (subject, bundle):
        raise OutputError(folder, f"holds a result of {found[1]} for the case {found[0]!r}", OTHER_PLACE)


def check_derivative(output_dir: Path, files: Iterable[Path], bundle: str) -> None:
    """Raises OutputError where a folder is another BIDS dataset than a derivative of this program and bundle."""
    path = output_dir / DESCRIPTION
    if path.exists() or path.is_symlink():
        made_by = (_read_object(path) or {}).get("GeneratedBy")
        makers = [one for one in made_by if isinstance(one, dict)] if isinstance(made_by, list) else []
        ours = [one.get("Description") for one in makers if one.get("Name") == GENERATOR]
        remedy = f"choose a folder of its own, such as derivatives/uad-{bundle} in the dataset"
        if not ours:
            raise OutputError(output_dir, "holds another BIDS dataset", remedy)
        if bundle not in ours:
            raise OutputError(output_dir, f"holds the results of another bundle, {ours[0]}", remedy)
    elif taken := next((file for file in files if file.exists()), None):
        raise OutputError(taken, f"is there already, in a folder without {DESCRIPTION}", OTHER_PLACE)


def check_file(path: Path, is_ours: bool, what: str) -> None:
    """Raises OutputError where a file to be written is there and is not, as the caller has looked, an earlier one."""
    if path.is_dir():
        raise OutputError(path, f"is a folder, not a place for {what}", "give the path of a file")
    if path.exists() and not is_ours:
        raise OutputError(path, f"is there already and is not {what}", "choose another place, or move it away")


def check_result(path: Path, inputs: Iterable[str | Path], *keys: str) -> None:
    """Raises OutputError where a JSON file to be written is an input, or is there without these keys of a result."""
    Inputs(inputs).check([path])
    check_file(path, is_result(path, *keys), "an earlier result")


def replicates_path(result: Path) -> Path:
    """Where the bootstrap replicates of a result are, which are too many to be read beside it."""
    return result.with_suffix(".replicates.json")


def is_result(path: Path, *keys: str) -> bool:
    """Whether a file is a JSON object with these keys, as results are."""
    return path.is_file() and set(keys) <= (_read_object(path) or {}).keys()


def _read_object(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def put_in_place(partial: Path, folder: Path) -> None:
    """Move the finished folder of a case to where it belongs; of an earlier result there its own files are removed.

    Nothing else is ever deleted: what somebody laid into the earlier folder is moved into the new one.
    """
    if not folder.exists():
        partial.rename(folder)
        return
    old = folder.with_name(f".replaced-{secrets.token_hex(8)}-{folder.name}")
    folder.rename(old)
    partial.rename(folder)
    for path in old.iterdir():
        if (path.name in OWN_NAMES or (folder / path.name).exists()) and not path.is_dir():
            path.unlink()
        else:
            path.rename(folder / path.name)
    old.rmdir()
