"""The brain within a T1 of a head, by the package deepbet, whose weights are checked before they are loaded."""

from __future__ import annotations

import hashlib
import importlib
import io
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor

from ..errors import SkullStripError
from ..images.check import source_name

INSTALL = "pip install deepbet==1.0.2"
# of that version; a TorchScript file is code. The wheel puts them into a folder `data` beside the package, a name that
# other packages may use too
SHA256 = {
    "model.pt": "de8ee7c69654d0dd3935dc4a5d84571d8ecf4637a6bfc01df399c4c2bc86e0fd",
    "bbox_model.pt": "39a7b2b5f799faa1391ea97bfcdc0b9299f20d84f2316a4ff8918dc4685e40aa",
}


def deepbet_brain_mask(image: MetaTensor) -> MetaTensor:
    """Find the brain of a head by deepbet (Fisch et al., 2024), if it is installed. It is made for T1.

    It runs on the CPU and asks no network; the number of threads changed no voxel of the heads that were tried.

    image: (C, H, W, D), of which the first channel counts. Returns (1, H, W, D) bool on its grid. Raises
    SkullStripError where deepbet is missing, its weights are others, or it finds no brain.
    """
    name = source_name(image)
    try:
        library = importlib.import_module("deepbet")
    except ImportError as error:
        raise SkullStripError(name, f"deepbet does not import ({error})", INSTALL, strip="atlas") from error
    models = Path(library.__file__ or "").parents[1] / "data" / "models"
    networks = {file: io.BytesIO(_checked(models / file)) for file in SHA256}
    # it reads what it is given as `torch.jit.load` does, so that the bytes that were checked are those that run
    extraction = library.BrainExtraction(True, networks["model.pt"], networks["bbox_model.pt"])
    head = nib.Nifti1Image(image.as_tensor()[0].cpu().float().numpy(), np.asarray(image.affine, dtype=float))
    try:
        mask = np.asarray(extraction.run(head)[1].dataobj) > 0
    except (AssertionError, RuntimeError, ValueError) as error:  # it looks for the largest region where there is none
        said = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise SkullStripError(
            name, f"deepbet failed ({said})", "check that it is a T1 of a head", strip="atlas"
        ) from error
    return MetaTensor(torch.from_numpy(mask)[None], meta=dict(image.meta))


def _checked(path: Path) -> bytes:
    """The content of a file of weights of deepbet, if it is the one that is known. Raises SkullStripError."""
    advice = f"install it again ({INSTALL})"
    try:
        content = path.read_bytes()
    except OSError as error:
        fact = f"the weights of deepbet cannot be read ({error.strerror})"
        raise SkullStripError(path, fact, advice, strip="atlas") from error
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256[path.name]:
        fact = f"not the weights of deepbet 1.0.2 (sha256 {found[:12]}, not {SHA256[path.name][:12]})"
        raise SkullStripError(path, fact, advice, strip="atlas")
    return content
