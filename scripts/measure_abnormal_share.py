"""Say what the standardisation of tissues and the normalisation of the map do where much of a brain is abnormal.

    python scripts/measure_abnormal_share.py COHORT.csv -m KEY --masks DIR -o OUT.json [--first 2] [--kept DIR]

Into the first healthy test subjects of each site lesions are put that fill 5, 15 and 30 % of the brain: a real mask in
MNI152 space of DIR, another one for each subject, grown or shrunk evenly within its hemisphere, filled as a cavity. The
bias field is corrected and the intensities are scaled again, tissues and map as shipped. Printed: means over the
subjects.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from measure_sites import first_subjects
from monai.data import MetaTensor
from prepared import Brain, Cohort, Kept, Masks, Method, Output, PreparedBrains, spread_masks
from scipy import ndimage
from torch import Tensor

from common.cohorts.synthetic_lesions import InsertLesions
from common.detection.reliability import doubts
from common.errors import one_line
from common.images.mni import template
from common.results.case import versions
from common.transforms.intensity import CorrectBiasFieldd, ScaleIntensityByForegroundd
from common.transforms.load import load_image
from common.transforms.registration import mni_transform, onto
from common.workflows.evaluation import write_result

SHARES = (0.05, 0.15, 0.30)
MEASURES = ("abnormal_share", "tissue_shift", "map_scale", "recall", "share_of_the_rest")


def main(
    cohort: Cohort,
    method: Method,
    masks: Masks,
    output: Output,
    first: Annotated[int, typer.Option(help="So many healthy test subjects of each site.")] = 2,
    kept: Kept = None,
) -> None:
    """Print a line a share, and write each subject's figures as JSON."""

    prepared = PreparedBrains(method, kept)
    items = [i for i in prepared.cohort(cohort) if i["split"] == "test" and "lesion" not in i]
    chosen = list(first_subjects(items, first))
    rows = []
    for item, mask in zip(chosen, spread_masks(masks, len(chosen)), strict=False):
        for row in measured(prepared, prepared(item), mask):
            print(row, flush=True)
            rows.append(row)
    for share in (0.0, *SHARES):
        group = [row for row in rows if row["share"] == share]
        means = {name: np.mean([row[name] for row in group if row[name] is not None] or np.nan) for name in MEASURES}
        unreliable = sum(bool(row["doubts"]) for row in group)
        print(share, {name: round(float(x), 4) for name, x in means.items()}, "unreliable", unreliable)
    about = {"key": method, "weights_sha256": prepared.weights_sha256, "seed": 0, "versions": versions()}
    write_result(about | {"volumes": rows}, output)


def measured(prepared: PreparedBrains, brain: Brain, mask: Path) -> Iterator[dict[str, Any]]:
    """The figures of a brain as it is, and with each lesion."""
    inside = MetaTensor(brain.inside, affine=brain.image.affine)
    to_subject = np.linalg.inv(mni_transform(brain.image, inside))
    healthy = again(prepared, brain.image)
    yield figures(prepared, brain, healthy, healthy["image"].as_tensor(), 0.0, torch.zeros_like(brain.inside))
    for share in SHARES:
        grown, affine = grown_mask(mask, share)
        insert = InsertLesions("chronic_stroke", atlas_mask=grown, atlas_affine=affine, mni_to_subject=to_subject)
        image, lesion = insert(brain.image, inside, subject=brain.subject)
        abnormal = torch.as_tensor(lesion) > 0
        yield figures(prepared, brain, again(prepared, image), healthy["image"].as_tensor(), share, abnormal)


def again(prepared: PreparedBrains, image: Any) -> dict[Any, Any]:
    """Bias field, scale and tissues of an image that was changed, as the preprocessing of the bundle does them."""
    settings = prepared.preprocessing.settings
    data = {"image": MetaTensor(image.as_tensor(), affine=image.affine), "foreground": image > 0}
    data = CorrectBiasFieldd("image", "foreground")(data)
    data = ScaleIntensityByForegroundd("image", "foreground", settings["percentile"], settings["upper"])(data)
    return prepared.standardise(data)


def grown_mask(path: Path, share: float) -> tuple[np.ndarray, np.ndarray]:
    """A lesion mask on the grid of the template, nearest to the one of a file that fills this share of the brain.

    It stays in the hemisphere in which most of it lies. Returned: (H, W, D) and its affine.
    """
    tissue, brain = template()
    affine = np.asarray(tissue.affine)
    inside = brain.as_tensor()[0].numpy() > 0
    mask = onto(load_image(path), (affine, inside.shape)).as_tensor()[0].numpy() >= 0.5
    x = affine[0, 0] * np.arange(inside.shape[0]) + affine[0, 3]
    side = np.sign(x)[:, None, None] == np.sign(np.median(np.broadcast_to(x[:, None, None], mask.shape)[mask]))
    depth = ndimage.distance_transform_edt(mask) - ndimage.distance_transform_edt(~mask)
    depth[~(inside & side)] = -np.inf
    level = np.sort(depth, axis=None)[-round(share * inside.sum())]
    return (depth >= level).astype(np.float32), affine


def figures(
    prepared: PreparedBrains,
    brain: Brain,
    data: dict[Any, Any],
    healthy: Tensor,
    share: float,
    lesion: Tensor,
) -> dict[str, Any]:
    """Of one volume. `tissue_shift`: mean difference of the image beside the lesion from the one without a lesion."""
    image, network = data["image"].as_tensor(), prepared.network
    raw, change = prepared.raw_map(f"abnormal-{share:g}", brain.subject, image)
    anomaly_map, scale = network.normalisation(raw, brain.inside, change)
    above = anomaly_map > float(network.calibration.threshold)
    rest = brain.inside & ~lesion
    signs = {"map_scale": scale, "contrast_order": data["contrast_order"], "vessel_share": data["vessel_share"]}
    modes = [None if np.isnan(mode) else float(mode) for mode in data["tissue_modes"]]
    return {
        "subject": brain.subject,
        "site": brain.site,
        "share": share,
        "abnormal_share": float(lesion.sum() / brain.inside.sum()),
        "tissue_modes": modes,
        "tissue_shift": float((image - healthy)[rest].abs().mean()),
        "map_scale": scale,
        "recall": float(above[lesion].float().mean()) if lesion.any() else None,
        "share_of_the_rest": float(above[rest].float().mean()),
        "doubts": doubts(signs, network.normalisation.scale_quantiles, data["tissue_modes"]),
    }


if __name__ == "__main__":
    typer.run(one_line(main))
