"""What is written as DICOM lies in the patient where it was found, whatever the plane and order of the images."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
from copy import deepcopy
from dataclasses import replace

import highdicom
import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from monai.data import MetaTensor
from monai.data.utils import orientation_ras_lps
from pydicom.uid import generate_uid
from scipy import ndimage
from typer.testing import CliRunner

from common.cli import app
from common.errors import DicomError
from common.images.dicom import choose_series, read_series
from common.results.case import Case, save_nifti
from common.results.dicom import save_dicom

PLANES = ["axial", "sagittal", "coronal", "oblique"]
NAMES = ["segmentation", "anomaly_map"]
THRESHOLD = 0.5
STEP = THRESHOLD / 4096  # of the map in DICOM


def decode(path):
    """A written object: (I, J, K) and its RAS affine."""
    volume = highdicom.imread(path).get_volume()
    return volume.array.T, orientation_ras_lps(volume.affine)[:, [2, 1, 0, 3]]


def detected(folder, phantom, empty=False):
    """A case on the grid of the series in a folder, whose lesion is the phantom's, and the series."""
    series = choose_series(folder)
    image = read_series(series)
    _, brain, lesion = phantom.on_grid(tuple(image.shape[1:]), image.affine.numpy())
    maps = {"brain": brain, "segmentation": lesion & (not empty)}
    volumes = {
        name: MetaTensor(torch.as_tensor(mask.astype(np.uint8))[None], meta=image.meta) for name, mask in maps.items()
    }
    anomaly_map = image / 1000 * (not empty)
    return Case("scan", image=image, anomaly_map=anomaly_map, reconstruction=image, **volumes), series


def in_world(array, affine, points):
    """The nearest voxels to points in mm; 0 outside."""
    voxels = nib.affines.apply_affine(np.linalg.inv(affine), points)
    return ndimage.map_coordinates(array, voxels.T, order=0)


@pytest.mark.parametrize("is_reversed", [False, True], ids=["forward", "reversed"])
@pytest.mark.parametrize("plane", PLANES)
def test_objects_lie_where_the_nifti_does(plane, is_reversed, write_series, phantom, tmp_path):
    written = write_series(tmp_path / "in", plane, is_reversed)
    case, series = detected(tmp_path / "in", phantom)
    save_dicom(case, series, tmp_path / "out", "dae", "0.1.0", THRESHOLD)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["anomaly_map.dcm", "segmentation.dcm"]
    points = np.random.default_rng(0).uniform(-35, 35, (2000, 3)) + phantom.centre_mm
    for name in NAMES:
        array, affine = decode(tmp_path / "out" / f"{name}.dcm")
        assert array.shape == case.image.shape[1:]
        save_nifti(getattr(case, name), case.affine, tmp_path / f"{name}.nii.gz")
        nifti = nib.load(tmp_path / f"{name}.nii.gz")
        expected = in_world(nifti.get_fdata(), nifti.affine, points)
        assert len(np.unique(expected)) > 1
        # points half-way between voxels may go either way
        assert np.mean(np.abs(in_world(array, affine, points) - expected) > STEP / 2 + 1e-6) < 0.01
        np.testing.assert_allclose(np.sort(array.ravel()), np.sort(nifti.get_fdata().ravel()), atol=STEP / 2 + 1e-6)
    array, affine = decode(tmp_path / "out" / "segmentation.dcm")
    centroid = nib.affines.apply_affine(affine, ndimage.center_of_mass(array))
    ball = np.array(phantom.centre_mm) + phantom.lesion_mm
    own = nib.affines.apply_affine(written.affine, ndimage.center_of_mass(written.lesion))
    np.testing.assert_allclose(centroid, own, atol=1e-3)
    assert np.abs(centroid - ball).max() < 2  # half the thickness of a slice
    mirrored = ball * (-1, 1, 1)
    assert np.linalg.norm(centroid - mirrored) > 30


def test_objects_belong_to_the_study(write_series, phantom, tmp_path):
    written = write_series(tmp_path / "in")
    source = pydicom.dcmread(written.files[0])
    case, series = detected(tmp_path / "in", phantom)
    save_dicom(case, series, tmp_path / "out", "dae", "0.1.0", THRESHOLD)
    objects = {name: pydicom.dcmread(tmp_path / "out" / f"{name}.dcm") for name in NAMES}
    for dataset in objects.values():
        for keyword in ("PatientName", "PatientID", "StudyInstanceUID", "FrameOfReferenceUID", "AccessionNumber"):
            assert dataset[keyword].value == source[keyword].value
        assert dataset.Manufacturer == "uad-bundles"
        assert dataset.ManufacturerModelName == "dae"
        assert dataset.SoftwareVersions == "0.1.0"
        assert dataset.SeriesInstanceUID != source.SeriesInstanceUID
        referenced = {
            image.ReferencedSOPInstanceUID
            for frame in dataset.PerFrameFunctionalGroupsSequence
            for image in frame.DerivationImageSequence[0].SourceImageSequence
        }
        assert referenced == {pydicom.dcmread(path).SOPInstanceUID for path in written.files}
    assert len({dataset.SeriesInstanceUID for dataset in objects.values()}) == 2
    assert len({dataset.SeriesNumber for dataset in objects.values()} | {source.SeriesNumber}) == 3
    assert len({dataset.SOPInstanceUID for dataset in objects.values()}) == 2
    segmentation = objects["segmentation"]
    assert segmentation.SegmentationType == "BINARY"
    (segment,) = segmentation.SegmentSequence
    assert segment.SegmentLabel == "Anomaly"
    (identification,) = segment.SegmentationAlgorithmIdentificationSequence
    assert (identification.AlgorithmName, identification.AlgorithmVersion) == ("dae", "0.1.0")


@pytest.mark.parametrize(("highest", "coarser"), [(0.3, 1), (0.9, 1), (7.99, 1), (8.01, 2), (1000, 128)])
def test_map_is_stored_in_steps_of_the_threshold_with_one_window(highest, coarser, write_series, phantom, tmp_path):
    """Whatever is in it: maps are compared with each other. Only where 16 bits do not reach are the steps larger."""
    write_series(tmp_path / "in")
    case, series = detected(tmp_path / "in", phantom)
    case = replace(case, anomaly_map=case.anomaly_map / case.anomaly_map.max() * highest)
    save_dicom(case, series, tmp_path / "out", "dae", "0.1.0", THRESHOLD)
    path = tmp_path / "out" / "anomaly_map.dcm"
    shared = pydicom.dcmread(path).SharedFunctionalGroupsSequence[0]
    mapping = pydicom.dcmread(path).PerFrameFunctionalGroupsSequence[0].get("RealWorldValueMappingSequence")
    (mapping,) = mapping or shared.RealWorldValueMappingSequence
    window = shared.FrameVOILUTSequence[0]
    assert mapping.RealWorldValueSlope == pytest.approx(coarser * STEP)
    assert (window.WindowCenter, window.WindowWidth) == (4096 / coarser, 8192 / coarser)
    found, _ = decode(path)
    expected = np.sort(case.anomaly_map.numpy().ravel())
    np.testing.assert_allclose(np.sort(found.ravel()), expected, atol=coarser * STEP / 2 * 1.001)
    assert path.stat().st_size < case.anomaly_map.numel() * 4 / 3


def iod_errors(path):
    """What `dciodvfy` says is wrong with an object."""
    if not shutil.which("dciodvfy"):
        pytest.skip("no dciodvfy: apt-get install dicom3tools")
    said = subprocess.run(["dciodvfy", path], capture_output=True, text=True, check=False)
    lines = (said.stdout + said.stderr).splitlines()
    assert any(line in ("Segmentation", "ParametricMap") for line in lines), lines  # it knew what it looked at
    return [line for line in lines if line.startswith("Error")]


@pytest.mark.parametrize("name", NAMES)
def test_objects_are_what_the_standard_says(name, write_series, phantom, tmp_path):
    write_series(tmp_path / "in")
    save_dicom(*detected(tmp_path / "in", phantom), tmp_path / "out", "dae", "0.1.0", THRESHOLD)
    path = tmp_path / "out" / f"{name}.dcm"
    assert iod_errors(path) == []
    dataset = pydicom.dcmread(path)
    del dataset.InstanceNumber, dataset.ContentLabel
    dataset.save_as(path)
    assert len(iod_errors(path)) >= 2


def test_objects_name_the_weights(write_series, phantom, tmp_path):
    write_series(tmp_path / "in")
    digest = "ab" * 32
    save_dicom(*detected(tmp_path / "in", phantom), tmp_path / "out", "dae", "0.1.0", THRESHOLD, digest)
    objects = {name: pydicom.dcmread(tmp_path / "out" / f"{name}.dcm") for name in NAMES}
    assert [list(dataset.SoftwareVersions) for dataset in objects.values()] == [["0.1.0", digest]] * 2
    (algorithm,) = objects["segmentation"].SegmentSequence[0].SegmentationAlgorithmIdentificationSequence
    assert (algorithm.AlgorithmVersion, algorithm.AlgorithmParameters) == ("0.1.0", f"weights_sha256={digest}")


def test_nothing_found_is_an_object_too(write_series, phantom, tmp_path):
    write_series(tmp_path / "in")
    case, series = detected(tmp_path / "in", phantom, empty=True)
    save_dicom(case, series, tmp_path / "out", "dae", "0.1.0", THRESHOLD)
    for name in NAMES:
        array, _ = decode(tmp_path / "out" / f"{name}.dcm")
        assert array.shape == case.image.shape[1:]
        assert not array.any()


def enhance(files, path, per_frame=False, series=None):
    """Write classic images as one enhanced file, with its pixel measures said for all frames or for each."""
    sources = [pydicom.dcmread(file) for file in files]
    enhanced = highdicom.legacy.LegacyConvertedEnhancedMRImage(
        sources, series or generate_uid(), 1, generate_uid(), 1, strict=False
    )
    for keyword in ("PixelMeasuresSequence", "PlaneOrientationSequence") if per_frame else ():
        value = enhanced.SharedFunctionalGroupsSequence[0][keyword].value
        del enhanced.SharedFunctionalGroupsSequence[0][keyword]
        for frame in enhanced.PerFrameFunctionalGroupsSequence:
            setattr(frame, keyword, deepcopy(value))
    path.parent.mkdir(exist_ok=True)
    enhanced.save_as(path)


@pytest.mark.parametrize("per_frame", [False, True], ids=["shared", "per frame"])
def test_objects_of_a_multiframe_source(per_frame, write_series, phantom, tmp_path):
    enhance(write_series(tmp_path / "in", "oblique").files, tmp_path / "multi" / "IM1", per_frame)
    case, series = detected(tmp_path / "multi", phantom)
    save_dicom(case, series, tmp_path / "out", "dae", "0.1.0", THRESHOLD)
    array, affine = decode(tmp_path / "out" / "segmentation.dcm")
    centroid = nib.affines.apply_affine(affine, ndimage.center_of_mass(array))
    assert np.abs(centroid - phantom.centre_mm - phantom.lesion_mm).max() < 2


def test_enhanced_images_of_a_frame_each_cannot_be_referred_to(write_series, phantom, tmp_path):
    uid = generate_uid()
    for number, file in enumerate(write_series(tmp_path / "in").files):
        enhance([file], tmp_path / "frames" / f"IM{number}", series=uid)
    with pytest.raises(DicomError, match="is 36 enhanced images, DICOM results refer to one"):
        save_dicom(*detected(tmp_path / "frames", phantom), tmp_path / "out", "dae", "0.1.0", THRESHOLD)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("number", "own"),
    [(30_000_000, 9001), (2**31 - 1, 9001), (-5, 9001), (None, 9001), (0, 1), (21_474_835, 2147483501)],
)
def test_series_number_fits_its_type(number, own, write_series, phantom, tmp_path):
    write_series(tmp_path / "in", SeriesNumber=number)
    save_dicom(*detected(tmp_path / "in", phantom), tmp_path / "out", "dae", "0.1.0", THRESHOLD)
    with pydicom.config.strict_reading():
        numbers = [pydicom.dcmread(tmp_path / "out" / f"{name}.dcm").SeriesNumber for name in NAMES]
    assert numbers == [own, own + 1]


@pytest.mark.parametrize(
    ("charset", "name"),
    [
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎=やまだ^たろう"),
        ("ISO_IR 100", "Müller^Jörg"),
        ("GB18030", "Wang^XiaoDong=王^小东"),
        ("ISO_IR 192", "Ωμέγα^Ж"),
    ],
)
def test_names_in_any_alphabet_are_kept(charset, name, write_series, phantom, tmp_path):
    def rename(dataset, k):
        dataset.SpecificCharacterSet, dataset.PatientName = charset, name

    write_series(tmp_path / "in").edit(rename)
    save_dicom(*detected(tmp_path / "in", phantom), tmp_path / "out", "dae", "0.1.0", THRESHOLD)
    assert [str(pydicom.dcmread(tmp_path / "out" / f"{kind}.dcm").PatientName) for kind in NAMES] == [name] * 2


def test_objects_of_anonymised_images(write_series, phantom, tmp_path):
    keywords = ["PatientName", "PatientID", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate"]

    def anonymise(dataset, k):
        for keyword in [*keywords, "StudyTime", "SliceThickness"]:
            delattr(dataset, keyword)

    write_series(tmp_path / "in").edit(anonymise)
    save_dicom(*detected(tmp_path / "in", phantom), tmp_path / "out", "dae", "0.1.0", THRESHOLD)
    for name in NAMES:
        dataset = pydicom.dcmread(tmp_path / "out" / f"{name}.dcm")
        assert not [keyword for keyword in keywords if dataset[keyword].value]
        assert decode(tmp_path / "out" / f"{name}.dcm")[0].any()
    segmentation = highdicom.seg.segread(tmp_path / "out" / "segmentation.dcm")  # refuses one without a thickness
    measures = segmentation.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    assert measures.SliceThickness == measures.SpacingBetweenSlices == 4  # what lacks is taken from the places


def no_frame(dataset, k):
    del dataset.FrameOfReferenceUID


def garbled_date(dataset, k):
    dataset["PatientBirthDate"] = pydicom.DataElement("PatientBirthDate", "LO", "born 19010203")
    dataset["PatientBirthDate"].VR = "DA"


def unparsed(keyword, vr, value):
    """A value that does not fit its type, as a careless writer leaves it."""

    def change(dataset, k):
        dataset[keyword] = pydicom.DataElement(keyword, "LO", value)
        dataset[keyword].VR = vr

    return change


GARBLED = {
    "no frame of reference": (no_frame, "has no FrameOfReferenceUID"),
    "date": (garbled_date, "does not allow DICOM results"),
    "long number": (unparsed("PatientID", "LO", "19010203" * 9), "PatientID does not fit its type"),
    "long accession": (unparsed("AccessionNumber", "SH", "19010203" * 3), "AccessionNumber does not fit its type"),
    "study UID": (unparsed("StudyInstanceUID", "UI", "1.2.x19010203"), "StudyInstanceUID does not fit its type"),
}


@pytest.mark.parametrize(("change", "fact"), GARBLED.values(), ids=GARBLED)
def test_what_cannot_be_referred_to_is_refused(change, fact, write_series, phantom, tmp_path):
    write_series(tmp_path / "in").edit(change)
    with pytest.raises(DicomError, match=fact) as caught:
        save_dicom(*detected(tmp_path / "in", phantom), tmp_path / "out", "dae", "0.1.0", THRESHOLD)
    assert "19010203" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def detect(source, out, *options):
    """`uad detect` with DICOM results: the exit code, the status line, the files and the record of the case."""
    arguments = ["detect", str(source), "-m", "dae", "-o", str(out), "--format", "dicom-seg", *options]
    done = CliRunner().invoke(app, arguments)
    with (out / "status.tsv").open(newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file, delimiter="\t")
    folder = out / row["case"]
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return done.exit_code, row, {path.name for path in folder.iterdir()}, record


def test_objects_that_cannot_be_written_discard_nothing_else(write_series, tmp_path):
    series = write_series(tmp_path / "in", slope=1.0, intercept=0.0)
    series.edit(garbled_date)
    for _ in range(2):  # what was not written is not "finished before" either
        code, row, files, record = detect(series.folder, tmp_path / "out", "--force")
        assert code == 3
        assert row["status"] == "DicomError"
        assert "does not allow DICOM results" in row["message"]
        assert files == {
            *("anomaly_map.nii.gz", "segmentation.nii.gz", "reconstruction.nii.gz"),
            *("lesions.csv", "preview.png", "run.json"),
        }
        assert record["warnings"][-1] == row["message"]
        assert "19010203" not in json.dumps(record)


def test_nifti_input_has_its_results_without_the_objects(save_nifti, phantom, tmp_path):
    shape, affine = phantom.grid(spacing_mm=(4, 4, 4))
    scan = save_nifti(tmp_path / "scan.nii.gz", phantom.on_grid(shape, affine)[0], affine)
    code, row, files, record = detect(scan, tmp_path / "out", "--force")
    assert (code, row["status"]) == (3, "DicomError")
    advice = "give a DICOM folder, or give --format nifti"
    assert f"no DICOM series, which DICOM results would refer to; {advice}" in row["message"]
    assert {"anomaly_map.nii.gz", "run.json"} < files
    assert record["warnings"][-1] == row["message"]


def test_objects_of_an_unreliable_result_are_written_by_force_only(write_series, tmp_path):
    """The phantom is no T1 brain, and its slices are thick."""
    series = write_series(tmp_path / "in")
    code, row, files, record = detect(series.folder, tmp_path / "out")
    assert (code, row["status"], record["reliability"]) == (0, "unreliable", "unreliable")
    assert "slices of 4.0 mm" in row["message"]
    assert "run.json" in files and not [name for name in files if name.endswith(".dcm")]
    code, row, files, record = detect(series.folder, tmp_path / "out", "--force")
    assert (code, row["status"]) == (0, "unreliable")
    assert {"segmentation.dcm", "anomaly_map.dcm"} < files
