"""Make the samples of whole heads that the project ships: the MNI152 template in a drawn skull, with simulated lesions.

    python scripts/make_head_samples.py

Writes to `common/cohorts/sample`: a windowed CT, `head_lesions_CT.nii.gz` (64 x 64 slices, air at 25), with
`head_lesions_CT_mask.nii.gz`; and an MR of a tumour, `head_lesions_{T1,FLAIR,T1CE}.nii.gz` (128 x 128 slices), with
`head_lesions_mask.nii.gz`. The template is the one inside nilearn: nothing is downloaded. Around its brain layers are
drawn (CSF, bone, scalp), its intensities give the tissues. The same versions of numpy, scipy and zlib write the same
bytes; `make_sample.py` writes the licence.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import nibabel as nib
import numpy as np
import typer
from make_sample import ROOT, nifti, template_2mm, write
from numpy.typing import NDArray
from scipy import ndimage

from common.cohorts.synthetic_lesions import InsertLesions

Array = NDArray[Any]

SIZE = 128  # of the 2 mm slices
DEPTH = 60  # slices of 2 mm, from the temporal lobes to the vertex
ABOVE = 6  # of them above the brain
CT_BLOCK, MR_BLOCK = (2, 2, 3), (1, 1, 3)  # voxels of 2 mm in a voxel of the sample: 20 slices of 6 mm
CLOSING_MM = 24.0  # the cavity of the skull is smooth at this radius
SOFT_MM = 2.0  # over which one layer becomes the next
OUTER_MM = {"csf": 2.0, "inner table": 4.0, "marrow": 6.5, "outer table": 8.5, "skin": 10.5, "scalp": 15.0}  # surfaces

T1_LEVELS = (50.0, 100.0, 165.0, 218.0)  # of the template: CSF, its rim, grey and white matter
CT_LEVELS = (48.0, 85.0, 118.0, 108.0)  # of the same, in grey values of MedNIST
AIR, CSF_RIM, BONE, SKIN = 25.0, 70.0, 420.0, 70.0  # CT; bone is cut at 255 later, hence its thick look
HARDENING, HARDENING_MM = 35.0, 6.0  # brain beside bone is brighter
MR_LEVELS = {  # of the same tissues; bone, marrow, scalp; tumour, its rim and its cyst, in grey values of 0 to 255
    "T1": ((30.0, 50.0, 96.0, 120.0), (14.0, 45.0, 215.0), (62.0, 62.0, 34.0)),
    "FLAIR": ((28.0, 60.0, 118.0, 102.0), (12.0, 30.0, 160.0), (190.0, 190.0, 36.0)),
    "T1CE": ((30.0, 55.0, 100.0, 118.0), (14.0, 48.0, 205.0), (60.0, 215.0, 34.0)),
}
NOISE_CT, NOISE_MR = 5.0, 3.0  # standard deviation in the head

# Chosen by eye: two bleedings and two infarcts of 6 to 22 ml; a tumour of 42 ml in one hemisphere, with a cyst. Some
# of each is darker than healthy tissue and some brighter, so that a threshold of the intensity does not find it.
SEED_CT, SEED_MR, SEED_NOISE = 9, 7, 0
RADIUS_CT_MM, RADIUS_MR_MM, RIM_MM, CYST_MM = (11.0, 16.0), (21.0, 21.0), 3.5, 5.0


def make_head_samples(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder.")] = ROOT / "common" / "cohorts" / "sample",
) -> None:
    """Write images and lesion masks (uint8) to a folder."""
    brain, depth_mm, affine = head_2mm()
    output.mkdir(parents=True, exist_ok=True)
    for make, block in ((ct, CT_BLOCK), (mr, MR_BLOCK)):
        for name, volume in make(brain, depth_mm, affine).items():
            write(output / f"head_lesions_{name}.nii.gz", nifti(volume, thick(affine, block)))


def head_2mm() -> tuple[Array, Array, Array]:
    """The template in a field of view of a head, 0 outside the brain; depth below the cavity's surface; affine.

    Both (128, 128, 60); the depth in mm is negative outside.
    """
    template, affine = template_2mm()
    margin = [(size // 2, size - size // 2) for size in (SIZE - template.shape[0], SIZE - template.shape[1])]
    margin.append((int(CLOSING_MM), int(CLOSING_MM)))  # a layer drawn at the edge would be cut
    padded = np.pad(template, margin)
    depth_mm = signed_depth_mm(closed(padded > 0))
    stop = int(np.flatnonzero(padded.any(axis=(0, 1)))[-1]) + 1 + ABOVE
    start = [margin[0][0], margin[1][0], margin[2][0] - (stop - DEPTH)]
    moved = affine @ nib.affines.from_matvec(np.eye(3), -np.array(start))
    return padded[..., stop - DEPTH : stop], depth_mm[..., stop - DEPTH : stop], moved


def closed(mask: Array) -> Array:
    """Morphological closing with a ball: what a skull encloses."""
    reach = CLOSING_MM / 2
    dilated = ndimage.distance_transform_edt(~mask) <= reach
    return ndimage.distance_transform_edt(dilated) > reach


def signed_depth_mm(mask: Array) -> Array:
    """Distance to the surface of a mask on the 2 mm grid, positive inside."""
    inside, outside = ndimage.distance_transform_edt(mask), ndimage.distance_transform_edt(~mask)
    return 2 * np.where(mask, inside - 0.5, 0.5 - outside)


def ct(brain: Array, depth_mm: Array, affine: Array) -> dict[str, Array]:
    """`CT` and `CT_mask`, (64, 64, 20)."""
    tissue = np.interp(brain, T1_LEVELS, CT_LEVELS).astype(np.float32) * (brain > 0)
    changes = {"hypo": (0.3, 0.4), "hyper": (1.8, 2.0), "hyper_limit": 2.0}
    insert = InsertLesions("blobs", SEED_CT, count=(4, 4), radius_mm=RADIUS_CT_MM, **changes)
    tissue, mask = (volume[0] for volume in insert(tissue[None], brain[None] > 0, affine))
    image = np.full(brain.shape, AIR)
    for layer, value in {"skin": SKIN, "outer table": BONE, "csf": CSF_RIM}.items():
        cover(image, value, depth_mm + OUTER_MM[layer])
    image = np.where(brain > 0, tissue, image)
    inside = depth_mm > -OUTER_MM["csf"]
    image += HARDENING * np.exp(-np.maximum(depth_mm, 0) / HARDENING_MM) * inside
    return finish({"CT": image}, {"CT_mask": mask}, depth_mm > -OUTER_MM["outer table"], CT_BLOCK, NOISE_CT)


def mr(brain: Array, depth_mm: Array, affine: Array) -> dict[str, Array]:
    """`T1`, `FLAIR`, `T1CE` and `mask`, (128, 128, 20)."""
    insert = InsertLesions("blobs", SEED_MR, count=(1, 1), radius_mm=RADIUS_MR_MM, hyper_share=0)
    mask = insert(brain[None], brain[None] > 0, affine)[1][0] > 0
    below_mm = signed_depth_mm(mask)
    rim = np.exp(-(((below_mm - RIM_MM) / 1.5) ** 2))
    images = {}
    for name, (levels, (bone, marrow, scalp), (tumour, enhanced, cyst)) in MR_LEVELS.items():
        image = np.zeros(brain.shape)
        layers = {"scalp": scalp, "outer table": bone, "marrow": marrow, "inner table": bone, "csf": levels[0]}
        for layer, value in layers.items():
            cover(image, value, depth_mm + OUTER_MM[layer])
        image = np.where(brain > 0, np.interp(brain, T1_LEVELS, levels), image)
        cover(image, tumour + rim * (enhanced - tumour), below_mm, soft_mm=4.0)
        cover(image, cyst, below_mm - CYST_MM)
        images[name] = image
    return finish(images, {"mask": mask}, depth_mm > -OUTER_MM["scalp"], MR_BLOCK, NOISE_MR)


def cover(image: Array, value: Array | float, depth_mm: Array, soft_mm: float = SOFT_MM) -> None:
    """Paint over what lies below a surface."""
    image += np.clip(0.5 + depth_mm / soft_mm, 0, 1) * (value - image)


def finish(
    images: dict[str, Array], masks: dict[str, Array], head: Array, block: tuple[int, int, int], noise: float
) -> dict[str, Array]:
    """Thick slices, noise in the head, uint8; of masks what fills half a voxel."""
    random = np.random.RandomState(SEED_NOISE)  # its stream is the same in every numpy
    grain = means(head, block) > 0.5
    result = {}
    for name, image in images.items():
        coarse = means(np.rint(image), block)
        coarse = np.rint(coarse + random.normal(scale=noise, size=coarse.shape) * grain)
        result[name] = np.clip(coarse, 0, 255).astype(np.uint8)
    return result | {name: (means(mask > 0, block) >= 0.5).astype(np.uint8) for name, mask in masks.items()}


def means(volume: Array, block: tuple[int, int, int]) -> Array:
    """Means of blocks of voxels; those of integers are exact on every machine."""
    (h, w, d), (a, b, c) = volume.shape, block
    return volume.reshape(h // a, a, w // b, b, d // c, c).mean(axis=(1, 3, 5))


def thick(affine: Array, block: tuple[int, int, int]) -> Array:
    """The affine of `means`."""
    return affine @ nib.affines.from_matvec(np.diag(block), (np.array(block) - 1) / 2)


if __name__ == "__main__":
    typer.run(make_head_samples)
