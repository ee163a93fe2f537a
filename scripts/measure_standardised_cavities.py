"""Say what ways of standardising tissues do to healthy tissue where a cavity fills 5, 15 and 30 % of the brain.

    pip install intensity-normalization
    python scripts/measure_standardised_cavities.py COHORT.csv -m KEY --masks DIR -o OUT.json [--kept DIR]

COHORT and ways as for `measure_standardisation.py`, the lesions as for `measure_abnormal_share.py`, but that the bias
field is not corrected again. Printed: by way and share the mean difference of the tissue beside the lesion from the
same tissue without it, and the mean intensity of the cavity.
"""

from __future__ import annotations

import numpy as np
import torch
import typer
from measure_abnormal_share import SHARES, grown_mask
from measure_standardisation import AS_LEARNED, FLAT, OWN, Way, changed, flat_way, library_way, own_way
from monai.data import MetaTensor
from prepared import Brain, Cohort, Kept, Masks, Method, Output, PreparedBrains, spread_masks
from torch import Tensor

from common.cohorts.synthetic_lesions import InsertLesions
from common.errors import one_line
from common.results.case import versions
from common.transforms.intensity import ScaleIntensityByForegroundd
from common.workflows.evaluation import write_result

WAYS = (AS_LEARNED, OWN, "nyul", FLAT)


def main(cohort: Cohort, method: Method, masks: Masks, output: Output, kept: Kept = None) -> None:
    """Print a line a way and share, and write each subject's figures as JSON."""

    prepared = PreparedBrains(method, kept)
    brains = [prepared(item) for item in prepared.cohort(cohort) if "lesion" not in item]
    healthy = [brain for brain in brains if brain.split == "val" and brain.site == brains[0].site]
    tested = [brain for brain in brains if brain.split == "test"]
    chosen = spread_masks(masks, len(tested))
    given: dict[str, Way] = {AS_LEARNED: lambda image: image, OWN: own_way(prepared), FLAT: flat_way(healthy)}
    ways = {name: given.get(name) or library_way(name, healthy) for name in WAYS}
    rows = []
    for share in SHARES:
        cavities = [
            with_cavity(prepared, brain, *grown_mask(mask, share)) for brain, mask in zip(tested, chosen, strict=False)
        ]
        for name, way in ways.items():
            here = [row(way, before, after, lesion) for before, after, lesion in cavities]
            rows += [
                {"way": name, "share": share, "subject": b.subject} | r for b, r in zip(tested, here, strict=False)
            ]
            print(name, share, {key: round(float(np.mean([r[key] for r in here])), 3) for key in here[0]}, flush=True)
    write_result({"seed": 0, "versions": versions(), "volumes": rows}, output)


def with_cavity(
    prepared: PreparedBrains, brain: Brain, mask: np.ndarray, affine: np.ndarray
) -> tuple[Brain, Brain, Tensor]:
    """A brain, the same with a cavity and scaled again, and the cavity (1, H, W, D) bool."""
    settings = prepared.preprocessing.settings
    inside = MetaTensor(brain.inside, affine=brain.image.affine)
    insert = InsertLesions("chronic_stroke", atlas_mask=mask, atlas_affine=affine)
    image, lesion = insert(brain.image, inside, subject=brain.subject)
    scale = ScaleIntensityByForegroundd("image", "foreground", settings["percentile"], settings["upper"])
    scaled = scale({"image": MetaTensor(torch.as_tensor(image), affine=brain.image.affine), "foreground": inside})
    after = Brain(brain.subject, brain.site, brain.split, scaled["image"], brain.lesion)
    return brain, after, torch.as_tensor(lesion) > 0


def row(way: Way, before: Brain, after: Brain, lesion: Tensor) -> dict[str, float]:
    """Of one volume."""
    (healthy, _), (image, _) = changed(way, before), changed(way, after)
    rest = before.inside & ~lesion
    return {
        "tissue_shift": float((image - healthy)[rest].abs().mean()),
        "cavity": float(image[lesion].mean()),
        "tissue_there_before": float(healthy[lesion].mean()),
    }


if __name__ == "__main__":
    typer.run(one_line(main))
