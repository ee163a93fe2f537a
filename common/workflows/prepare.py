"""A training cohort, prepared once: what the preprocessing makes of each subject, on disk, as a cohort again."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from monai.data import MetaTensor
from monai.transforms import SpatialResample

from ..cohorts.table import cohort_files, cohort_modalities, read_cohort, write_cohort
from ..files import discard_partial, replacing
from ..outputs import RECORD, Inputs, check_file
from ..progress import Progress
from ..results.case import save_nifti
from ..transforms.load import load_lesion
from ..transforms.pipeline import BrainPreprocessing
from .batch import CaseDone, StatusTable, claimed, failure_of, is_done, read_status


@dataclass(frozen=True)
class Preparation:
    """How a cohort is prepared, and where it goes: all that a process needs to do a subject.

    output: folder of the prepared cohort. modalities: of the images. spacing_mm, register, strip: see
    `BrainPreprocessing`.
    """

    output: Path
    modalities: Sequence[str]
    spacing_mm: float
    register: bool
    strip: str | None

    @functools.cached_property
    def preprocessing(self) -> BrainPreprocessing:
        """Of every subject."""
        return BrainPreprocessing(
            self.spacing_mm,
            percentile=98.0,
            upper=0.8,
            canvas=0,
            channels=len(self.modalities),
            register=self.register,
            strip=self.strip,
        )

    def run(self, item: Mapping[str, Any]) -> CaseDone:
        """Prepare a subject unless it is there already; what is wrong with it is said in the result."""
        subject, started = str(item["subject"]), time.perf_counter()
        files = [self.output / name for name in prepared_files(item, self.modalities).values()]
        try:
            if all(file.is_file() for file in files) and self.is_done(subject):
                return CaseDone(subject, 0, {}, was_there=True)
            for file, volume in zip(files, prepare_subject(self.preprocessing, item), strict=True):
                discard_partial(file.parent, file.name)
                with replacing(file) as temporary:
                    save_nifti(volume, volume.affine.numpy(), temporary)
            return CaseDone(subject, time.perf_counter() - started, {})
        except Exception as error:
            return CaseDone(subject, time.perf_counter() - started, {}, failure=failure_of(subject, error))

    def is_done(self, subject: str) -> bool:
        """Whether the table says that the subject was written; it is read again only where what was read does not."""
        if not is_done(self._rows, subject):
            self._rows.update(read_status(self.table_path))
        return is_done(self._rows, subject)

    @functools.cached_property
    def _rows(self) -> dict[str, tuple[str, ...]]:
        return {}

    @property
    def table_path(self) -> Path:
        """What became of each subject."""
        return self.output / "status.tsv"

    def write(self, outcomes: Iterable[CaseDone], items: Sequence[Mapping[str, Any]]) -> int:
        """Write the status of each subject as it comes, and at the end `cohort.csv` of those that went well.

        Returns how many did not. Raises OutputError.
        """
        failed = set()
        with StatusTable(self.table_path) as table:
            for done in outcomes:
                failed |= {done.case} if done.failure is not None else set()
                table.add_case(done)
        columns = ("subject", "split", *(["site"] if any("site" in item for item in items) else []))
        rows = [
            {column: str(item.get(column, "")) for column in columns} | prepared_files(item, self.modalities)
            for item in items
            if str(item["subject"]) not in failed
        ]
        write_cohort(self.output / "cohort.csv", self.modalities, rows)
        return len(failed)


def preparation_of(
    cohort: Path, output: Path, spacing_mm: float, register: bool, strip: str | None
) -> tuple[Preparation, list[dict[str, object]]]:
    """How a cohort will be prepared, and its subjects, as a datalist. Raises CohortError or OutputError."""
    modalities = cohort_modalities(cohort)
    items = read_cohort(cohort, modalities)
    check_output(cohort, output, [name for item in items for name in prepared_files(item, modalities).values()])
    return Preparation(output, modalities, spacing_mm, register, strip), items


def prepare_cohort(cohort: Path, output: Path, spacing_mm: float, register: bool, strip: str | None) -> int:
    """Write each subject's images (float32, brain in (0, 1], else 0), brain and lesion mask, and `cohort.csv` of them.

    Subjects that are there already are kept. The bundles' own preprocessing finds nothing left to do in the result but
    to correct the bias field. Returns how many failed; they are in `status.tsv` and not in the new cohort.
    Raises CohortError or OutputError.
    """
    preparation, items = preparation_of(cohort, output, spacing_mm, register, strip)
    with Progress(len(items), "subject") as progress:
        each = progress.each(claimed(output, items, dict), lambda item: str(item["subject"]))
        return preparation.write(map(preparation.run, each), items)


def prepared_files(item: Mapping[str, Any], modalities: Sequence[str]) -> dict[str, str]:
    """Where the images and masks of a subject are written, by column, below the folder of the prepared cohort."""
    names = [*modalities, "brain", *(["lesion"] if "lesion" in item else [])]
    return {name: f"{item['subject']}/{name}.nii.gz" for name in names}


def check_output(cohort: Path, output: Path, names: list[str]) -> None:
    """Raises OutputError where something of the cohort would be written over, or what no earlier run has left."""
    files = [output / name for name in ("status.tsv", "cohort.csv", *names)]
    Inputs(cohort_files(cohort)).check(files)
    read_status(files[0])
    for file in files[1:]:
        is_ours = files[0].is_file() and not (file.parent / RECORD).exists()  # the status, and no result of uad detect
        check_file(file, is_ours, "of an earlier run of uad prepare")


def prepare_subject(preprocessing: BrainPreprocessing, item: Mapping[str, Any]) -> list[MetaTensor]:
    """Each modality, the brain and, where there is one, the lesion mask, all (1, H, W, D) on one grid."""
    prepared = cast(dict[str, Any], preprocessing(item))
    image: MetaTensor = prepared["image"]
    brain = MetaTensor((image.as_tensor() > 0).any(dim=0, keepdim=True).to(torch.uint8), affine=image.affine)
    volumes = [*(MetaTensor(channel[None], affine=image.affine) for channel in image.as_tensor()), brain]
    if "lesion" in item:
        lesion = load_lesion(item["lesion"], prepared["brain"])
        if "to_mni" in prepared:
            lesion.affine = torch.as_tensor(prepared["to_mni"]) @ lesion.affine
        moved = SpatialResample(mode="nearest")(lesion, dst_affine=image.affine, spatial_size=image.shape[1:])
        volumes.append(MetaTensor(torch.as_tensor(moved > 0).to(torch.uint8), affine=image.affine))
    return volumes
