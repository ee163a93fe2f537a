"""Compare boxes around the brain with an affine registration to MNI152, for the healthy atlas and for the mirror plane.

    python scripts/measure_alignment.py COHORT.csv -m KEY -o OUT.json [--masks-only] [--kept DIR]

COHORT as for `measure_sites.py`. All four combinations do steps 1 to 4 of the normalisation with its shipped settings
on the same raw maps; atlas and threshold of each are fitted on the healthy subjects of the split `val`. Printed: a line
a combination and site; beside the figures the AUPRC minus that of boxes alone, in the same resamples, and the seconds
of one core a case. `--masks-only` registers the masks of the brains and leaves their intensities out.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Annotated, Any
from unittest.mock import patch

import numpy as np
import torch
import typer
from measure_sites import SHARE
from monai.data import MetaTensor
from prepared import Brain, Cohort, Kept, Method, Output, PreparedBrains, evaluated, figures
from scipy import ndimage
from torch import Tensor

from common.detection.normalisation import (
    ATLAS_SIGMA_VOX,
    MIRROR_SIGMA_VOX,
    TOLERANCE_VOX,
    WithinSubjectNormalisation,
    from_atlas,
    mean_of,
    minus_mirrored,
    robust_z,
    smoothed_inside,
    to_atlas,
)
from common.errors import one_line
from common.report.benchmark_table import cell
from common.results.case import versions
from common.transforms import registration
from common.transforms.registration import mni_grid
from common.workflows.calibrate import threshold_of
from common.workflows.evaluation import write_result

BOX, AFFINE = "boxes", "affine"
FINE_MM, COARSE_MM = 2.0, 4.0  # an atlas is smoothed at the one and kept at the other, as that of boxes
MIRROR = np.diag([-1.0, 1.0, 1.0, 1.0])  # left to right in MNI152


@dataclass
class Case:
    """A brain with its map in robust units, (H, W, D), and where its voxels lie in MNI152, (4, 4) to mm."""

    brain: Brain
    z: np.ndarray
    inside: np.ndarray
    to_mni: np.ndarray
    seconds: float  # of the registration


def main(
    cohort: Cohort,
    method: Method,
    output: Output,
    masks_only: Annotated[bool, typer.Option("--masks-only", help="Register without the intensities.")] = False,
    kept: Kept = None,
) -> None:
    """Print a line a combination and site, and write all figures as JSON."""

    prepared = PreparedBrains(method, kept)
    cases = [case_of(prepared, item, masks_only) for item in prepared.cohort(cohort)]
    settings = prepared.network.normalisation
    results, seconds = {}, {}
    for atlas_by in (BOX, AFFINE):
        for mirror_by in (BOX, AFFINE):
            name = f"atlas {atlas_by}, mirror {mirror_by}"
            results[name], seconds[name] = measure(cases, settings, atlas_by, mirror_by)
    rows: dict[str, Any] = {}
    for name, sites in results.items():
        first = results[f"atlas {BOX}, mirror {BOX}"]
        rows[name] = {site: figures(result, first[site]) for site, result in sites.items()}
        rows[name]["seconds"] = seconds[name]
        for site, row in rows[name].items():
            print(name, site, row if site == "seconds" else {key: cell(value) for key, value in row.items()})
    about = {"key": method, "calibrated_on": sum(case.brain.split == "val" for case in cases)}
    about |= {"weights_sha256": prepared.weights_sha256, "seed": 0, "versions": versions()}
    write_result(about | {"combinations": rows}, output)


def case_of(prepared: PreparedBrains, item: dict[str, Any], masks_only: bool = False) -> Case:
    """With the registration of the image that the network sees."""
    brain = prepared(item)
    image = prepared.standardise({"image": brain.image})["image"]
    inside = brain.inside[0].numpy()
    anomaly_map, _ = prepared.raw_map("standardised", brain.subject, image)
    z, _ = robust_z(anomaly_map[0].numpy(), inside)

    def register() -> tuple[Tensor, float]:
        started = time.process_time()
        estimate = masks_transform if masks_only else registration.mni_transform
        to_mni = estimate(image, MetaTensor(brain.inside, affine=image.affine))
        return torch.from_numpy(to_mni @ np.asarray(image.affine)), time.process_time() - started

    to_mni, seconds = prepared.kept("registered-masks" if masks_only else "registered", brain.subject, register)
    return Case(brain, z, inside, to_mni.numpy(), seconds)


def masks_transform(image: MetaTensor, brain: MetaTensor) -> np.ndarray:
    """`mni_transform` without its last step, which compares intensities."""
    register = registration.register

    def of_masks(*images: Any, information: bool = True, **settings: Any) -> float:
        return 0.0 if information else register(*images, information=False, **settings)

    with patch.object(registration, "register", of_masks):
        return registration.mni_transform(image, brain)


def measure(
    cases: list[Case], settings: WithinSubjectNormalisation, atlas_by: str, mirror_by: str
) -> tuple[dict[str, Any], float]:
    """Results by site, and the mean seconds of one core a case."""
    healthy = [case for case in cases if case.brain.split == "val"]
    sums = {case.brain.subject: to_common(case, atlas_by) for case in healthy}
    total, count = (torch.stack(parts).sum(dim=0) for parts in zip(*sums.values(), strict=True))

    def normalised(case: Case, own: tuple[Tensor, Tensor]) -> np.ndarray:
        expected = from_common(mean_of(total - own[0], count - own[1]).half().float(), case, atlas_by)
        compared = np.where(case.inside, case.z - expected, 0)
        if mirror_by == BOX:
            compared = minus_mirrored(compared, case.inside, settings.contralateral_weight)
        else:
            compared = minus_mirrored_in_mni(compared, case, settings.contralateral_weight)
        return smoothed_inside(compared, case.inside, settings.smoothing_vox)

    values = [normalised(case, sums[case.brain.subject])[case.inside] for case in healthy]  # the atlas of the others
    threshold = threshold_of(values, SHARE)
    nothing = torch.zeros_like(total), torch.zeros_like(count)
    tested = [case for case in cases if case.brain.split == "test"]
    started = time.process_time()
    pairs = [(case.brain, torch.from_numpy(normalised(case, nothing))[None]) for case in tested]
    seconds = (time.process_time() - started) / len(tested)
    if AFFINE in (atlas_by, mirror_by):
        seconds += float(np.mean([case.seconds for case in tested]))
    return evaluated(pairs, threshold), seconds


def to_common(case: Case, by: str) -> tuple[Tensor, Tensor]:
    """What a healthy brain adds to the atlas: the sums of z and of brains there."""
    parts = [torch.from_numpy(x.astype(np.float32)) for x in (case.z, case.inside)]
    if by == BOX:
        total, count = (to_atlas(part[None], torch.from_numpy(case.inside)[None])[0] for part in parts)
        return total, count
    fine, shape = mni_grid(FINE_MM)
    coarse, coarse_shape = mni_grid(COARSE_MM)
    there = np.linalg.inv(case.to_mni) @ fine
    smoothed = [ndimage.gaussian_filter(moved(part.numpy(), there, shape), ATLAS_SIGMA_VOX) for part in parts]
    total, count = (torch.from_numpy(moved(x, np.linalg.inv(fine) @ coarse, coarse_shape)) for x in smoothed)
    return total, count


def from_common(atlas: Tensor, case: Case, by: str) -> np.ndarray:
    """The atlas at the voxels of a brain, (H, W, D)."""
    if by == BOX:
        return from_atlas(atlas[None], torch.from_numpy(case.inside)[None])[0].numpy()
    return moved(atlas.numpy(), np.linalg.inv(mni_grid(COARSE_MM)[0]) @ case.to_mni, case.z.shape)


def minus_mirrored_in_mni(values: np.ndarray, case: Case, weight: float) -> np.ndarray:
    """Step 3 of the normalisation, with the plane x = 0 of MNI152 in place of the middle of the brain's box."""
    mirrored = moved(values, np.linalg.inv(case.to_mni) @ MIRROR @ case.to_mni, values.shape)
    mirrored = ndimage.gaussian_filter(ndimage.grey_dilation(mirrored, TOLERANCE_VOX), MIRROR_SIGMA_VOX)
    return np.where(case.inside, values - weight * np.maximum(mirrored, 0), 0)


def moved(volume: np.ndarray, matrix: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A volume at matrix @ voxel of a grid of this shape, linearly, 0 beyond it; matrix (4, 4), voxel to voxel."""
    result = ndimage.affine_transform(volume, matrix, output_shape=shape, order=1, mode="grid-constant")
    return np.asarray(result, dtype=np.float32)


if __name__ == "__main__":
    typer.run(one_line(main))
