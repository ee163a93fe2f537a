"""Patients with annotated lesions, where public data sets lie after they are unpacked; nothing is copied."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..errors import CohortError
from .options import DataDir, Output
from .table import write_cohort


@dataclass(frozen=True)
class Layout:
    """Where the masks are, as a glob, and what to write in their path for the `mask` part to get the others."""

    glob: str
    mask: str
    modalities: Mapping[str, str]
    brain: str = ""


LAYOUTS = {
    "brats": Layout("**/*_seg.nii*", "_seg.", {"T1": "_t1.", "T1CE": "_t1ce.", "T2": "_t2.", "FLAIR": "_flair."}),
    "atlas2": Layout("**/*_label-L_desc-T1lesion_mask.nii*", "_label-L_desc-T1lesion_mask.", {"T1": "_T1w."}),
    "mslub": Layout(
        "**/*consensus_gt.nii*",
        "consensus_gt.",
        {"T1": "T1W.", "T2": "T2W.", "FLAIR": "FLAIR."},
        brain="brainmask.",
    ),
    # label 2 of its masks, other pathology, is a lesion here: it is not healthy either
    "wmh": Layout("**/wmh.nii*", "wmh.", {"T1": "pre/T1.", "FLAIR": "pre/FLAIR."}),
}


class LayoutName(StrEnum):
    """Keys of `LAYOUTS`."""

    BRATS = "brats"
    ATLAS2 = "atlas2"
    MSLUB = "mslub"
    WMH = "wmh"


def make_patients(
    data_dir: DataDir,
    output: Output,
    layout: Annotated[LayoutName, typer.Option(help="BraTS 2020 or 2021; ATLAS 2.0; Ljubljana MS; WMH challenge.")],
) -> None:
    """Patients of BraTS, ATLAS 2.0, the Ljubljana MS lesions (MSLUB) or the WMH challenge, all in the split test.

    Only cohort.csv is written. A patient who lacks a modality is refused.
    """
    where = LAYOUTS[layout.value]
    masks = sorted(data_dir.glob(where.glob))
    if not masks:
        fact = f"no lesion masks {where.glob.removeprefix('**/')}"
        advice = f"the layout {layout.value} has {', '.join(where.modalities)} beside each, see docs/data.md"
        raise CohortError(data_dir, fact, advice, layout="ANOTHER")
    rows = []
    for mask in masks:
        named = {**where.modalities, **({"brain": where.brain} if where.brain else {})}
        files = {name: mask.parent / mask.name.replace(where.mask, part) for name, part in named.items()}
        rows.append(
            {
                "subject": "-".join(mask.parent.relative_to(data_dir).parts) or mask.name.split(".")[0],
                "split": "test",
                **{name: os.path.relpath(find(file), output) for name, file in {**files, "lesion": mask}.items()},
            }
        )
    write_cohort(output / "cohort.csv", list(where.modalities), rows)


def find(path: Path) -> Path:
    """The file, compressed or not. Raises CohortError."""
    plain = path.with_name(path.name.removesuffix(".gz"))
    for file in (path, plain, plain.with_name(f"{plain.name}.gz")):
        if file.is_file():
            return file
    raise CohortError(path, "no such file beside the lesion mask", "complete the data set", layout="ANOTHER")
