"""The application gives what the bundle gives, where the scan lies, says who made it and not whose it is."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import highdicom
import nibabel as nib
import numpy as np
import pydicom
import pytest
from monai.data.utils import orientation_ras_lps

HERE = Path(__file__).parent
BUNDLES = HERE.parents[1] / "bundles"
MAKE = runpy.run_path(str(HERE / "make_dicom.py"))
SAMPLES = {"T1": MAKE["SAMPLE"], "CT": MAKE["SAMPLE"].with_name("head_lesions_CT.nii.gz")}
CT = {"Modality": "CT", "SOPClassUID": pydicom.uid.CTImageStorage, "SeriesDescription": "head"}
PLANTED = {"PatientName": "PLANTED^NAME", "PatientID": "PLANTED-ID", "PatientBirthDate": "19010203"}
REAL = sorted((Path(os.environ["UAD_TEST_DATA"]) / "dicom").glob("*/")) if "UAD_TEST_DATA" in os.environ else []


def run(*arguments, **variables):
    command = [sys.executable, *map(str, arguments)]
    environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=HERE.parents[1], env=environment)


def run_app(folder, bundle, output, *options, **variables):
    return run(HERE / "app", "-i", folder, "-m", bundle, "-o", output, *options, **variables)


def run_bundle(folder, bundle, output):
    """The same bundle and setting through MONAI: the folder of the case."""
    config = bundle / "configs" / "inference.json"
    strip = ["--preprocessing::strip", "atlas"] if "BrainPreprocessing" in config.read_text() else []
    where = ["--image", folder, "--output_dir", output, *strip]
    done = run("-m", "monai.bundle", "run", "--config_file", config, *where)
    assert done.returncode == 0, done.stderr
    return next(path.parent for path in output.rglob("run.json"))


def decode(path):
    """A written object as an image in RAS order, whichever way its frames are sorted."""
    volume = highdicom.imread(path).get_volume(dtype=np.float32)
    affine = orientation_ras_lps(volume.affine)[:, [2, 1, 0, 3]]
    return nib.as_closest_canonical(nib.Nifti1Image(volume.array.T, affine))


def step(path):
    """Of the whole numbers that a map is stored in; 0 of a segmentation."""
    groups = pydicom.dcmread(path, stop_before_pixels=True).SharedFunctionalGroupsSequence[0]
    mappings = groups.get("RealWorldValueMappingSequence")
    return mappings[0].RealWorldValueSlope if mappings else 0


def check_equal(output, expected, report):
    """Segmentation and map of the application against the NIfTI files of the bundle run, within half a step."""
    for name in ("segmentation", "anomaly_map"):
        ours, theirs = decode(output / f"{name}.dcm"), nib.as_closest_canonical(nib.load(expected / f"{name}.nii.gz"))
        values, wanted = np.asanyarray(ours.dataobj), np.asanyarray(theirs.dataobj)
        largest = np.abs(values - wanted).max()
        report(f"{name}, {values.shape} voxels, {(wanted > 0).sum()} above 0, largest difference {largest}")
        np.testing.assert_allclose(ours.affine, theirs.affine, atol=1e-4)
        np.testing.assert_allclose(values, wanted, rtol=0, atol=step(output / f"{name}.dcm") / 2 * 1.001)
        assert wanted.any()


@pytest.fixture
def report(request, capsys):
    """Print a line into the log of the run."""

    def say(text):
        with capsys.disabled():
            print(f"\n{request.node.name}: {text}")

    return say


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Series of a patient with a name, one a modality."""
    folders = {modality: tmp_path_factory.mktemp("series") / f"PLANTED_{modality}" for modality in SAMPLES}
    for modality, folder in folders.items():
        MAKE["write_series"](nib.load(SAMPLES[modality]), folder, **PLANTED, **(CT if modality == "CT" else {}))
    return folders


@pytest.fixture(scope="module")
def detected(samples, tmp_path_factory):
    """Output folder and what was said, of a bundle on a sample, once each."""
    results = {}

    def detect(key, modality="T1"):
        if key not in results:
            output = tmp_path_factory.mktemp("out")
            results[key] = output, run_app(samples[modality], BUNDLES / key, output)
        return results[key]

    return detect


@pytest.mark.parametrize(("key", "modality"), [("dae", "T1"), ("mad_ad", "T1"), ("f_anogan_headct", "CT")])
def test_results_are_those_of_the_bundle(key, modality, samples, detected, report, tmp_path):
    output, done = detected(key, modality)
    assert done.returncode == 0, done.stderr
    expected = run_bundle(samples[modality], BUNDLES / key, tmp_path)
    check_equal(output, expected, report)
    record, summary = json.loads((expected / "run.json").read_text()), (output / "summary.txt").read_text()
    lines = dict(line.split(": ", 1) for line in summary.splitlines())
    assert float(lines["score"].split()[0]) == pytest.approx(record["volume_score"], rel=1e-5)
    assert float(lines["threshold"]) == pytest.approx(record["threshold"], rel=1e-5)
    assert lines["lesions"] == f"{record['lesions']}, {record['lesion_volume_ml']:.2f} ml"
    volumes = [float(value) for value in re.findall(r"^lesion \d+: ([\d.]+) ml", summary, re.MULTILINE)]
    assert len(volumes) == record["lesions"]
    assert sum(volumes) == pytest.approx(record["lesion_volume_ml"], abs=0.01 * len(volumes))
    assert record["weights_sha256"] in lines["weights"]


def test_objects_name_the_algorithm_and_the_source(samples, detected):
    output, _ = detected("dae")
    metadata = json.loads((BUNDLES / "dae" / "configs" / "metadata.json").read_text())
    digest = subprocess.check_output(["sha256sum", BUNDLES / "dae" / "models" / "model.pt"], text=True).split()[0]
    source = pydicom.dcmread(samples["T1"] / "IM0001")
    for name, modality in (("segmentation", "SEG"), ("anomaly_map", "OT")):
        dataset = pydicom.dcmread(output / f"{name}.dcm")
        assert dataset.Modality == modality
        assert (dataset.ManufacturerModelName, list(dataset.SoftwareVersions)) == ("dae", [metadata["version"], digest])
        for keyword in ("StudyInstanceUID", "FrameOfReferenceUID", "PatientID"):
            assert dataset[keyword].value == source[keyword].value
        assert dataset.ReferencedSeriesSequence[0].SeriesInstanceUID == source.SeriesInstanceUID
    (segment,) = pydicom.dcmread(output / "segmentation.dcm").SegmentSequence
    (algorithm,) = segment.SegmentationAlgorithmIdentificationSequence
    assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("dae", metadata["version"])
    assert algorithm.AlgorithmParameters == f"weights_sha256={digest}"


def test_nothing_but_dicom_tells_the_name(detected):
    output, done = detected("dae")
    assert sorted(path.name for path in output.iterdir()) == ["anomaly_map.dcm", "segmentation.dcm", "summary.txt"]
    named = [path.name for path in output.iterdir() if b"PLANTED" in path.read_bytes()]
    assert sorted(named) == ["anomaly_map.dcm", "segmentation.dcm"]  # which a PACS could not file otherwise
    assert "PLANTED" not in done.stdout + done.stderr


def test_pixels_that_are_not_square(report, tmp_path):
    """2 x 4 mm pixels and slices of 6 mm: where the SDK's reader of volumes gets the affine wrong."""
    volume = nib.load(MAKE["SAMPLE"]).slicer[:, ::2, ::3]
    MAKE["write_series"](volume, tmp_path / "in")
    assert pydicom.dcmread(tmp_path / "in" / "IM0001").PixelSpacing == [4, 2]
    done = run_app(tmp_path / "in", BUNDLES / "dae", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    check_equal(tmp_path / "out", run_bundle(tmp_path / "in", BUNDLES / "dae", tmp_path / "expected"), report)


@pytest.mark.skipif(not REAL, reason="UAD_TEST_DATA names no folder with series in dicom/*/")
@pytest.mark.parametrize("folder", REAL, ids=lambda folder: folder.name)
def test_real_series(folder, report, tmp_path):
    done = run_app(folder, BUNDLES / "dae", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    check_equal(tmp_path / "out", run_bundle(folder, BUNDLES / "dae", tmp_path / "expected"), report)
    assert "brain mask: atlas" in (tmp_path / "out" / "summary.txt").read_text()


def other_modality(folder, bundle):
    for path in folder.iterdir():
        dataset = pydicom.dcmread(path)
        dataset.SeriesDescription = "t2 tse"
        dataset.save_as(path)


def lost_slice(folder, bundle):
    (folder / "IM0040").unlink()


def no_dicom(folder, bundle):
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "PLANTED.txt").write_text("no image")


def cut_file(folder, bundle):
    (folder / "IM0040").write_bytes((folder / "IM0040").read_bytes()[:300])


def damaged_weights(folder, bundle):
    weights = bundle / "models" / "model.pt"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 255
    weights.write_bytes(content)


def damaged_metadata(folder, bundle):
    (bundle / "configs" / "metadata.json").write_text("{")


def bundle_of_others(folder, bundle):
    (bundle / "configs" / "metadata.json").write_text('{"name": "spleen", "version": "1"}')


BAD = {
    other_modality: "DicomError: .*: 0 series match series_rules.json; there are: series 3 't2 tse' MR",
    lost_slice: "DicomError: .*: series 3 't1 mprage': 1 slice.s. missing",
    no_dicom: "DicomError: .*: no DICOM files in it",
    cut_file: "DicomError: .*: DICOM file 40 of .* is damaged",
    damaged_weights: "BundleError: .*: not a weights file",
    damaged_metadata: "BundleError: .*metadata.json: no metadata .*; take the bundle anew",
    bundle_of_others: "BundleError: .*metadata.json: says nothing of its title, modalities; give",
}


@pytest.mark.parametrize("spoil", BAD, ids=lambda spoil: spoil.__name__)
def test_bad_input_is_one_line(spoil, samples, tmp_path):
    folder = shutil.copytree(samples["T1"], tmp_path / "in")
    bundle = shutil.copytree(BUNDLES / "vae", tmp_path / "vae", ignore=shutil.ignore_patterns("eval", "runs"))
    spoil(folder, bundle)
    done = run_app(folder, bundle, tmp_path / "out")
    assert done.returncode == 3
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert re.match(BAD[spoil], lines[0])
    assert "PLANTED" not in done.stdout + done.stderr
    assert not list((tmp_path / "out").glob("*"))


SETTINGS = (HERE / "app" / "app.yaml").read_text()


def test_settings_of_ones_own_and_nothing_of_the_patient(samples, detected, tmp_path):
    """A file of settings beside which there are no rules, and results without the patient, but for that the same."""
    (tmp_path / "my.yaml").write_text(SETTINGS.replace("strip: atlas", "strip: none"))
    where = {"HOLOSCAN_CONFIG_PATH": tmp_path / "my.yaml"}
    done = run_app(samples["T1"], BUNDLES / "dae", tmp_path / "out", "--deidentify", **where)
    assert done.returncode == 0, done.stderr
    named = pydicom.dcmread(detected("dae")[0] / "segmentation.dcm")
    nameless = pydicom.dcmread(tmp_path / "out" / "segmentation.dcm")
    assert (str(named.PatientName), str(nameless.PatientName)) == (PLANTED["PatientName"], "")
    assert nameless.PatientIdentityRemoved == "YES"
    assert nameless.PixelData == named.PixelData
    assert not [path for path in (tmp_path / "out").iterdir() if b"PLANTED" in path.read_bytes()]


REFUSED = {  # what differs from a good command, and the line
    "no input": ({"folder": "nowhere"}, "DicomError: nowhere: no such folder; give the folder .* -i"),
    "input is a file": ({"folder": HERE / "README.md"}, "DicomError: .*README.md: no such folder"),
    "no bundle": ({"bundle": "nowhere"}, "BundleError: nowhere: no such folder; give .* -m"),
    "output is a file": ({"output": HERE / "README.md"}, "OutputError: .*README.md: cannot be written .*-o"),
    "output cannot be made": ({"output": "/proc/nowhere"}, "OutputError: /proc/nowhere: cannot be written .*-o"),
    "several modalities": ({"bundle": BUNDLES / "berdiff_glioma"}, "BundleError: berdiff_glioma: works on .* together"),
    "no settings": ({"settings": None}, "SettingError: .*my.yaml: no such file of settings"),
    "no YAML": ({"settings": "detection: [strip"}, "SettingError: .*my.yaml: no settings in it .*app.yaml"),
    "misspelt": ({"settings": "detection:\n  stripp: atlas\n"}, "SettingError: .*no stripp; choose from strip,"),
    "of no use": (
        {"settings": "detection:\n  strip: magic\n"},
        "SettingError: .*choose one of atlas, deepbet, .*none",
    ),
    "no rules": ({"settings": "detection:\n  rules: mine.json\n"}, "SettingError: .*mine.json: no such file of rules"),
    "pattern that is none": (
        {"rules": {"SeriesDescription": "(t1"}},
        r"SettingError: .*mine.json: a rule cannot be used \(.*missing \)",
    ),
    "condition that is none": ({"rules": ["MR"]}, "SettingError: .*mine.json: a rule cannot be used .*; write it like"),
    "a head": (
        {"settings": "detection:\n  strip: none\n", "folder": "head"},
        "SkullStripError: .*; skull-strip it first .*, or set strip: atlas in my.yaml$",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_use_is_one_line(case, samples, tmp_path):
    change, line = REFUSED[case]
    command = {"folder": samples["T1"], "bundle": BUNDLES / "dae", "output": tmp_path / "out", "settings": SETTINGS}
    command |= change
    if rules := command.pop("rules", None):
        command["settings"] = "detection:\n  rules: mine.json\n"
        (tmp_path / "mine.json").write_text(json.dumps({"selections": [{"name": "T1", "conditions": rules}]}))
    if (settings := command.pop("settings")) is not None:
        (tmp_path / "my.yaml").write_text(settings)
    if command["folder"] == "head":
        command["folder"] = tmp_path / "head"
        MAKE["write_series"](nib.load(MAKE["SAMPLE"].with_name("head_lesions_T1.nii.gz")), command["folder"])
    done = run_app(**command, HOLOSCAN_CONFIG_PATH=tmp_path / "my.yaml")
    assert done.returncode == 3, done.stderr
    (said,) = done.stderr.splitlines()
    assert re.search(line, said)
    assert "--" not in said


DESCRIPTIONS = {  # of a series, and the selections that it belongs to
    "t1_mprage_sag_p2_iso": ["T1"],
    "Sag 3D FSPGR": ["T1"],
    "t1_space_cor": ["T1"],
    "AX T1 POST GAD": [],
    "t1_tse_tra+C": [],
    "t1_mprage_ce": [],
    "t2_tse_tra": ["T2"],
    "t2_tirm_tra_dark-fluid": ["FLAIR"],
    "Ax T2 FLAIR": ["FLAIR"],
    "T2*": [],
    "ep2d_diff_ADC": [],
}


@pytest.mark.parametrize("description", DESCRIPTIONS)
def test_rules(description):
    from monai.deploy.core import Application
    from monai.deploy.core.domain.dicom_series import DICOMSeries
    from monai.deploy.core.domain.dicom_study import DICOMStudy
    from monai.deploy.operators import DICOMSeriesSelectorOperator

    dataset = pydicom.Dataset()
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "M"]
    series, study = DICOMSeries("1.2.3"), DICOMStudy("1.2")
    series.Modality, series.SeriesDescription = "MR", description
    series.add_sop_instance(dataset)
    study.add_series(series)
    rules = json.loads((HERE / "app" / "series_rules.json").read_text())
    found = DICOMSeriesSelectorOperator(Application(), name="select").filter(rules, [study])
    assert [chosen.selection_name for one in found for chosen in one.selected_series] == DESCRIPTIONS[description]


def test_packager_reads_what_it_is_given(tmp_path):
    from holoscan_cli.packager.config_reader import ApplicationConfiguration
    from holoscan_cli.packager.models import Models

    configuration = ApplicationConfiguration()
    configuration.read(HERE / "app" / "app.yaml")
    assert configuration.title()
    requirements = (HERE / "requirements.txt").read_text().splitlines()
    assert set(configuration.pip_packages()) <= set(requirements)
    shutil.copytree(BUNDLES / "dae", tmp_path / "dae", ignore=shutil.ignore_patterns("eval", "runs"))
    assert Models().build(tmp_path) == {"dae": tmp_path / "dae"}
