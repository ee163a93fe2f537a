"""Brain Imaging Data Structure: the scans of a dataset, and results as a derivative dataset (BIDS 1.10)."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from .. import __version__
from ..errors import CohortError
from ..files import replacing
from ..outputs import BIDS_NAMES, BIDSIGNORE, DESCRIPTION, GENERATOR, REPORT, SIDECARS

ENTITY = re.compile("[a-zA-Z]+-[a-zA-Z0-9+]+")
# suffix of each modality, and whether its file names tell of a contrast agent (entity `ce`)
MODALITIES = {"T1": ("T1w", False), "T1CE": ("T1w", True), "T2": ("T2w", False), "FLAIR": ("FLAIR", False)}
VERSION = "1.10.0"
SOURCE = "source"  # how the derivative calls the dataset of the scans
OF_THE_STANDARD = ("segmentation.nii.gz", "segmentation.json")
NO_NAME = [f"*_{name}" for own, name in (BIDS_NAMES | SIDECARS).items() if own not in OF_THE_STANDARD]
IGNORED = [*NO_NAME, "status*.tsv", "cases.csv", "lesions_all.csv", REPORT, ".*"]


def is_bids(folder: Path) -> bool:
    """Whether a folder is the root of a dataset."""
    return (folder / DESCRIPTION).is_file() and any(folder.glob("sub-*"))


def check_dataset(folder: Path) -> None:
    """Raises CohortError where a folder is not the root of a dataset."""
    if not is_bids(folder):
        fact = f"no BIDS dataset ({DESCRIPTION} and folders sub-... in it)"
        raise CohortError(folder, fact, "give the folder that holds both")


def find_scans(root: Path, modalities: Sequence[str], participants: Sequence[str] = ()) -> list[dict[str, object]]:
    """A datalist: for one modality every scan of it, for several one item a session.

    `derivative` is where the results of an item belong in a derivative dataset, a path to be continued with
    `_desc-....`; `dataset` is the root, and `sources` are the BIDS URIs of the images. A session without one of several
    modalities is an item whose image will not be found.
    Of complex images only the magnitude is a scan: entity `part` is `mag` or not there.
    Raises CohortError where a participant or all scans are missing, a session has two scans of a modality, two scans
    differ in their description (entity `desc`) alone, or a file's name is no BIDS name of its folder.
    """
    labels = {label.removeprefix("sub-") for label in participants}
    found = {folder.name.removeprefix("sub-"): folder for folder in sorted(root.glob("sub-*")) if folder.is_dir()}
    if missing := sorted(labels - set(found)):
        raise CohortError(root, f"no participant {', '.join(missing)}", "check the labels", participant_label="LABEL")
    folders = [folder for label, folder in found.items() if not labels or label in labels]
    items = [item for folder in folders for item in _items(root, folder, modalities)]
    if not items:
        raise CohortError(root, f"no scan of {', '.join(modalities)} in the BIDS dataset", "check its anat folders")
    return items


def parse_entities(path: Path, root: Path) -> dict[str, str]:
    """`{"sub": "01", "run": "2"}` of `sub-01_run-2_T1w.nii.gz`, in the order of the name.

    Raises CohortError where a part of the name is not `key-value`, a key is there twice, or subject and session are not
    those of the folders.
    """
    parts = path.name.split(".")[0].split("_")[:-1]
    entities = dict(part.split("-") for part in parts if ENTITY.fullmatch(part))
    folders = path.relative_to(root).parts[:-2]
    if len(entities) < len(parts) or parts[: len(folders)] != list(folders) or ("ses" in entities) != len(folders) - 1:
        fact = f"the name is not {'_'.join(folders)}, entities as key-value once each, and a suffix"
        raise CohortError(path, fact, "rename it as BIDS wants")
    return entities


def _items(root: Path, subject: Path, modalities: Sequence[str]) -> Iterator[dict[str, object]]:
    for anat in sorted([*subject.glob("anat"), *subject.glob("ses-*/anat")]):
        scans = {modality: _scans(root, anat, modality) for modality in modalities}
        prefix = "_".join(anat.relative_to(root).parts[:-1])
        if len(modalities) == 1:
            yield from _items_of_one(root, anat, scans[modalities[0]])
        elif any(scans.values()):
            if twice := [modality for modality, paths in scans.items() if len(paths) > 1]:
                raise CohortError(anat, f"several scans of {', '.join(twice)}", "choose them in a cohort CSV")
            paths = [next(iter(scans[m]), anat / f"{prefix}_{MODALITIES[m][0]}.nii.gz") for m in modalities]
            yield _item(root, anat, prefix, [str(path) for path in paths])


def _items_of_one(root: Path, anat: Path, scans: dict[Path, dict[str, str]]) -> Iterator[dict[str, object]]:
    """An item a scan; `desc` is left out of their names, since that of the results takes its place."""
    taken: dict[str, Path] = {}
    for path, entities in scans.items():
        name = "_".join(f"{key}-{value}" for key, value in entities.items() if key != "desc")
        if name in taken:
            fact = f"{path.name} and {taken[name].name} would give results of one name"
            raise CohortError(anat, fact, "choose one in a cohort CSV")
        taken[name] = path
        yield _item(root, anat, name, str(path))


def _scans(root: Path, anat: Path, modality: str) -> dict[Path, dict[str, str]]:
    """The scans of a modality in a folder, by name, with their entities."""
    suffix, contrast = MODALITIES.get(modality, (modality, False))
    paths = sorted([*anat.glob(f"*_{suffix}.nii"), *anat.glob(f"*_{suffix}.nii.gz")])
    scans = {path: parse_entities(path, root) for path in paths if not path.name.startswith(".")}
    return {
        path: entities
        for path, entities in scans.items()
        if ("ce" in entities) is contrast and entities.get("part", "mag") == "mag"
    }


def _item(root: Path, anat: Path, entities: str, image: str | list[str]) -> dict[str, object]:
    place = anat.relative_to(root)
    names = [Path(path).name for path in ([image] if isinstance(image, str) else image)]
    return {
        "subject": entities,
        "image": image,
        "derivative": (place / entities).as_posix(),
        "dataset": str(root),
        "sources": [f"bids:{SOURCE}:{(place / name).as_posix()}" for name in names],
    }


def write_description(folder: Path, bundle: str, dataset: str) -> None:
    """Write `dataset_description.json` and `.bidsignore` of a derivative dataset, made by a bundle, if not there yet.

    dataset: the root of the scans; by a relative path where `folder` lies in it, so that both may be moved together.
    """
    here, root = folder.resolve(), Path(dataset).resolve()
    inside = root in here.parents
    description = {
        "Name": f"Anomaly detection with {bundle}",
        "BIDSVersion": VERSION,
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": GENERATOR, "Version": __version__, "Description": bundle}],
        "DatasetLinks": {SOURCE: os.path.relpath(root, here) if inside else root.as_uri()},
    }
    _write_once(folder / DESCRIPTION, json.dumps(description, indent=2))
    _write_once(folder / BIDSIGNORE, "\n".join(IGNORED))


def _write_once(path: Path, text: str) -> None:
    if not path.exists():
        with replacing(path) as temporary:
            temporary.write_text(f"{text}\n", encoding="utf-8")


def describe_outputs(bundle: str, sources: Sequence[str]) -> dict[str, dict[str, object]]:
    """The sidecars of a case, by the names of `SIDECARS`.

    sources: BIDS URIs of the images, the first of which has the grid.
    """
    words = {
        "anomaly_map": f"Anomaly map of {bundle}: higher is more abnormal, 0 outside of what was looked at",
        "segmentation": f"Where the anomaly map of {bundle} is above its threshold, without specks",
        "reconstruction": f"Pseudo-healthy image that {bundle} made of the scan, in its units: not a scan",
    }
    shared: dict[str, object] = {"Sources": list(sources), "SpatialReference": sources[0]}
    shared |= {"Resolution": "That of the scan"} if "_res-" in sources[0] else {}  # BIDS wants a word for this entity
    described = {f"{name}.json": {"Description": said, **shared} for name, said in words.items()}
    return described | {"segmentation.json": {"Type": "Lesion", **described["segmentation.json"]}}
