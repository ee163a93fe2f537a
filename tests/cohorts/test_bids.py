import json

import pytest

from common.cohorts.bids import check_dataset, describe_outputs, find_scans, is_bids, write_description
from common.cohorts.cases import find_cases
from common.errors import CohortError

FILES = [
    "sub-01/anat/sub-01_T1w.nii.gz",
    "sub-01/anat/sub-01_FLAIR.nii.gz",
    "sub-01/anat/sub-01_ce-gd_T1w.nii.gz",
    "sub-01/func/sub-01_task-rest_bold.nii.gz",
    "sub-02/ses-a/anat/sub-02_ses-a_run-1_T1w.nii.gz",
    "sub-02/ses-a/anat/sub-02_ses-a_run-2_T1w.nii",
    "sub-02/ses-b/anat/sub-02_ses-b_T1w.nii.gz",
    "sub-02/ses-b/anat/sub-02_ses-b_T1w.json",
    "derivatives/other/sub-01/anat/sub-01_T1w.nii.gz",
]


@pytest.fixture
def root(tmp_path):
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "dataset_description.json").write_text("{}", encoding="utf-8")
    return tmp_path


def test_every_scan_of_one_modality_is_a_case(root):
    assert is_bids(root)
    assert not is_bids(root / "sub-01")
    items = find_scans(root, ["T1"])
    assert [item["subject"] for item in items] == ["sub-01", "sub-02_ses-a_run-1", "sub-02_ses-a_run-2", "sub-02_ses-b"]
    assert items[2] == {
        "subject": "sub-02_ses-a_run-2",
        "image": str(root / FILES[5]),
        "derivative": "sub-02/ses-a/anat/sub-02_ses-a_run-2",
        "dataset": str(root),
        "sources": ["bids:source:sub-02/ses-a/anat/sub-02_ses-a_run-2_T1w.nii"],
    }
    assert find_cases(root, ["T1"]) == items
    assert [item["image"] for item in find_scans(root, ["T1CE"])] == [str(root / FILES[2])]


def test_several_modalities_are_one_case_a_session(root):
    (root / FILES[5]).unlink()
    items = find_scans(root, ["FLAIR", "T1"])
    assert items[0] == {
        "subject": "sub-01",
        "image": [str(root / FILES[1]), str(root / FILES[0])],
        "derivative": "sub-01/anat/sub-01",
        "dataset": str(root),
        "sources": ["bids:source:sub-01/anat/sub-01_FLAIR.nii.gz", "bids:source:sub-01/anat/sub-01_T1w.nii.gz"],
    }
    assert items[1]["image"][0] == str(root / "sub-02/ses-a/anat/sub-02_ses-a_FLAIR.nii.gz")  # said when it is opened


def test_two_scans_of_a_modality_in_a_session_are_refused(root):
    with pytest.raises(CohortError, match="several scans of T1"):
        find_scans(root, ["T1", "FLAIR"])


@pytest.mark.parametrize("label", ["01", "sub-01"])
def test_participants_are_chosen(root, label):
    assert [item["subject"] for item in find_scans(root, ["T1"], [label])] == ["sub-01"]
    with pytest.raises(CohortError, match="no participant 07"):
        find_scans(root, ["T1"], [label, "07"])


def test_nothing_of_a_modality(root):
    with pytest.raises(CohortError, match="no scan of T2"):
        find_scans(root, ["T2"])


@pytest.mark.parametrize("place", ["out", "data/derivatives/uad-dae"])
def test_description_is_written_once_and_links_the_scans(place, tmp_path):
    data, out = tmp_path / "data", tmp_path / place
    data.mkdir()
    write_description(out, "dae", str(data))
    paths = [out / "dataset_description.json", out / ".bidsignore"]
    description = json.loads(paths[0].read_text(encoding="utf-8"))
    assert description["DatasetType"] == "derivative"
    assert description["GeneratedBy"][0]["Name"] == "uad-bundles"
    assert description["DatasetLinks"] == {"source": data.as_uri() if place == "out" else "../.."}
    for path in paths:
        path.write_text("mine", encoding="utf-8")
    write_description(out, "dae", str(data))
    assert [path.read_text(encoding="utf-8") for path in paths] == ["mine"] * 2


def test_sidecars_say_what_each_image_was_made_of():
    sources = ["bids:source:sub-01/anat/sub-01_T1w.nii.gz", "bids:source:sub-01/anat/sub-01_FLAIR.nii.gz"]
    described = describe_outputs("dae", sources)
    assert set(described) == {"anomaly_map.json", "segmentation.json", "reconstruction.json"}
    for sidecar in described.values():
        assert (sidecar["Sources"], sidecar["SpatialReference"]) == (sources, sources[0])
        assert "dae" in sidecar["Description"]
    assert described["segmentation.json"]["Type"] == "Lesion"


def test_folder_that_is_no_dataset(tmp_path):
    with pytest.raises(CohortError, match="no BIDS dataset"):
        check_dataset(tmp_path)


def add(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_of_complex_images_the_magnitude_alone_is_a_scan(root):
    add(root, *[f"sub-03/anat/sub-03_part-{part}_T1w.nii.gz" for part in ("mag", "phase", "real", "imag")])
    (item,) = find_scans(root, ["T1"], ["03"])
    assert item["image"] == str(root / "sub-03/anat/sub-03_part-mag_T1w.nii.gz")
    assert item["derivative"] == "sub-03/anat/sub-03_part-mag"
    add(root, "sub-04/anat/sub-04_part-phase_T1w.nii.gz")
    with pytest.raises(CohortError, match="no scan of T1"):
        find_scans(root, ["T1"], ["04"])


@pytest.mark.parametrize(
    ("name", "derivative"),
    [
        ("sub-03_desc-brain_T1w.nii.gz", "sub-03"),
        ("sub-03_space-MNI152NLin2009cAsym_res-2_desc-preproc_T1w.nii.gz", "sub-03_space-MNI152NLin2009cAsym_res-2"),
        ("sub-03_acq-ce_desc-brain_T1w.nii", "sub-03_acq-ce"),
    ],
)
def test_the_description_of_the_results_takes_the_place_of_that_of_the_scan(name, derivative, root):
    add(root, f"sub-03/anat/{name}")
    (item,) = find_scans(root, ["T1"], ["03"])
    assert item["subject"] == derivative
    assert item["derivative"] == f"sub-03/anat/{derivative}"


def test_scans_that_differ_in_their_description_alone_are_refused(root):
    add(root, "sub-03/anat/sub-03_desc-brain_T1w.nii.gz", "sub-03/anat/sub-03_T1w.nii.gz")
    with pytest.raises(CohortError, match="would give results of one name; choose one"):
        find_scans(root, ["T1"], ["03"])


@pytest.mark.parametrize(
    "name",
    [
        "sub-04_T1w.nii.gz",
        "sub-03_ses-a_T1w.nii.gz",
        "sub-03_defaced_T1w.nii.gz",
        "sub-03_desc-brain_desc-anomaly_T1w.nii.gz",
        "sub-03_acq-a-b_T1w.nii.gz",
        "T1_sub-03_T1w.nii.gz",
    ],
)
def test_name_that_is_not_of_its_folder_is_refused(name, root):
    add(root, f"sub-03/anat/{name}")
    with pytest.raises(CohortError, match="the name is not sub-03, entities") as caught:
        find_scans(root, ["T1"], ["03"])
    assert caught.value.source == str(root / "sub-03" / "anat" / name)


def test_session_is_that_of_the_folder(root):
    add(root, "sub-03/ses-a/anat/sub-03_T1w.nii.gz")
    with pytest.raises(CohortError, match="the name is not sub-03_ses-a, entities"):
        find_scans(root, ["T1"], ["03"])
