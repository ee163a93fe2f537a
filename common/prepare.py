"""A training cohort, prepared once: what the preprocessing makes of each subject, on disk, as a cohort again."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from monai.data import MetaTensor
from monai.transforms import SpatialResample
from tqdm import tqdm

from .batch import OK, StatusTable
from .data.cohort import cohort_modalities, read_cohort, write_cohort
from .files import replacing
from .report.case import save_nifti
from .transforms.load import load_lesion
from .transforms.pipeline import BrainPreprocessing


def prepare_cohort(cohort: Path, output: Path, spacing_mm: float, register: bool, strip: str | None) -> int:
    """Write each subject's images (float32, brain in (0, 1], else 0), brain and lesion mask, and `cohort.csv` of them.

    Subjects that are there already are kept. The bundles' own preprocessing finds nothing left to do in the result but
    to correct the bias field. Returns how many failed; they are in `status.tsv` and not in the new cohort.
    Raises CohortError or OutputError.
    """
    modalities = cohort_modalities(cohort)
    preprocessing = BrainPreprocessing(
        spacing_mm, percentile=98.0, upper=0.8, canvas=0, channels=len(modalities), register=register, strip=strip
    )
    failed, rows = 0, []
    with StatusTable(output / "status.tsv") as table:
        for item in tqdm(read_cohort(cohort, modalities), unit="subject", disable=None):
            subject, started = str(item["subject"]), time.perf_counter()
            names = [*modalities, "brain", *(["lesion"] if "lesion" in item else [])]
            paths = {name: f"{subject}/{name}.nii.gz" for name in names}
            try:
                if not table.is_ok(subject):
                    volumes = prepare_subject(preprocessing, item)
                    for name, volume in zip(names, volumes, strict=True):
                        with replacing(output / paths[name]) as temporary:
                            save_nifti(volume, volume.affine.numpy(), temporary)
                    table.add(subject, OK, time.perf_counter() - started)
                site = {"site": str(item["site"])} if "site" in item else {}
                rows.append({"subject": subject, "split": item.get("split", ""), **site, **paths})
            except Exception as error:
                failed += 1
                table.add_error(subject, error, time.perf_counter() - started)
    write_cohort(output / "cohort.csv", modalities, rows)
    return failed


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
