"""From what a user points at to a datalist: files, folders, DICOM, a BIDS dataset, a cohort CSV."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..errors import CohortError, ImageFileError
from ..images.itk_image import ITK_SUFFIXES
from ..outputs import is_safe_name, safe_characters
from .bids import find_scans, is_bids
from .table import read_cohort

IMAGE_SUFFIXES = (".nii", ".nii.gz", ".mgh", ".mgz", *ITK_SUFFIXES)


def find_cases(
    image: str | Path | Sequence[str | Path],
    modalities: Sequence[str] = ("T1",),
    brain: str | None = None,
    series: str | None = None,
    participants: Sequence[str] = (),
) -> list[dict[str, object]]:
    """A datalist of `subject` (names the case), `image` (path, or one a modality) and what was given with it.

    Args:
        image: one or several of: an image file; a folder of image files; the folder, or a zip archive, of a DICOM
            series; the root of a BIDS dataset; a cohort CSV. No image is opened here.
        modalities: of the bundle, in their order. Several need a BIDS dataset, a cohort CSV, or one file each in this
            order, which are one case, named like the first without its modality.
        brain: mask of the brain, for a single image.
        series: which DICOM series of a folder, by UID or description.
        participants: labels of the BIDS dataset; empty for all.
    Raises CohortError or ImageFileError.
    """
    inputs = [Path(path) for path in ([image] if isinstance(image, (str, Path)) else image)]
    if 1 < len(modalities) == len(inputs) and all(_is_image(path) for path in inputs):
        items = [_case_of_several(inputs, modalities)]
    else:
        items = [item for path in inputs for item in _cases(path, modalities, participants)]
    check_names(items)
    if brain is not None and len(items) > 1:
        raise CohortError(brain, f"one brain mask for {len(items)} images", "give a cohort CSV with a column brain")
    given = {key: value for key, value in {"brain": brain, "series": series}.items() if value is not None}
    return [item | given for item in items]


def check_names(items: Sequence[dict[str, object]]) -> None:
    """Every case has a name of its own that can name a folder, as it does in the results. Raises CohortError."""
    names = Counter(item["subject"] for item in items)
    for item in items:
        if not is_safe_name(str(item["subject"])):
            fact = f"its name, {item['subject']!r}, cannot name the folder of its results"
            raise CohortError(item["image"], fact, "rename it, or give a cohort CSV")
        if names[item["subject"]] > 1:
            fact = f"another image is named {item['subject']!r} too"
            raise CohortError(item["image"], fact, "rename it, or give it a folder of its own")


def _cases(path: Path, modalities: Sequence[str], participants: Sequence[str]) -> list[dict[str, object]]:
    if path.suffix.lower() == ".csv":
        return read_cohort(path, modalities)
    if path.is_dir() and is_bids(path):
        return find_scans(path, modalities, participants)
    if len(modalities) > 1:
        fact = f"the bundle needs {', '.join(modalities)} of each subject"
        raise CohortError(path, fact, "give these files in this order, a cohort CSV, or a BIDS dataset")
    images = []
    if path.is_dir():
        images = sorted(file for file in path.iterdir() if _is_image(file))
        if not images and not any(path.iterdir()):
            raise ImageFileError(path, "an empty folder", "give images, a folder of them, or of a DICOM series")
    return [{"subject": case_name(file), "image": str(file)} for file in images or [path]]


def _case_of_several(paths: Sequence[Path], modalities: Sequence[str]) -> dict[str, object]:
    """One case of several files: `sub-01` for `sub-01_T1.nii.gz`, `sub-01_FLAIR.nii.gz`."""
    first = case_name(paths[0])
    subject = first.removesuffix(modalities[0]).rstrip("_-. ") or first
    return {"subject": subject, "image": [str(path) for path in paths]}


def _is_image(path: Path) -> bool:
    return path.name.lower().endswith(IMAGE_SUFFIXES) and not path.name.startswith(".")


def case_name(path: str | Path) -> str:
    """Name of a file without the suffixes of an image, or of a folder: `sub-01_T1w` for `a/sub-01_T1w.nii.gz`.

    Of `.` and `..` that of the folder they stand for; `_` for what cannot be in a name on every system.
    """
    name = Path(path).name
    name = safe_characters(Path(path).resolve().name if name in ("", "..") else name)
    suffix = max((s for s in (*IMAGE_SUFFIXES, ".dcm", ".zip") if name.lower().endswith(s)), key=len, default="")
    return name[: len(name) - len(suffix)]
