"""What the interactive viewer of a report shows: scan, reconstruction and map, small enough to lie in the page."""

from __future__ import annotations

import base64
import gzip
import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from numpy.typing import NDArray
from scipy import ndimage
from torch.nn import functional as F

from ..errors import ResultError, UADError
from ..results.read import AGAIN, CaseFiles
from ..transforms.load import load_image
from ..weights import digest

STATIC = Path(__file__).parent / "static"
# dist/niivue.umd.js of the npm package @niivue/niivue, as published (BSD-2-Clause, static/NIIVUE_LICENSE)
NIIVUE_VERSION = "0.69.0"
NIIVUE_SHA256 = "47b896b77ec4a5be3ef1949c33ad393b6f45629921f326c279000bcf51bdb4af"

MARGIN_VOXELS = 4
MAX_VOXELS = 8_000_000  # a brain at 1 mm has 4 million in its box; more are averaged, so that a page stays below 15 MB

Array = NDArray[np.float32]


@cache
def niivue() -> str:
    """The source of NiiVue. Raises ResultError where it is not the pinned one."""
    source = (STATIC / "niivue.umd.js").read_bytes()
    if hashlib.sha256(source).hexdigest() != NIIVUE_SHA256:
        raise ResultError(STATIC / "niivue.umd.js", f"not NiiVue {NIIVUE_VERSION}", "install the package again")
    return source.decode()


def viewer_data(files: CaseFiles, run: dict[str, Any], scan: Path | None = None) -> dict[str, Any]:
    """Volumes for the page: `volumes`, each NIfTI, uint8, gzip, base64 with a window; the map is the last.

    They are cropped to where the map was sought; what is finer than a page can hold is averaged over blocks of voxels
    (`spacing_mm` says what came of it). `has_scan` is False where the scan is not at hand.

    Args:
        run: its record; names the scan and its digest.
        scan: where the scan is now, if not where it was.
    Raises ResultError, and UADError where the given scan cannot be read.
    """
    anomaly_map, affine = _read(files.path("anomaly_map.nii.gz"))
    reconstruction, _ = _read(files.path("reconstruction.nii.gz"))
    if anomaly_map.shape != reconstruction.shape:
        raise ResultError(files.folder, "map and reconstruction are on different grids", AGAIN)
    foreground = (anomaly_map > 0) | (reconstruction != 0)
    image = find_scan(files, run, anomaly_map.shape, affine, scan)
    layers = {"scan": image, "reconstruction": reconstruction, "map": anomaly_map}
    box, affine = crop_box(foreground, affine)
    inside = foreground[box]
    top = _window_top(reconstruction[box] if image is None else image[box], inside)
    volumes = []
    for name, volume in layers.items():
        if volume is not None:
            values, small_affine = shrink(volume[box], affine)
            if name != "map":
                values = np.clip(values, -top, 1.25 * top)  # one bright voxel must not cost all the steps of uint8
            window = (0.0, 3 * float(run["threshold"]) if name == "map" else top)
            volumes.append({"name": name, "base64": encode(values, small_affine), "window": window})
    peak = int(np.argmax(anomaly_map[box]))
    spacing_mm = np.linalg.norm(small_affine[:3, :3], axis=0)
    return {
        "volumes": volumes,
        "has_scan": image is not None,
        "threshold": float(run["threshold"]),
        "highest": float(anomaly_map.max()),
        "peak_mm": nib.affines.apply_affine(affine, np.unravel_index(peak, anomaly_map[box].shape)).tolist(),
        "voxel_ml": float(np.prod(spacing_mm)) / 1000,
        "spacing_mm": [round(float(size), 2) for size in spacing_mm],
    }


def find_scan(
    files: CaseFiles, run: dict[str, Any], shape: tuple[int, ...], affine: NDArray[Any], scan: Path | None
) -> Array | None:
    """The scan of a case (H, W, D), the first of several modalities; None where it is not at hand.

    Raises UADError where a scan was given and is not the one of this case.
    """
    path = scan or Path(str(run.get("image", "")))
    if scan is None and not ("image" in run and path.exists()):
        return None
    settings = run["settings"]
    try:
        image = load_image(path, settings.get("series"))
        is_other = settings.get("channels", 1) == 1 and digest(path) != run["input_sha256"].get("image")
        if is_other or image.shape[1:] != shape or not np.allclose(image.affine, affine, atol=1e-3):
            raise ResultError(path, f"not the scan of {files.name}", "give the one that uad detect had")
    except UADError:
        if scan is not None:
            raise
        return None  # what lies there now is another file, or none that can be read
    return np.asarray(image.as_tensor()[0].numpy(), dtype=np.float32)


def crop_box(foreground: NDArray[np.bool_], affine: NDArray[Any]) -> tuple[tuple[slice, ...], NDArray[Any]]:
    """Slices of the box around a mask, with a margin, and the affine of what they cut out."""
    found = ndimage.find_objects(foreground.astype(np.uint8))
    whole = tuple(slice(0, size) for size in foreground.shape)
    box = tuple(
        slice(max(0, side.start - MARGIN_VOXELS), min(size, side.stop + MARGIN_VOXELS))
        for side, size in zip(found[0] if found else whole, foreground.shape, strict=True)
    )
    return box, affine @ nib.affines.from_matvec(np.eye(3), [side.start for side in box])


def shrink(volume: Array, affine: NDArray[Any], max_voxels: int = MAX_VOXELS) -> tuple[Array, NDArray[Any]]:
    """Average pairs of voxels along the finest axis until a volume is small enough; its values and its affine."""
    while volume.size > max_voxels:
        axis = int(np.argmin(np.linalg.norm(affine[:3, :3], axis=0)))
        kernel = [2 if other == axis else 1 for other in range(3)]
        volume = F.avg_pool3d(torch.from_numpy(np.ascontiguousarray(volume))[None], kernel)[0].numpy()
        affine = affine @ nib.affines.from_matvec(np.diag(np.array(kernel, dtype=float)), (np.array(kernel) - 1) / 2)
    return volume, affine


def encode(values: Array, affine: NDArray[Any]) -> str:
    """A volume (H, W, D) as NIfTI in 255 steps from its lowest to its highest value, compressed; the same each time."""
    image = nib.Nifti1Image(np.asarray(values, dtype=np.float32), affine)
    image.set_data_dtype(np.uint8)
    image.header.set_xyzt_units("mm")
    return base64.b64encode(gzip.compress(image.to_bytes(), mtime=0)).decode()


def _read(path: Path) -> tuple[Array, NDArray[Any]]:
    """The first volume of a result (H, W, D) and its affine. Raises ResultError."""
    try:
        image: MetaTensor = load_image(path)
    except UADError as error:
        raise ResultError(path, error.fact, AGAIN) from error
    return np.asarray(image.as_tensor()[0].numpy(), dtype=np.float32), np.asarray(image.affine, dtype=float)


def _window_top(image: Array, foreground: NDArray[np.bool_]) -> float:
    """Of a window from 0, as in the preview, so that both look alike; never an empty one."""
    values = image[foreground] if foreground.any() else image
    top = float(np.percentile(values.astype(np.float64), 99.5))
    return top if top > 0 else 1.0
