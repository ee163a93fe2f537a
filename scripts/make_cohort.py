"""Make a cohort CSV of the recorded split: healthy train and val subjects, test subjects healthy and with lesions.

    python scripts/make_cohort.py IMAGES OUT [--kinds blobs --kinds atlas --atlas MASK ...]

IMAGES holds the files named in ixi_split.csv (IXI T1, skull-stripped, 2 mm). The simulated lesions are inserted on each
test subject's own grid; they are for evaluation only, training rows are untouched.
"""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Annotated

import nibabel as nib
import typer

from common.files import replacing
from common.transforms.brain import BrainMaskd
from common.transforms.load import LoadImageCheckedd
from common.transforms.synthetic_lesions import InsertLesionsd

SPLIT = Path(__file__).with_name("ixi_split.csv")
COLUMNS = ("subject", "split", "T1", "lesion")


def main(
    images: Annotated[Path, typer.Argument(help="Folder of the healthy volumes.")],
    output: Annotated[Path, typer.Argument(help="Folder for cohort.csv and the volumes with lesions.")],
    kinds: Annotated[list[str], typer.Option(help="blobs, atlas, texture, deformation.")] = ["blobs"],  # noqa: B006
    atlas: Annotated[list[Path], typer.Option(help="Lesion masks in MNI space, for the kind atlas.")] = [],  # noqa: B006
    seed: Annotated[int, typer.Option(help="Same seed, same lesions.")] = 0,
    insert_into: Annotated[str, typer.Option(help="The split that gets lesions.")] = "test",
) -> None:
    """Write OUT/cohort.csv and OUT/<subject>-<kind>_{T1,lesion}.nii.gz."""
    output.mkdir(parents=True, exist_ok=True)
    with SPLIT.open(newline="", encoding="utf-8") as file:
        split = list(csv.DictReader(file))
    rows = []
    for row in split:
        path = images / row["T1"]
        relative = os.path.relpath(path, output)
        rows.append({"subject": row["subject"], "split": row["split"], "T1": relative, "lesion": ""})
        for kind in kinds if row["split"] == insert_into else ():
            name = f"{row['subject']}-{kind}"
            insert(path, output, name, kind, [str(p) for p in atlas] or None, seed)
            files = {"T1": f"{name}_T1.nii.gz", "lesion": f"{name}_lesion.nii.gz"}
            rows.append({"subject": name, "split": row["split"], **files})
    with replacing(output / "cohort.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def insert(path: Path, output: Path, name: str, kind: str, atlas: list[str] | None, seed: int) -> None:
    """Write one volume with lesions and their mask."""
    item = BrainMaskd("image")(LoadImageCheckedd("image")({"image": str(path), "subject": name}))
    item = InsertLesionsd(brain_key="brain", subject_key="subject", kind=kind, seed=seed, atlas_mask=atlas)(item)
    affine = nib.load(path).affine
    for key, suffix, dtype in (("image", "T1", "float32"), ("lesion", "lesion", "uint8")):
        with replacing(output / f"{name}_{suffix}.nii.gz") as temporary:
            nib.save(nib.Nifti1Image(item[key].numpy()[0].astype(dtype), affine), temporary)


if __name__ == "__main__":
    typer.run(main)
