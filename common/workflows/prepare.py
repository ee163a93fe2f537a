"""A training cohort, prepared once: what the preprocessing makes of each subject, on disk, as a cohort again."""

from __future__ import annotations

import time
from collections.abc import Mapping
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
from .batch import OK, StatusTable, claimed, read_status


def prepare_cohort(cohort: Path, output: Path, spacing_mm: float, register: bool, strip: str | None) -> int:
    """Write each subject's images (float32, brain in (0, 1], else 0), brain and lesion mask, and `cohort.csv` of them.

    Subjects that are there already are kept. The bundles' own preprocessing finds nothing left to do in the result but
    to correct the bias field. Returns how many failed; they are in `status.tsv` and not in the new cohort.
    Raises CohortError or OutputError.
    """
    modalities, table_path = cohort_modalities(cohort), output / "status.tsv"
    items = read_cohort(cohort, modalities)
    paths = {str(item["subject"]): prepared_files(item, modalities) for item in items}
    check_output(cohort, output, [name for files in paths.values() for name in files.values()])
    preprocessing = BrainPreprocessing(
        spacing_mm, percentile=98.0, upper=0.8, canvas=0, channels=len(modalities), register=register, strip=strip
    )
    failed = set()
    with StatusTable(table_path) as table, Progress(len(items), "subject") as progress:
        for item in progress.each(claimed(output, items), lambda item: str(item["subject"])):
            subject, started = str(item["subject"]), time.perf_counter()
            files = [output / name for name in paths[subject].values()]
            try:
                if not (table.is_done(subject) and all(file.is_file() for file in files)):
                    for file, volume in zip(files, prepare_subject(preprocessing, item), strict=True):
                        discard_partial(file.parent, file.name)
                        with replacing(file) as temporary:
                            save_nifti(volume, volume.affine.numpy(), temporary)
                    table.add(subject, OK, time.perf_counter() - started)
            except Exception as error:
                failed.add(subject)
                table.add_error(subject, error, time.perf_counter() - started)
    columns = ("subject", "split", *(["site"] if any("site" in item for item in items) else []))
    rows = [{column: str(item.get(column, "")) for column in columns} for item in items]
    prepared = [row | paths[row["subject"]] for row in rows if row["subject"] not in failed]
    write_cohort(output / "cohort.csv", modalities, prepared)
    return len(failed)


def prepared_files(item: Mapping[str, Any], modalities: list[str]) -> dict[str, str]:
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
