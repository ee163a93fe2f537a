"""Measure steps 1 and 4 of the within-subject normalisation on whole heads: head CT and brain tumours.

    python scripts/measure_heads.py COHORT.csv -m KEY -o OUT.json [--by volume] [--sprites 2] [--maps DIR]

COHORT is what `uad cohort headct-sprites` or `uad cohort glioma` wrote. There is no atlas and no mirrored side: step 1
is the robust z, step 4 the smoothing, and each is also measured alone. `--by slice` takes each slice for a subject of
its own, as slices of head CT are of other people each. Healthy are slices without lesion; of a volume with a lesion
those that are not beside one either. Those of the split `val` give the threshold of each variant.

The choice is to be made by the rows `val`: the healthy share there is that of one half of the subjects with the
threshold of the other, and where no validation subject has a lesion, sprites are drawn into copies of them. The rows
`test` are the figures. `auprc_difference` is to the raw map, in the same resamples. `--maps` keeps the raw maps.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import nibabel as nib
import numpy as np
import torch
import typer
from measure_sites import RAW, SHARE, RawMaps, Volume
from monai.bundle import ConfigParser
from prepared import Cohort, Method, Output, figures
from scipy import ndimage

from common.cohorts.headct_sprites import contaminate, save
from common.cohorts.sprites import DrawSprite
from common.cohorts.table import read_cohort
from common.detection.normalisation import robust_z, smoothed_inside
from common.errors import one_line
from common.metrics import DetectionMetrics
from common.report.benchmark_table import cell
from common.results.case import versions
from common.workflows.calibrate import threshold_of
from common.workflows.evaluation import write_result

RESAMPLES = 300
FIRST_SPRITE_SEED = 100  # the test sets are drawn with 0, 1 and 2
VARIANTS: dict[str, tuple[bool, float]] = {  # whether step 1 is done, and sigma of step 4 in voxels
    RAW: (False, 0.0),
    "4, 0.75 voxel": (False, 0.75),
    "4, 1.5 voxels": (False, 1.5),
    "1": (True, 0.0),
    "1, 4, 0.75 voxel": (True, 0.75),
    "1, 4, 1.5 voxels": (True, 1.5),
}
By = Literal["slice", "volume"]
Subjects = dict[str, Volume]  # by name; map, brain, lesion (1, H, W, D)


def main(
    cohort: Cohort,
    method: Method,
    output: Output,
    by: Annotated[By, typer.Option(help="What a subject is.")] = "slice",
    sprites: Annotated[int, typer.Option(min=0, help="Draws of sprites on validation stacks without lesion.")] = 0,
    maps: Annotated[Path | None, typer.Option(help="Folder of the raw maps.")] = None,
) -> None:
    """Print a line a variant and split, and write all figures as JSON."""
    raw = RawMaps(method, as_learned=False, folder=maps)
    as_shipped = shipped(raw.config)
    if "smoothing_vox" in raw.config:
        raw.config["smoothing_vox"] = 0  # of the network; it is one of the variants here
    items = read_cohort(cohort, raw.config["modalities"])
    found: dict[str, Subjects] = {}
    with tempfile.TemporaryDirectory() as folder:
        validation = [item for item in items if item["split"] == "val"]
        validation += [
            with_sprites(x, n, Path(folder)) for n in range(sprites) for x in validation if "lesion" not in x
        ]
        for split, members in (("val", validation), ("test", [x for x in items if x["split"] == "test"])):
            members = without_stacks(members)
            volumes = {str(item["subject"]): raw(item) for item in members}
            found[split] = subjects_of(volumes, by)
    rows = {name: measure(found, *setting) for name, setting in VARIANTS.items()}
    table: dict[str, Any] = {}
    for name, splits in rows.items():
        table[name] = {split: figures(result, rows[RAW][split]) for split, result in splits.items()}
        for split, row in table[name].items():
            print(name, split, *(f"{key} {cell(value)}" for key, value in row.items()), flush=True)
    about: dict[str, Any] = {"key": method, "by": by, "sprites": sprites, "shipped": as_shipped}
    about["subjects"] = {
        split: {"healthy": len(healthy(of)), "with lesion": len(of) - len(healthy(of))} for split, of in found.items()
    }
    about |= {"weights_sha256": raw.weights_sha256, "seed": 0, "versions": versions()}
    write_result(about | {"variants": table}, output)


def shipped(config: ConfigParser) -> str | None:
    """The variant that a bundle's inference.json does, None where it is not among them."""
    sigma = np.max(config.get("smoothing_vox", 0.0))
    done = config.get("normalisation") is not None, float(sigma)
    return next((name for name, variant in VARIANTS.items() if variant == done), None)


def with_sprites(item: dict[str, Any], draw: int, folder: Path) -> dict[str, Any]:
    """A healthy stack of head CT with a sprite on each slice, as a new item."""
    subject = f"{item['subject']}-sprites{draw}"
    stack = np.asarray(nib.Nifti1Image.from_filename(item["image"]).dataobj).transpose(2, 1, 0)
    names = np.array([f"{item['subject']}-{place}" for place in range(len(stack))])
    drawn, where = contaminate(stack, names, DrawSprite(FIRST_SPRITE_SEED + draw))
    image, lesion = folder / f"{subject}.nii.gz", folder / f"{subject}_lesion.nii.gz"
    save(drawn, image)
    save(where, lesion)
    return item | {"subject": subject, "image": str(image), "lesion": str(lesion)}


def without_stacks(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the healthy stacks of patients whose whole volumes are there too, which hold the same slices."""
    names = {str(item["subject"]) for item in items}
    return [item for item in items if str(item["subject"]).removesuffix("_healthy") not in names - {item["subject"]}]


def subjects_of(volumes: Subjects, by: By) -> Subjects:
    """The healthy part and, where there is a lesion, the whole of each volume; slice by slice where a slice is one."""
    result: Subjects = {}
    for name, volume in volumes.items():
        marked = volume["lesion"][0].flatten(0, 1).any(dim=0).numpy()
        free = ~ndimage.binary_dilation(marked)
        if by == "slice":
            places = {f"{name}/{place}": [place] for place in np.flatnonzero(free | marked).tolist()}
        else:
            places = {f"{name}/healthy": np.flatnonzero(free).tolist()}
            places |= {name: list(range(len(marked)))} if marked.any() else {}
        parts = {part: {key: x[..., at] for key, x in volume.items()} for part, at in places.items() if at}
        result |= {part: values for part, values in parts.items() if values["brain"].any()}
    return result


def healthy(subjects: Subjects) -> Subjects:
    """Those without lesion."""
    return {name: subject for name, subject in subjects.items() if not subject["lesion"].any()}


def measure(found: dict[str, Subjects], z: bool, sigma_vox: float) -> dict[str, dict[str, Any]]:
    """What `DetectionMetrics` says of the splits `val` and `test`."""

    def maps(subjects: Subjects) -> dict[str, np.ndarray]:
        return {name: changed(subject, z, sigma_vox) for name, subject in subjects.items()}

    of_split = {split: maps(subjects) for split, subjects in found.items()}

    def threshold(names: Iterable[str]) -> float:
        """From healthy subjects of the split val."""
        return threshold_of([of_split["val"][n][inside_of(found["val"][n])] for n in names], SHARE)

    well = list(healthy(found["val"]))
    halves = {name: threshold(well[1 - n :: 2]) for n in (0, 1) for name in well[n::2]}
    of_all = threshold(well)
    return {
        "val": evaluated(found["val"], of_split["val"], lambda name: halves.get(name, of_all)),
        "test": evaluated(found["test"], of_split["test"], lambda _: of_all),
    }


def changed(subject: Volume, z: bool, sigma_vox: float) -> np.ndarray:
    """The map of a subject after the steps, (H, W, D); smoothing does nothing along an axis of one voxel."""
    inside = inside_of(subject)
    values = np.where(inside, subject["map"][0].float().numpy(), 0)
    values = robust_z(values, inside)[0] if z else values
    return smoothed_inside(values, inside, sigma_vox) if sigma_vox > 0 else values


def inside_of(subject: Volume) -> np.ndarray:
    """The head, (H, W, D) bool."""
    return subject["brain"][0].numpy()


def evaluated(subjects: Subjects, maps: dict[str, np.ndarray], threshold: Callable[[str], float]) -> dict[str, Any]:
    """Metrics over subjects by their maps, each with a threshold."""
    metrics = DetectionMetrics()
    for name, subject in subjects.items():
        lesion = subject["lesion"][0] if subject["lesion"].any() else None
        metrics.update(name, torch.from_numpy(maps[name]).clamp(min=0), lesion, subject["brain"][0], threshold(name))
    return metrics.compute(n_bootstrap=RESAMPLES)


if __name__ == "__main__":
    typer.run(one_line(main))
