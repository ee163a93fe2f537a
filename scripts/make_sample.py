"""Make the sample that the project ships: the MNI152 template with simulated lesions.

    python scripts/make_sample.py

Writes `mni152_lesions_T1.nii.gz`, `mni152_lesions_mask.nii.gz` and `LICENSE` to `common/cohorts/sample`. The template
is the one inside nilearn: nothing is downloaded. The same versions of numpy, scipy and zlib write the same bytes.
Whole heads are made by `make_head_samples.py`.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Annotated

import nibabel as nib
import numpy as np
import typer
from nilearn.datasets import load_mni152_template
from scipy import ndimage

from common.cohorts.synthetic_lesions import InsertLesions

ROOT = Path(__file__).resolve().parents[1]
MARGIN = 2  # voxels around the brain

# Chosen by eye: three hypo-intense and two hyper-intense blobs of 1.8 to 6.6 ml, well apart, 1.1 % of the brain.
SEED = 142
HYPER_LIMIT = 1.15  # of white matter: a little brighter than any healthy tissue, to be seen at once

LICENSE = """\
mni152_lesions_T1.nii.gz and mni152_lesions_mask.nii.gz are made from the ICBM 152 nonlinear symmetric template, version
2009a, as carried by nilearn (skull-stripped T1, 1 mm). Changes by this project (scripts/make_sample.py): averaged to
2 mm, cropped, and lesions added. THE LESIONS ARE SIMULATED: no patient has them. The changes are under the same terms.

head_lesions_CT.nii.gz, head_lesions_T1.nii.gz, head_lesions_FLAIR.nii.gz, head_lesions_T1CE.nii.gz and their masks are
made from the same template (scripts/make_head_samples.py): its brain, given the grey values of these images, in a skull
and a scalp that are drawn. NEITHER THE HEADS NOR THE LESIONS ARE THOSE OF A PATIENT. Under the same terms.

Copyright (C) 1993-2004 Louis Collins, McConnell Brain Imaging Centre, Montreal Neurological Institute, McGill
University. Permission to use, copy, modify, and distribute this software and its documentation for any purpose and
without fee is hereby granted, provided that the above copyright notice appear in all copies. The authors and McGill
University make no representations about the suitability of this software for any purpose. It is provided "as is"
without express or implied warranty. The authors are not responsible for any data loss, equipment damage, property
loss, or injury to subjects or patients resulting from the use or misuse of this software package.

References: Fonov et al., Unbiased average age-appropriate atlases for pediatric studies, NeuroImage 54 (2011) 313-327,
doi:10.1016/j.neuroimage.2010.07.033; Fonov et al., Unbiased nonlinear average age-appropriate brain templates from
birth to adulthood, NeuroImage 47 (2009) S102, doi:10.1016/S1053-8119(09)70884-5.
"""


def make_sample(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder.")] = ROOT / "common" / "cohorts" / "sample",
) -> None:
    """Write image (int16, background 0, brain > 0), lesion mask (uint8) and licence to a folder."""
    template, affine = template_2mm()
    insert = InsertLesions("blobs", SEED, count=(5, 5), hyper_limit=HYPER_LIMIT)
    image, mask = insert(template[None], template[None] > 0, affine)
    image = np.maximum(np.rint(image[0]), template > 0)  # a hypo-intense lesion stays in the brain
    output.mkdir(parents=True, exist_ok=True)
    write(output / "mni152_lesions_T1.nii.gz", nifti(image.astype(np.int16), affine))
    write(output / "mni152_lesions_mask.nii.gz", nifti(np.asarray(mask[0], np.uint8), affine))
    write(output / "LICENSE", LICENSE.encode())


def template_2mm() -> tuple[np.ndarray, np.ndarray]:
    """The skull-stripped template, cropped to the brain: (H, W, D) float32 in [0, 255], affine (4, 4) of 2 mm RAS."""
    file = load_mni152_template(resolution=1)
    fine = np.rint(file.get_fdata() * 255)  # nilearn scales the stored integers to [0, 1]
    fine = np.pad(fine, [(0, size % 2) for size in fine.shape])
    # Means of 2 x 2 x 2 integers are exact on every machine; a spline is not, and would ring at the brain's edge.
    blocks = fine.reshape(fine.shape[0] // 2, 2, fine.shape[1] // 2, 2, fine.shape[2] // 2, 2)
    coarse = blocks.mean(axis=(1, 3, 5)) * ((blocks > 0).mean(axis=(1, 3, 5)) >= 0.5)
    box = ndimage.find_objects((coarse > 0).astype(np.uint8))[0]
    start = np.array([side.start - MARGIN for side in box])
    to_fine = nib.affines.from_matvec(np.diag([2.0, 2.0, 2.0]), 2 * start + 0.5)  # the middle of a block
    return np.pad(coarse[box], MARGIN).astype(np.float32), file.affine @ to_fine


def nifti(volume: np.ndarray, affine: np.ndarray) -> bytes:
    """A compressed file in MNI152 space, the same bytes every time."""
    image = nib.Nifti1Image(volume, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code="mni")
    image.set_qform(affine, code="mni")
    return gzip.compress(image.to_bytes(), compresslevel=9, mtime=0)


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(path.name + ".part")  # an interrupted run leaves no half file under the final name
    part.write_bytes(content)
    part.replace(path)


if __name__ == "__main__":
    typer.run(make_sample)
