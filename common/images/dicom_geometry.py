"""Whether the images of a DICOM series are the slices of one volume: told by their headers alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import DicomError
from .itk_image import MAX_VOXELS

GEOMETRY = {"ImageOrientationPatient": 6, "PixelSpacing": 2, "ImagePositionPatient": 3, "Rows": 1, "Columns": 1}
CONTRAST_TAGS = [  # what is the same in all images of one volume: it tells echoes, phases, b-values ... apart
    *("ImageType", "FrameType", "ComplexImageComponent", "EchoTime", "EffectiveEchoTime", "EchoNumbers"),
    *("RepetitionTime", "InversionTime", "FlipAngle", "SequenceName", "KVP", "ConvolutionKernel"),
    *("DiffusionBValue", "DiffusionGradientOrientation", "TemporalPositionIdentifier", "TemporalPositionIndex"),
]
VOLUME_TAGS = [*CONTRAST_TAGS, "TriggerTime", "AcquisitionNumber", "AcquisitionTime"]  # may differ from slice to slice
UNEVEN = 0.1  # of the distance between slices: how far a slice may be from its place
EXPORT_ORIGINALS = "export the original images, not screen captures"
EXPORT_WHOLE = "export the series again as a whole"
SPLIT = "give each volume (echo, phase, b-value) as a folder of its own"


def find_numbers(header: Any, keyword: str) -> np.ndarray | None:
    """The finite values of a tag of GEOMETRY, or None where it is missing, empty or malformed."""
    try:
        values = np.array(header.get(keyword), dtype=float).ravel()
    except (TypeError, ValueError):
        return None
    return values if values.shape == (GEOMETRY[keyword],) and np.isfinite(values).all() else None


def numbers(header: Any, keyword: str) -> np.ndarray:
    """The values of a tag of GEOMETRY of a header that `check_tags` has passed."""
    values = find_numbers(header, keyword)
    if values is None:
        raise KeyError(keyword)
    return values


def integer(header: Any, keyword: str) -> int | None:
    """The value of a tag that counts, or None where it is missing, empty or malformed."""
    try:
        return int(header.get(keyword))
    except (TypeError, ValueError):
        return None


def place(header: Any) -> float | None:
    """Where an image lies along the normal of its plane (row x column) in mm; None where the tags do not say it."""
    orientation, position = (find_numbers(header, f"Image{what}Patient") for what in ("Orientation", "Position"))
    if orientation is None or position is None:
        return None
    return float(position @ np.cross(orientation[:3], orientation[3:]))


def instance(header: Any) -> str:
    """The number of an image in its series, which names it in messages."""
    number = integer(header, "InstanceNumber")
    return "without number" if number is None else str(number)


def lps_affine(headers: Sequence[Any]) -> np.ndarray:
    """(column, row, slice) to left, posterior, superior in mm, (4, 4), of images in the order of their places.

    DICOM PS3.3 C.7.6.2.1.1; the direction of the slices is that from the first to the last position, so that the
    affine of a tilted gantry is sheared.
    """
    first, last = headers[0], headers[-1]
    row, column = np.split(numbers(first, "ImageOrientationPatient"), 2)
    between_rows, between_columns = numbers(first, "PixelSpacing")
    start, end = numbers(first, "ImagePositionPatient"), numbers(last, "ImagePositionPatient")
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = row * between_columns, column * between_rows
    affine[:3, 2], affine[:3, 3] = (end - start) / (len(headers) - 1), start
    return affine


def check_slices(source: object, name: str, headers: Sequence[Any]) -> None:
    """Refuse headers, in the order of their places, that are not one whole, evenly spaced volume. Raises DicomError.

    source, name: the folder and what to call the series in messages.
    """
    if len(headers) < 2:
        raise DicomError(source, f"{name} is a single image", "give all images of the series in one folder")
    for header in headers:
        check_tags(source, name, header)
        check_same(source, name, headers[0], header)
    voxels = int(np.prod([numbers(headers[0], keyword).item() for keyword in ("Rows", "Columns")])) * len(headers)
    if not 0 < voxels <= MAX_VOXELS:  # before memory is taken for them
        raise DicomError(source, f"{name}: the headers say {voxels} voxels, no scan has that", EXPORT_WHOLE)
    check_twice(source, name, headers)
    check_contrast(source, name, headers)
    check_spacing(source, name, headers)


def check_tags(source: object, name: str, header: Any) -> None:
    """A place in the patient, and grey pixels."""
    missing = [keyword for keyword in GEOMETRY if find_numbers(header, keyword) is None]
    if missing:
        raise DicomError(source, f"{name}, image {instance(header)}: no valid {', '.join(missing)}", EXPORT_ORIGINALS)
    colour = header.get("PhotometricInterpretation") or "MONOCHROME2"
    if colour != "MONOCHROME2":
        raise DicomError(source, f"{name}: {colour} pixels, not MONOCHROME2", EXPORT_ORIGINALS)
    row, column = np.split(numbers(header, "ImageOrientationPatient"), 2)
    if abs(row @ column) > 1e-3 or not np.allclose([row @ row, column @ column], 1, atol=1e-2):
        raise DicomError(source, f"{name}: ImageOrientationPatient is not two directions", EXPORT_ORIGINALS)


def check_same(source: object, name: str, first: Any, header: Any) -> None:
    """The same plane, size and frame of reference as the first image."""
    differs = [
        keyword
        for keyword in GEOMETRY
        if keyword != "ImagePositionPatient"
        and not np.allclose(numbers(header, keyword), numbers(first, keyword), rtol=0, atol=1e-3)
    ]
    differs += ["FrameOfReferenceUID"] * (header.get("FrameOfReferenceUID") != first.get("FrameOfReferenceUID"))
    if differs:
        fact = f"{name}: images {instance(first)} and {instance(header)} differ in {', '.join(differs)}"
        raise DicomError(source, fact, "give each volume as a folder of its own")


def check_twice(source: object, name: str, headers: Sequence[Any]) -> None:
    """No two images at one place: echoes, phases, b-values or copies."""
    places = [place(header) or 0.0 for header in headers]
    for a, b, before, after in zip(headers, headers[1:], places, places[1:], strict=False):
        if after - before > 1e-2:
            continue
        fact = f"{name}: images {instance(a)} and {instance(b)} of {len(headers)} are both at {before:.1f} mm"
        if a.get("SOPInstanceUID") == b.get("SOPInstanceUID"):
            raise DicomError(source, f"{fact}, copies of one image", "leave one copy in the folder")
        differs = [keyword for keyword in VOLUME_TAGS if a.get(keyword) != b.get(keyword)]
        fact += f" and differ in {', '.join(differs)}" if differs else ""
        raise DicomError(source, fact, SPLIT)


def check_contrast(source: object, name: str, headers: Sequence[Any]) -> None:
    """No images of two volumes at places in turn, such as two echoes at every second place each."""
    first = headers[0]
    for header in headers:
        if differs := [keyword for keyword in CONTRAST_TAGS if not is_same(header.get(keyword), first.get(keyword))]:
            fact = f"{name}: images {instance(first)} and {instance(header)} differ in {', '.join(differs)}"
            raise DicomError(source, fact, SPLIT)


def is_same(a: Any, b: Any) -> bool:
    """Whether two values of a tag are equal; numbers to a thousandth, since scanners round them differently."""
    if a == b or a is None or b is None:
        return bool(a == b)
    try:
        first, second = np.array(a, dtype=float), np.array(b, dtype=float)
    except (TypeError, ValueError):
        return False
    return first.shape == second.shape and np.allclose(first, second, rtol=1e-3, atol=1e-6)


def check_spacing(source: object, name: str, headers: Sequence[Any]) -> None:
    """No slice is left out, and all lie evenly on one line, which a tilted gantry keeps."""
    places = np.array([place(header) for header in headers], dtype=float)
    steps = np.diff(places)
    step = float(np.median(steps))
    gaps = np.flatnonzero(steps > 1.5 * step)
    if len(gaps):
        lost = np.concatenate([np.linspace(places[k], places[k + 1], round(steps[k] / step) + 1)[1:-1] for k in gaps])
        where = ", ".join(f"{mm:.1f}" for mm in lost[:5]) + ", ..." * (len(lost) > 5)
        between = ", ".join(f"{instance(headers[k])} and {instance(headers[k + 1])}" for k in gaps[:5])
        fact = f"{name}: {len(lost)} slice(s) missing at {where} mm, between images {between}"
        raise DicomError(source, fact, EXPORT_WHOLE)
    points = np.array([numbers(header, "ImagePositionPatient") for header in headers])
    off = np.linalg.norm(points - np.linspace(points[0], points[-1], len(points)), axis=1)
    if off.max() > UNEVEN * step:
        worst = instance(headers[int(off.argmax())])
        fact = f"{name}: slices are not evenly spaced, image {worst} is {off.max():.2f} mm off its place"
        raise DicomError(source, fact, "resample it to even slices, or reconstruct it again")
