"""Healthy adults of one scanner (T1) by the recorded split, with simulated lesions in the test subjects.

The lesions are for evaluation only: training rows are untouched.
"""

from __future__ import annotations

import csv
import operator
import os
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import nibabel as nib
import numpy as np
import typer

from ..errors import CohortError
from ..files import replacing
from ..outputs import Inputs
from ..progress import Progress
from ..transforms.brain import BrainMaskd
from ..transforms.intensity import CorrectBiasFieldd
from ..transforms.load import LoadImageCheckedd, read_affine
from ..transforms.registration import mni_transform
from ..transforms.strip import Strip
from .mni_lesions import KINDS as MNI_KINDS
from .mni_lesions import atlas_ml
from .options import DataDir, Output, Seed
from .synthetic_lesions import InsertLesionsd
from .table import write_cohort

STRIPPED = "stripped"  # what `BrainMaskd` says of an image whose foreground is the brain


@dataclass(frozen=True)
class Site:
    """Where one data set comes from: its recorded split, `<name>_split.csv`, and the names of its images."""

    name: str
    title: str
    patterns: tuple[str, ...]  # with {subject}
    examples: str

    @property
    def split(self) -> Path:
        """CSV with the columns subject, split, T1."""
        return Path(__file__).with_name(f"{self.name}_split.csv")


IXI = Site(
    "ixi",
    "IXI",
    ("{subject}_T1.nii*", "{subject}-*-T1.nii*"),
    "IXI012-HH-1211-T1.nii.gz or IXI012_T1.nii.gz",
)
NOVOSIBIRSK = Site(
    "novosibirsk",
    "Novosibirsk (OpenNeuro ds002748)",
    ("{subject}_T1.nii*", "{subject}_T1w.nii*", "{subject}/anat/{subject}_T1w.nii*"),
    "sub-04/anat/sub-04_T1w.nii.gz or sub-04_T1.nii.gz",
)


class Lesions(StrEnum):
    """Kinds of simulated lesions, see `common.cohorts.synthetic_lesions`."""

    CHRONIC_STROKE = "chronic_stroke"
    ACUTE_STROKE = "acute_stroke"
    ATLAS = "atlas"
    BLOBS = "blobs"
    TEXTURE = "texture"
    DEFORMATION = "deformation"


class InsertInto(StrEnum):
    """Splits that may get lesions."""

    TEST = "test"
    VAL = "val"


def _masks_of(kind: str) -> Any:
    return typer.Option(help=f"Lesion mask in MNI152 space, or folder of them, for --lesions {kind}; may be repeated.")


def lesion_cohort(site: Site) -> Callable[..., None]:
    """The command that makes the cohort of a site."""

    def make(
        data_dir: DataDir,
        output: Output,
        lesions: Annotated[list[Lesions], typer.Option(help="May be repeated: a row each.")] = [Lesions.BLOBS],  # noqa: B006
        chronic_stroke: Annotated[list[Path] | None, _masks_of("chronic_stroke")] = None,
        acute_stroke: Annotated[list[Path] | None, _masks_of("acute_stroke")] = None,
        atlas: Annotated[list[Path] | None, _masks_of("atlas")] = None,
        min_ml: Annotated[float, typer.Option(min=0.0, help="Leave out masks smaller than this, in MNI152.")] = 0.0,
        strip: Annotated[Strip | None, typer.Option(help="Find the brain in images of heads, as downloaded.")] = None,
        seed: Seed = 0,
        insert_into: Annotated[InsertInto, typer.Option(help="The split that gets lesions.")] = InsertInto.TEST,
    ) -> None:
        given = {"chronic_stroke": chronic_stroke, "acute_stroke": acute_stroke, "atlas": atlas}
        subjects = list(find_subjects(site, data_dir))
        if not subjects:
            fact = f"no image of the recorded split, such as {site.examples}"
            raise CohortError(data_dir, fact, f"see docs/data.md for where {site.title} is obtained")
        masks = {kind: find_masks(kind, given[kind], min_ml) if kind in MNI_KINDS else [] for kind in lesions}
        output.mkdir(parents=True, exist_ok=True)
        rows = []
        with Progress(len(subjects), "subject") as progress:
            for subject, split, path in progress.each(subjects, operator.itemgetter(0)):
                image = os.path.relpath(path, output)
                row = {"subject": subject, "split": split, "site": site.name, "T1": image, "brain": "", "lesion": ""}
                if strip is not None:
                    row["brain"] = write_brain(path, output / f"{subject}_brain.nii.gz", strip)
                rows.append(row)
                if split == insert_into:
                    made = insert(path, output, row["brain"], subject, masks, seed)
                    rows += [{**row, "subject": f"{subject}-{kind}", **files} for kind, files in made.items()]
        write_cohort(output / "cohort.csv", ["T1"], rows)

    make.__doc__ = f"""{site.title} T1 ({site.examples}) with simulated lesions.

    Subjects of the recorded split that are not in DATA_DIR are left out. Written: cohort.csv; with --strip a brain mask
    of each subject, kept if it is there; <subject>-<lesions>_{{T1,lesion}}.nii.gz.
    """
    return make


def find_masks(kind: str, given: list[Path] | None, min_ml: float) -> list[str]:
    """The lesion masks among files and folders that are not smaller than `min_ml`, in one order. Raises CohortError."""
    if not given:
        masks = {kind: "MASK_OR_FOLDER"}
        raise CohortError(kind, "needs lesion masks in MNI152 space", "choose other lesions", **masks)
    files: list[str] = []
    for path in given:
        found = sorted(map(str, path.glob("*.nii*"))) if path.is_dir() else [str(path)] * path.is_file()
        if not found:
            raise CohortError(path, "no such lesion mask or folder of masks (*.nii, *.nii.gz)", "check its name")
        files += found
    large = [file for file in files if atlas_ml(file) >= min_ml]
    if not large:
        fact = f"none of {len(files)} lesion masks has {min_ml:g} ml"
        raise CohortError(given[0], fact, "give larger masks", min_ml="0")
    return large


def find_subjects(site: Site, data_dir: Path) -> Iterator[tuple[str, str, Path]]:
    """Subject, split and T1 image of each subject of the recorded split that is in a folder; says how many are not."""
    with site.split.open(newline="", encoding="utf-8") as file:
        split = list(csv.DictReader(file))
    missing = 0
    for row in split:
        names = (pattern.format(subject=row["subject"]) for pattern in site.patterns)
        found = sorted(path for name in names for path in data_dir.glob(name))
        if found:
            yield row["subject"], row["split"], found[0]
        missing += not found
    if missing:
        print(f"{missing} of {len(split)} subjects of the recorded split are not in {data_dir}", file=sys.stderr)


def write_brain(path: Path, mask: Path, strip: Strip) -> str:
    """Write the brain mask of an image and return its name; none, and "", of an image that is stripped."""
    if not mask.is_file():
        item = BrainMaskd("image", "brain", strip.value)(LoadImageCheckedd("image")({"image": str(path)}))
        if item["brain_source"] == STRIPPED:
            return ""
        save(item["brain"].numpy()[0].astype("uint8"), path, mask)
    return mask.name


def insert(
    path: Path, output: Path, brain: str, subject: str, masks: Mapping[Lesions, list[str]], seed: int
) -> dict[str, dict[str, str]]:
    """Write an image with each kind of lesions, and their masks; return the cells of the row of each kind.

    The lesions are put into the image without its bias field, which is multiplied back: they are as bright as tissue
    may be in the image that a method sees, and do not stand out in it.
    """
    given: dict[Hashable, Any] = {"image": str(path)}
    if brain:
        given["brain"] = str(output / brain)
    loaded = BrainMaskd("image")(LoadImageCheckedd(("image", "brain"), allow_missing_keys=True)(given))
    corrected = CorrectBiasFieldd("image", "brain")(loaded)
    to_subject = None
    if any(masks.values()):
        to_subject = np.linalg.inv(mni_transform(corrected["image"], corrected["brain"]))
    cells = {}
    for kind, of_kind in masks.items():
        name = f"{subject}-{kind}"
        settings: dict[str, Any] = {"seed": seed, "atlas_mask": of_kind, "mni_to_subject": to_subject}
        transform = InsertLesionsd(brain_key="brain", subject_key="subject", kind=kind.value, **settings)
        item = transform({**corrected, "subject": name})
        change = (item["image"] - corrected["image"]) * corrected["bias_field"]  # 0 where there is no lesion
        cells[kind.value] = {"T1": f"{name}_T1.nii.gz", "lesion": f"{name}_lesion.nii.gz"}
        Inputs([path, *(of_kind or ())]).check(output / file for file in cells[kind.value].values())
        save((loaded["image"] + change).numpy()[0].astype("float32"), path, output / cells[kind.value]["T1"])
        save(item["lesion"].numpy()[0].astype("uint8"), path, output / cells[kind.value]["lesion"])
    return cells


def save(volume: Any, like: Path, path: Path) -> None:
    """Write a volume on the grid of an image."""
    with replacing(path) as temporary:
        nib.save(nib.Nifti1Image(volume, read_affine(like)), temporary)
