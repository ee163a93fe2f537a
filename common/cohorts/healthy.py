"""Healthy subjects where public data sets lie after they are unpacked, split to train and to validate."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import nibabel as nib
import numpy as np
import typer

from ..errors import CohortError
from .options import DataDir, Output, Seed
from .table import write_cohort

VAL_SHARE = 0.1
FASTMRI_LABELS, FASTMRI_HEALTHY = "Annotations/brain.csv", "Normal for age"
UKB_IMAGE, UKB_LESION = "T2_FLAIR/T2_FLAIR_brain.nii.gz", "T2_FLAIR/lesions/final_mask.nii.gz"
Subjects = Iterator[tuple[str, dict[str, Path]]]  # name, and the file of each column


@dataclass(frozen=True)
class Layout:
    """What is looked for, in words, the modality, and how the subjects are found; some of them have a lesion."""

    expected: str
    modality: str
    find: Callable[[Path], Subjects]


def find_ixi(data: Path) -> Subjects:
    """`IXI012-HH-1211-T1.nii.gz` as downloaded, or `IXI012_T1.nii.gz`."""
    for path in sorted([*data.rglob("IXI*-T1.nii.gz"), *data.rglob("IXI*_T1.nii.gz")]):
        yield path.name[:6], {"T1": path}


def find_fastmri(data: Path) -> Subjects:
    """The volumes that fastMRI+ calls normal for their age, as `<file>.nii.gz` of T1."""
    labels = data / FASTMRI_LABELS
    if not labels.is_file():
        return
    with labels.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    if rows and not {"file", "label"} <= rows[0].keys():
        raise CohortError(labels, "no columns file and label", "take brain.csv of fastMRI+ as it is published")
    said: dict[str, set[str]] = {}
    for row in rows:
        said.setdefault(row["file"], set()).add(row["label"])
    images = {path.name.removesuffix(".nii.gz"): path for path in sorted(data.rglob("*T1*.nii.gz"))}
    for name in sorted(name for name, labels_of in said.items() if labels_of == {FASTMRI_HEALTHY}):
        if name in images:
            yield name, {"T1": images[name]}


def find_ukb(data: Path) -> Subjects:
    """FLAIR of UK Biobank's field 20253 and the mask of its hyperintensities, one folder a participant."""
    for path in sorted(data.glob(f"*/{UKB_IMAGE}")):
        subject = path.parents[1]
        yield subject.name, {"FLAIR": path, "lesion": subject / UKB_LESION}


def find_folders(modality: str) -> Callable[[Path], Subjects]:
    """`<subject>/<modality>.nii.gz`, with `brain.nii.gz` and `lesion.nii.gz` where there are such."""

    def find(data: Path) -> Subjects:
        for path in sorted(data.glob(f"*/{modality}.nii.gz")):
            others = {name: path.with_name(f"{name}.nii.gz") for name in ("brain", "lesion")}
            yield path.parent.name, {modality: path} | {name: p for name, p in others.items() if p.is_file()}

    return find


LAYOUTS = {
    "ixi": Layout("IXI012-HH-1211-T1.nii.gz or IXI012_T1.nii.gz", "T1", find_ixi),
    "fastmri": Layout(f"{FASTMRI_LABELS} of fastMRI+ and <file>.nii.gz of its T1 volumes", "T1", find_fastmri),
    "ukb": Layout(f"<participant>/{UKB_IMAGE} and <participant>/{UKB_LESION}", "FLAIR", find_ukb),
    "ct": Layout("<patient>/CT.nii.gz, with lesion.nii.gz where there is one", "CT", find_folders("CT")),
}


class LayoutName(StrEnum):
    """Keys of `LAYOUTS`."""

    IXI = "ixi"
    FASTMRI = "fastmri"
    UKB = "ukb"
    CT = "ct"


def make_healthy(
    data_dir: DataDir,
    output: Output,
    layout: Annotated[LayoutName, typer.Option(help="IXI, fastMRI+, UK Biobank FLAIR, or CT in folders.")],
    healthy: Annotated[
        int, typer.Option(min=2, help="UK Biobank: how many participants with the smallest lesions count as healthy.")
    ] = 15_000,
    seed: Seed = 0,
) -> None:
    """Healthy subjects to train on, a tenth of them to validate; those with a lesion test.

    Only cohort.csv is written. Of UK Biobank, where everybody has some hyperintensities, the participants with the
    smallest ones are healthy and the others test.
    """
    kind = LAYOUTS[layout.value]
    subjects = dict(kind.find(data_dir))
    if missing := [path for files in subjects.values() for path in files.values() if not path.is_file()]:
        raise CohortError(missing[0], "no such file", f"the layout {layout.value} is {kind.expected}")
    well = (
        lowest(subjects, healthy) if layout is LayoutName.UKB else [s for s in subjects if "lesion" not in subjects[s]]
    )
    if len(well) < 2:
        fact = f"{len(well)} healthy subjects found, of whom one must train and one validate"
        raise CohortError(data_dir, fact, f"the layout {layout.value} is {kind.expected}", layout="ANOTHER")
    kept = set(np.random.default_rng(seed).permutation(sorted(well))[: max(1, round(VAL_SHARE * len(well)))])
    rows = []
    for subject, files in subjects.items():
        is_well = subject in set(well)
        split = ("val" if subject in kept else "train") if is_well else "test"
        paths = {k: os.path.relpath(p, output) for k, p in files.items() if not (is_well and k == "lesion")}
        rows.append({"subject": subject, "split": split, **paths})
    output.mkdir(parents=True, exist_ok=True)
    write_cohort(output / "cohort.csv", [kind.modality], rows)


def lowest(subjects: Mapping[str, Mapping[str, Path]], count: int) -> list[str]:
    """The subjects with the smallest lesions, by volume; all but one at most, so that somebody tests."""
    volumes = {}
    for subject, files in subjects.items():
        mask = nib.Nifti1Image.from_filename(files["lesion"])
        volumes[subject] = float((np.asarray(mask.dataobj) > 0).sum() * np.prod(mask.header.get_zooms()[:3]))
    return sorted(volumes, key=lambda subject: (volumes[subject], subject))[: min(count, len(subjects) - 1)]
