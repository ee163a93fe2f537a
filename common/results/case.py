"""The outputs of one case: NIfTI on the input's own grid, lesions as a table, a record of the run, and a picture."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from isal import igzip
from monai.data import MetaTensor
from scipy import ndimage

from .. import __version__
from ..detection.calibration import origin_in_words
from ..errors import DicomError
from ..files import partial_folder
from ..images.check import voxel_volume_ml
from ..images.dicom import Series
from ..outputs import BIDS_NAMES, RECORD, SIDECARS, check_case_folder, put_in_place
from ..transforms.registration import write_tfm
from .dicom import save_dicom
from .preview import save_preview
from .quality import quality

MANY_TIMES, DEFAULT_HEALTHY_SHARE = 10, 0.01  # of a healthy brain above the threshold, from where a warning is due


@dataclass(frozen=True)
class Case:
    """One volume and what was found, (C, H, W, D) or (1, H, W, D) on the input's own grid; images in its own units."""

    subject: str
    image: MetaTensor
    brain: MetaTensor
    anomaly_map: MetaTensor
    reconstruction: MetaTensor
    segmentation: MetaTensor
    to_mni: np.ndarray | None = None  # (4, 4), world of the input to MNI152
    find_series: Callable[[], Series] | None = None  # of the input, where DICOM results are wanted; raises DicomError

    @property
    def affine(self) -> np.ndarray:
        """Voxel to world (RAS, mm), exactly the input's."""
        return np.asarray(self.image.affine, dtype=np.float64)


def versions() -> dict[str, str]:
    """What a result was made with: this project and the packages that numbers depend on."""
    return {"uad-bundles": __version__} | {name: version(name) for name in ("torch", "monai", "numpy", "nibabel")}


def record_path(folder: Path, entities: str | None = None) -> Path:
    """Where the run.json of a case is, which is written last; see `case_place`."""
    return folder / (RECORD if entities is None else f"{entities}_{BIDS_NAMES[RECORD]}")


def write_case(
    folder: Path,
    entities: str | None,
    case: Case,
    result: Mapping[str, Any],
    run: Mapping[str, Any],
    sidecars: Mapping[str, Mapping[str, Any]] | None = None,
) -> DicomError | None:
    """Write the files of a case; an earlier result of it is replaced.

    anomaly_map.nii.gz (float32, raw), segmentation.nii.gz (uint8), reconstruction.nii.gz (float32, input's units),
    lesions.csv, run.json, preview.png; to_mni.tfm where the case was registered, segmentation.dcm and anomaly_map.dcm
    where they are wanted. If these cannot be made, the others are written, with the reason among the warnings of
    run.json, and the error is returned. The folder appears whole or not at all. With `entities`
    (`sub-01_ses-1_desc-dae`) the files get the names of a BIDS derivative in a folder that is shared with other scans,
    whole files, run.json last, and with them `sidecars`, JSON by the names of `SIDECARS`.
    Raises OutputError where the folder holds anything else than an earlier result of the case.
    """
    with partial_folder(folder.parent, entities or folder.name) as partial:
        failure = write_files(partial, case, result, run)
        if entities is None:
            check_case_folder(folder, case.subject, str(run["bundle"]))
            put_in_place(partial, folder)
        else:
            record_path(folder, entities).unlink(missing_ok=True)
            folder.mkdir(exist_ok=True)
            for name, content in (sidecars or {}).items():
                (partial / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            for path in sorted(partial.iterdir(), key=lambda path: path.name == RECORD):
                path.replace(folder / f"{entities}_{(BIDS_NAMES | SIDECARS)[path.name]}")
    return failure


def write_files(folder: Path, case: Case, result: Mapping[str, Any], run: Mapping[str, Any]) -> DicomError | None:
    """Write the files of a case into a folder; returns why there are no DICOM objects among them if they are wanted."""
    for name in ("anomaly_map", "reconstruction", "segmentation"):
        save_nifti(getattr(case, name), case.affine, folder / f"{name}.nii.gz")
    lesions = find_lesions(case)
    save_lesions(lesions, folder / "lesions.csv")
    if case.to_mni is not None:
        write_tfm(case.to_mni, folder / "to_mni.tfm")
    failure = None
    if case.find_series is not None:
        try:
            maker = str(run["bundle"]), versions()["uad-bundles"], result["threshold"], run["weights_sha256"]
            save_dicom(case, case.find_series(), folder, *maker)
        except DicomError as error:
            failure = error
    origin = origin_in_words(result["threshold_origin"])
    title = f"{run['bundle']}, status: {result['reliability']}\nthreshold {result['threshold']:.3g}, {origin}"
    save_preview(case, result["threshold"], folder / "preview.png", result["doubts"], title)
    record = case_record(case, result, run, lesions)
    record["warnings"] += [str(failure)] if failure else []
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return failure


def as_nifti(volume: MetaTensor, affine: np.ndarray) -> nib.Nifti1Image:
    """(C, H, W, D), of one channel as 3D, with a fresh header: nothing of the patient is copied."""
    values = volume.as_tensor().cpu().numpy()
    nifti = nib.Nifti1Image(values[0] if len(values) == 1 else np.moveaxis(values, 0, -1), affine)
    nifti.header.set_xyzt_units("mm")
    return nifti


def save_nifti(volume: MetaTensor, affine: np.ndarray, path: Path) -> None:
    """Write `as_nifti`: compressed where the path ends in .gz, by a program ten times faster than Python's own."""
    content = as_nifti(volume, affine).to_bytes()
    path.write_bytes(igzip.compress(content, compresslevel=1, mtime=0) if path.suffix == ".gz" else content)


def find_lesions(case: Case) -> list[dict[str, float]]:
    """Connected components of the segmentation, largest first: volume, centroid in RAS mm, map's mean and maximum."""
    mask = case.segmentation.as_tensor()[0].cpu().numpy() > 0
    values = case.anomaly_map.as_tensor()[0].cpu().numpy()
    labels, count = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    places = np.nonzero(mask)
    numbers, found = labels[places] - 1, values[places]
    sizes = np.bincount(numbers, minlength=count)
    volumes = sizes * voxel_volume_ml(case.image)
    sums = [np.bincount(numbers, weights=weights, minlength=count) for weights in (*places, found)]
    *centroids, means = np.array(sums) / sizes
    world = np.stack(centroids, axis=1) @ case.affine[:3, :3].T + case.affine[:3, 3]
    maxima = np.full(count, -np.inf)
    np.maximum.at(maxima, numbers, found)
    return [
        {
            "volume_ml": round(float(volumes[i]), 4),
            "x_mm": round(float(world[i, 0]), 2),
            "y_mm": round(float(world[i, 1]), 2),
            "z_mm": round(float(world[i, 2]), 2),
            "mean_map": round(float(means[i]), 6),
            "max_map": round(float(maxima[i]), 6),
        }
        for i in np.argsort(-volumes, kind="stable")
    ]


def save_lesions(lesions: list[dict[str, float]], path: Path) -> None:
    """Write the table, with its header even where nothing was found."""
    columns = ["lesion", "volume_ml", "x_mm", "y_mm", "z_mm", "mean_map", "max_map"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(numbered(lesions))


def numbered(lesions: list[dict[str, float]]) -> list[dict[str, float]]:
    """The rows of lesions.csv."""
    return [{"lesion": number, **lesion} for number, lesion in enumerate(lesions, 1)]


def case_record(
    case: Case, result: Mapping[str, Any], run: Mapping[str, Any], lesions: list[dict[str, float]]
) -> dict[str, Any]:
    """What run.json says of a case: the run, what was found (`describe`), its quality, and the warnings of both."""
    found = describe(result, lesions) | {"quality": quality(case, result)}
    return {"subject": case.subject, **run, **found, "warnings": [*run.get("warnings", []), *found["warnings"]]}


def describe(result: Mapping[str, Any], lesions: list[dict[str, float]]) -> dict[str, Any]:
    """What run.json says of a case beside the run itself.

    result: the volume in numbers, from `ScoreVolumed`; lesions: from `find_lesions`.
    """
    warnings = [f"unreliable, do not interpret: {doubt}" for doubt in result["doubts"]]
    share = result["abnormal_share"]
    healthy = result["threshold_origin"].get("false_positive_share", DEFAULT_HEALTHY_SHARE)
    if share > MANY_TIMES * healthy:
        fact = (
            f"{share:.0%} of the brain is above the threshold, more than {MANY_TIMES} times the share of a healthy one"
        )
        warnings.append(f"{fact}: a very large lesion, or an image that is unlike the training images")
    return {
        **result,
        "lesions": len(lesions),
        "lesion_volume_ml": round(sum(lesion["volume_ml"] for lesion in lesions), 4),
        "versions": versions(),
        "warnings": warnings,
    }
