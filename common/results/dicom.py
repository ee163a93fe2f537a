"""DICOM out: the segmentation and the anomaly map as objects that a PACS files with the scan."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from monai.data import MetaTensor
from monai.data.utils import orientation_ras_lps
from monai.utils import optional_import

from ..errors import DicomError
from ..files import replacing
from ..images.dicom import Series, without_warnings

if TYPE_CHECKING:
    from .case import Case  # which writes its objects with this module

pydicom, _ = optional_import("pydicom")

OBJECTS = ("segmentation.dcm", "anomaly_map.dcm")
UTF_8 = "ISO_IR 192"
MAX_SOURCE_NUMBER = (2**31 - 1) // 100 - 1  # so that a hundred times it, and a few more, is a SeriesNumber too
OWN_NUMBER = 90  # in the place of a SeriesNumber that is not there, or beyond that
LEVELS = 4096  # of the map as integers, from 0 to the threshold
MOST = 2**16 - 1
ONE_FOR_ALL = ("PixelMeasuresSequence", "PlaneOrientationSequence")  # what highdicom wants as shared by all frames
NEEDED = ("StudyInstanceUID", "SOPClassUID", "SOPInstanceUID", "FrameOfReferenceUID")
REPAIR = "repair the headers, or use the results as NIfTI, which do not need them"
MAY_BE_EMPTY = (  # and lack in anonymised images, while highdicom wants them all
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "AccessionNumber"),
    *("StudyID", "StudyDate", "StudyTime"),
)


def save_dicom(
    case: Case,
    series: Series,
    folder: Path,
    algorithm: str,
    version: str,
    threshold: float,
    weights_sha256: str | None = None,
) -> None:
    """Write segmentation.dcm (Segmentation, binary) and anomaly_map.dcm (Parametric Map, see `levels`) into `folder`.

    Both lie in the frame of reference of the source images, refer to them, and belong to the same study; they hold
    the patient's name and number as the source does, without which a PACS cannot file them. All slices are stored, so
    that a scan in which nothing was found has a segmentation too.

    case: on the grid of `read_series(series)`.
    algorithm, version: what the objects name as their maker, a bundle and its version.
    threshold: of the map, at the middle of its window: maps of one method are shown alike, whatever is in them.
    weights_sha256: of its weights; a second software version, and a parameter of the Segmentation's algorithm.
    Raises DicomError where the source images lack or garble what the objects take from them, of which nothing is
    written then.
    """
    spacing_mm = float(np.linalg.norm(case.affine[:3, 2]))  # between slices
    sources = [_source(series, path, spacing_mm) for path in series.files]
    if len(sources) > 1 and "PerFrameFunctionalGroupsSequence" in sources[0]:
        fact = f"{series.name} is {len(sources)} enhanced images, DICOM results refer to one"
        raise DicomError(series.folder, fact, "convert it to one multi-frame image")
    number = OWN_NUMBER if series.number is None else series.number
    number = 100 * (number if 0 <= number <= MAX_SOURCE_NUMBER else OWN_NUMBER)
    versions = [version, *filter(None, [weights_sha256])]
    with without_warnings():
        try:
            mask = _planes(case.segmentation, np.uint8, case, series, sources)
            stored, step = levels(case.anomaly_map, threshold)
            values = _planes(stored, np.uint16, case, series, sources)
            objects = [
                _encode(_segmentation(mask, sources, algorithm, versions, number + 1)),
                _encode(_parametric_map(values, step, threshold, sources, algorithm, versions, number + 2)),
            ]
        except MalformedValueError as error:
            fact = f"{series.name} does not allow DICOM results ({error} does not fit its type)"
            raise DicomError(series.folder, fact, REPAIR) from error
        except Exception as error:  # whatever highdicom and pydicom raise, whose words quote the tags too
            fact = f"{series.name} does not allow DICOM results ({type(error).__name__} in a tag)"
            raise DicomError(series.folder, fact, REPAIR) from error
    for name, content in zip(OBJECTS, objects, strict=True):
        with replacing(folder / name) as path:
            path.write_bytes(content)


def levels(anomaly_map: MetaTensor, threshold: float) -> tuple[MetaTensor, float]:
    """A map, at least 0, as whole numbers up to `MOST`, and the step, which is the value of 1.

    A step is the threshold / `LEVELS`: the same for all maps of a method, except where the highest value does not fit,
    16 thresholds and more; there it is twice, four times, ... as large.
    """
    step = (threshold if threshold > 0 else 1.0) / LEVELS
    while float(anomaly_map.as_tensor().max()) / step > MOST:
        step *= 2
    return MetaTensor((anomaly_map.as_tensor() / step).round(), meta=anomaly_map.meta), step


class MalformedValueError(ValueError):
    """Says the keyword of a tag whose value does not fit its type, not the value, which may be the patient's."""


def _encode(dataset: Any) -> bytes:
    """The bytes of a file, text as UTF-8, all of whose values but the pixels fit their types.

    Raises MalformedValueError.
    """
    dataset.SpecificCharacterSet = UTF_8
    buffer = BytesIO()
    dataset.save_as(buffer)
    buffer.seek(0)
    with pydicom.config.strict_reading():
        check_values(pydicom.dcmread(buffer, stop_before_pixels=True))
    return buffer.getvalue()


def check_values(dataset: Any) -> None:
    """Every value of a dataset that was read, also nested, fits its type (VR). Raises MalformedValueError."""
    for tag in list(dataset.keys()):
        try:
            element = dataset[tag]
        except Exception as error:  # whatever the converter of the type raises
            raise MalformedValueError(pydicom.datadict.keyword_for_tag(tag) or str(tag)) from error
        if element.VR == "SQ":
            for item in element.value:
                check_values(item)


def _source(series: Series, path: Path, spacing_mm: float) -> Any:
    dataset = pydicom.dcmread(path, stop_before_pixels=True)
    missing = [keyword for keyword in NEEDED if not dataset.get(keyword)]
    if missing:
        fact = f"{series.name} has no {', '.join(missing)}, without which there are no DICOM results"
        raise DicomError(series.folder, fact, REPAIR)
    for keyword in MAY_BE_EMPTY:
        if keyword not in dataset:
            setattr(dataset, keyword, None)
    if "PerFrameFunctionalGroupsSequence" in dataset:
        _share(dataset)
    elif not dataset.get("SliceThickness"):
        dataset.SliceThickness = f"{spacing_mm:.9g}"  # a segmentation must have one, which many programs read
    return dataset


def _share(dataset: Any) -> None:
    """Say for all frames what each of them says; `choose_series` has checked that all say the same."""
    if not dataset.get("SharedFunctionalGroupsSequence"):
        dataset.SharedFunctionalGroupsSequence = [pydicom.Dataset()]
    shared, first = dataset.SharedFunctionalGroupsSequence[0], dataset.PerFrameFunctionalGroupsSequence[0]
    for keyword in ONE_FOR_ALL:
        if keyword not in shared and keyword in first:
            shared[keyword] = first[keyword]


def _maker(algorithm: str, versions: list[str], series_number: int) -> dict[str, Any]:
    """The new series, and the equipment that made it; the standard wants a serial number, which software has not."""
    return {
        "specific_character_set": None,  # `_encode` says it: highdicom does not take every list that a source has
        "series_instance_uid": pydicom.uid.generate_uid(),
        "series_number": series_number,
        "sop_instance_uid": pydicom.uid.generate_uid(),
        "instance_number": 1,
        "manufacturer": "uad-bundles",
        "manufacturer_model_name": algorithm,
        "software_versions": tuple(versions),
        "device_serial_number": "0",
    }


def _planes(volume: MetaTensor, dtype: type, case: Case, series: Series, sources: list[Any]) -> Any:
    """(1, I, J, K) as planes (K, J, I): one a source image, or of a multi-frame image with their places."""
    array: np.ndarray = np.ascontiguousarray(volume.as_tensor()[0].cpu().numpy().T, dtype=dtype)
    if not series.is_multiframe:
        return array  # each plane takes the place of its image, to the last digit
    highdicom, _ = optional_import("highdicom")
    return highdicom.Volume(
        array,
        affine=orientation_ras_lps(case.affine)[:, [2, 1, 0, 3]],
        coordinate_system="PATIENT",
        frame_of_reference_uid=sources[0].FrameOfReferenceUID,
    )


def _segmentation(mask: Any, sources: list[Any], algorithm: str, versions: list[str], series_number: int) -> Any:
    highdicom, _ = optional_import("highdicom")
    codes = pydicom.sr.codedict.codes
    segment = highdicom.seg.SegmentDescription(
        segment_number=1,
        segment_label="Anomaly",
        segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
        segmented_property_type=codes.SCT.Lesion,
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name=algorithm,
            version=versions[0],
            family=codes.cid7162.ArtificialIntelligence,
            parameters={"weights_sha256": versions[1]} if len(versions) > 1 else None,
        ),
    )
    return highdicom.seg.Segmentation(
        source_images=sources,
        pixel_array=mask,
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[segment],
        omit_empty_frames=False,  # highdicom stores no empty object otherwise
        content_label="ANOMALY",
        series_description=f"{algorithm} segmentation",
        **_maker(algorithm, versions, series_number),
    )


def _parametric_map(
    values: Any,
    step: float,
    threshold: float,
    sources: list[Any],
    algorithm: str,
    versions: list[str],
    series_number: int,
) -> Any:
    highdicom, _ = optional_import("highdicom")
    middle = max(round(threshold / step), 1)  # a window must not be empty
    mapping = highdicom.pm.RealWorldValueMapping(
        lut_label="ANOMALY",
        lut_explanation="Anomaly map, higher is more abnormal",
        unit=pydicom.sr.codedict.codes.UCUM.NoUnits,
        value_range=(0, MOST),
        slope=step,
        intercept=0.0,
    )
    dataset = highdicom.pm.ParametricMap(
        source_images=sources,
        pixel_array=values,
        contains_recognizable_visual_features=False,
        real_world_value_mappings=[mapping],
        voi_lut_transformations=[highdicom.VOILUTTransformation(window_center=middle, window_width=2 * middle)],
        transfer_syntax_uid=pydicom.uid.JPEGLSLossless,
        content_label="ANOMALY",
        series_description=f"{algorithm} anomaly map",
        **_maker(algorithm, versions, series_number),
    )
    dataset.Laterality = sources[0].get("Laterality")  # of a paired organ; it may be empty, not missing
    return dataset
