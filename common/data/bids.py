"""Brain Imaging Data Structure: the scans of a dataset, and results as a derivative dataset (BIDS 1.10)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from .. import __version__
from ..errors import CohortError
from ..files import replacing

# suffix of each modality, and whether its file names tell of a contrast agent (entity `ce`)
MODALITIES = {"T1": ("T1w", False), "T1CE": ("T1w", True), "T2": ("T2w", False), "FLAIR": ("FLAIR", False)}


def is_bids(folder: Path) -> bool:
    """Whether a folder is the root of a dataset."""
    return (folder / "dataset_description.json").is_file() and any(folder.glob("sub-*"))


def find_scans(root: Path, modalities: Sequence[str], participants: Sequence[str] = ()) -> list[dict[str, object]]:
    """A datalist: for one modality every scan of it, for several one item a session.

    `derivative` is where the results of an item belong in a derivative dataset, a path to be continued with
    `_desc-....`. A session without one of several modalities is an item whose image will not be found.
    Raises CohortError where a participant or all scans are missing, or a session has two scans of a modality.
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


def _items(root: Path, subject: Path, modalities: Sequence[str]) -> Iterator[dict[str, object]]:
    for anat in sorted([*subject.glob("anat"), *subject.glob("ses-*/anat")]):
        scans = {modality: _scans(anat, modality) for modality in modalities}
        prefix = "_".join(anat.relative_to(root).parts[:-1])
        if len(modalities) == 1:
            for path in scans[modalities[0]]:
                yield _item(root, anat, path.name.split(".")[0].rpartition("_")[0], str(path))
        elif any(scans.values()):
            if twice := [modality for modality, paths in scans.items() if len(paths) > 1]:
                raise CohortError(anat, f"several scans of {', '.join(twice)}", "choose them in a cohort CSV")
            paths = [scans[m][0] if scans[m] else anat / f"{prefix}_{MODALITIES[m][0]}.nii.gz" for m in modalities]
            yield _item(root, anat, prefix, [str(path) for path in paths])


def _scans(anat: Path, modality: str) -> list[Path]:
    suffix, contrast = MODALITIES.get(modality, (modality, False))
    paths = sorted(path for path in anat.glob(f"*_{suffix}.nii*") if not path.name.startswith("."))
    return [path for path in paths if ("_ce-" in path.name) is contrast]


def _item(root: Path, anat: Path, entities: str, image: str | list[str]) -> dict[str, object]:
    return {"subject": entities, "image": image, "derivative": (anat.relative_to(root) / entities).as_posix()}


def write_description(folder: Path, bundle: str) -> None:
    """Write `dataset_description.json` of a derivative dataset, made by a bundle, if there is none yet."""
    path = folder / "dataset_description.json"
    if path.exists():
        return
    description = {
        "Name": f"Anomaly detection with {bundle}",
        "BIDSVersion": "1.10.0",
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "uad-bundles", "Version": __version__, "Description": bundle}],
    }
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
