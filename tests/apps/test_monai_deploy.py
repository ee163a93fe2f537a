"""What of the application of MONAI Deploy runs without its SDK: results that say nothing of the patient."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
import torch
from monai.data import MetaTensor
from pydicom.uid import generate_uid

from common.images.dicom import choose_series, read_series
from common.results.case import Case
from common.results.dicom import save_dicom

APP = Path(__file__).parents[2] / "apps" / "monai_deploy" / "app"
OF_THE_PATIENT = {
    "PatientBirthDate": "19010203",
    "PatientAge": "077Y",
    "PatientSex": "F",
    "PatientSize": "1.77",
    "PatientWeight": "66.5",
    "PatientComments": "PLANTED comment",
    "AdditionalPatientHistory": "PLANTED history",
    "Occupation": "PLANTED work",
    "StudyDescription": "PLANTED study",
    "StudyDate": "20200102",
    "ReferringPhysicianName": "PLANTED^DOCTOR",
    "StudyID": "PLANTED-STUDY",
    "EthnicGroup": "PLANTED",
    "ClinicalTrialSubjectID": "PLANTED-TRIAL",
    "InstitutionName": "PLANTED clinic",
}
NAMED = {"PatientName": "PLANTED^NAME", "PatientID": "PLANTED-ID", "AccessionNumber": "PLANTED-ACC"}

OF_THE_IMAGE = {"Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "InstanceNumber"}
OF_THE_IMAGE |= {"NumberOfFrames", "DimensionOrganizationType", "PresentationLUTShape", "PixelPresentation"}
OF_THE_IMAGE |= {"BitsAllocated", "ContentQualification", "InstanceCreationDate"}


@pytest.fixture(scope="module")
def deidentified():
    spec = importlib.util.spec_from_file_location("deidentify", APP / "deidentify.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.deidentified


def write(folder, series, image):
    mask = MetaTensor((image.as_tensor() > 500).to(torch.uint8), meta=image.meta)
    case = Case("scan", image=image, brain=mask, anomaly_map=image / 1000, reconstruction=image, segmentation=mask)
    save_dicom(case, series, folder, "dae", "0.1.0", 0.5)
    return {name: pydicom.dcmread(folder / f"{name}.dcm") for name in ("segmentation", "anomaly_map")}


def as_one_file(folder, files):
    """The images as one of many frames."""
    images = [pydicom.dcmread(path) for path in files]
    for path in files:
        path.unlink()
    converted = highdicom.legacy.LegacyConvertedEnhancedMRImage(
        images, generate_uid(), 1, generate_uid(), 1, strict=False
    )
    converted.save_as(folder / "IM1")


@pytest.mark.parametrize("is_multiframe", [False, True], ids=["a file a slice", "one file"])
def test_results_say_nothing_of_the_patient(is_multiframe, write_series, deidentified, tmp_path):
    written = write_series(tmp_path / "in", **OF_THE_PATIENT)
    if is_multiframe:
        as_one_file(tmp_path / "in", written.files)
    files = sorted((tmp_path / "in").iterdir())
    before = [path.read_bytes() for path in files]
    series = choose_series(tmp_path / "in")
    image = read_series(series)
    named = write(tmp_path / "named", series, image)
    with deidentified(series) as headers:
        nameless = write(tmp_path / "nameless", headers, image)
    for name, dataset in nameless.items():
        other, source = named[name], pydicom.dcmread(files[0])
        carried = {element.keyword for element in other if source.get(element.tag) == element}
        assert {"PatientName", "PatientAge", "PatientWeight", "StudyDate"} <= carried
        kept = {keyword for keyword in carried if dataset.get(keyword) and not keyword.endswith("UID")}
        assert kept <= OF_THE_IMAGE
        assert dataset.PatientIdentityRemoved == "YES"
        content = (tmp_path / "nameless" / f"{name}.dcm").read_bytes()
        for value in [*OF_THE_PATIENT.values(), *NAMED.values()]:
            if len(value) > 3:
                assert value.encode() not in content
        assert np.array_equal(dataset.pixel_array, other.pixel_array)
        assert dataset.StudyInstanceUID == other.StudyInstanceUID
        (referenced,) = dataset.ReferencedSeriesSequence
        assert {one.ReferencedSOPInstanceUID for one in referenced.ReferencedInstanceSequence} == {
            pydicom.dcmread(path).SOPInstanceUID for path in files
        }
    assert [path.read_bytes() for path in files] == before
