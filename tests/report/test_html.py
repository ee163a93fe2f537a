"""The report holds what is there, asks nothing of a network, and takes names for text."""

from __future__ import annotations

import base64
import gzip
import json
import shutil

import nibabel as nib
import numpy as np
import pytest
from pages import Page, assert_asks_for_nothing
from PIL import Image
from typer.testing import CliRunner

from common.cli import app
from common.detection.calibration import origin_in_words, percentile_in_words
from common.detection.reliability import verdict
from common.errors import ResultError, UADError
from common.report.html import map_row, write_report
from common.report.viewer import niivue
from common.results.read import CaseFiles, read_lesions


@pytest.fixture(scope="module")
def case_page(make_case, tmp_path_factory):
    """Of a registered case: MNI152 is 10 mm to the left of the scan's world."""
    to_mni = nib.affines.from_matvec(np.diag([1.0, 2.0, 1.0]), [-10, 0, 5])
    folder = make_case(tmp_path_factory.mktemp("case") / "out", to_mni=to_mni, spacing_mm=1.5)
    write_report(folder)
    return folder, Page(folder / "report.html")


def test_case_says_what_was_found(case_page):
    folder, page = case_page
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    lesion = read_lesions(CaseFiles("scan", folder))[0]
    for text in ("scan", "dae", "ab" * 32, run["input_sha256"]["image"], f"torch {run['versions']['torch']}"):
        assert text in page.text
    assert "not a medical device" in page.text
    words = origin_in_words(run["threshold_origin"])
    assert words.startswith("calibrated on ")
    assert f"threshold {run['threshold']:.3g}, {words}" in page.text
    assert percentile_in_words(run) in page.text
    x, y, z = (lesion[axis] for axis in ("x_mm", "y_mm", "z_mm"))
    row = page.cells[0]
    assert row[:3] == ["1", f"{lesion['volume_ml']:.2f}", f"{x:.1f}, {y:.1f}, {z:.1f}"]
    assert [float(part) for part in row[3].split(",")] == pytest.approx([x - 10, 2 * y, z + 5], abs=0.051)
    assert row[4:] == [f"{lesion['mean_map']:.3g}", f"{lesion['max_map']:.3g}"]
    assert "MNI coordinates" in page.text
    assert_asks_for_nothing(page)


def test_viewer_has_the_volumes(case_page, phantom):
    folder, page = case_page
    data = json.loads(page.scripts["data"])
    assert [volume["name"] for volume in data["volumes"]] == ["scan", "reconstruction", "map"]
    scan, reconstruction, anomaly_map = (
        nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(volume["base64"]))) for volume in data["volumes"]
    )
    original = nib.load(folder / "anomaly_map.nii.gz")
    assert anomaly_map.get_data_dtype() == np.uint8
    assert np.prod(anomaly_map.shape) < np.prod(original.shape)  # the air is left out
    values = anomaly_map.get_fdata()
    assert values.max() == pytest.approx(original.get_fdata().max(), rel=1e-3)
    # the same place in the world holds the same value, to half a step of 255
    index = np.argwhere(values > 0)
    there = nib.affines.apply_affine(np.linalg.inv(original.affine) @ anomaly_map.affine, index).round().astype(int)
    assert np.abs(original.get_fdata()[tuple(there.T)] - values[tuple(index.T)]).max() <= values.max() / 500
    image, brain, _ = phantom.on_grid(scan.shape, scan.affine)
    assert np.abs(scan.get_fdata() - image)[brain].max() < 0.01 * image.max()
    assert reconstruction.get_fdata()[brain] == pytest.approx(300, rel=1e-3)
    assert data["voxel_ml"] == pytest.approx(1.5**3 / 1000)
    assert data["peak_mm"] in np.round(nib.affines.apply_affine(scan.affine, np.argwhere(values == values.max())), 9)


def test_scan_that_moved_is_given(make_case, tmp_path):
    folder = make_case(tmp_path / "out", scan_dir=tmp_path / "scans")
    moved = shutil.move(tmp_path / "scans", tmp_path / "moved")
    write_report(folder)
    page = Page(folder / "report.html")
    assert [volume["name"] for volume in json.loads(page.scripts["data"])["volumes"]] == ["reconstruction", "map"]
    assert "--scan" in page.text
    write_report(folder, moved / "scan.nii.gz")
    page = Page(folder / "report.html")
    assert json.loads(page.scripts["data"])["has_scan"]
    assert "--scan" not in page.text
    assert "moved" not in page.source.replace(niivue(), "")  # paths may tell names


def test_other_scan_is_refused(make_case, save_nifti, tmp_path):
    folder = make_case(tmp_path / "out")
    scan = nib.load(tmp_path / "scan.nii.gz")
    other = save_nifti(tmp_path / "other.nii.gz", scan.get_fdata(dtype=np.float32) + 1, scan.affine)
    with pytest.raises(ResultError, match="not the scan of scan"):
        write_report(folder, other)
    with pytest.raises(UADError, match="no such file"):
        write_report(folder, tmp_path / "none.nii.gz")
    shutil.copy(other, tmp_path / "scan.nii.gz")  # another file has its name now
    write_report(folder)
    assert not json.loads(Page(folder / "report.html").scripts["data"])["has_scan"]


def test_detect_of_one_scan_gives_the_case(make_case, tmp_path):
    make_case(tmp_path / "out")
    (tmp_path / "out" / "status.tsv").write_text("case\tstatus\tseconds\tmessage\nscan\tok\t1.00\t\n", encoding="utf-8")
    result = CliRunner().invoke(app, ["report", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert result.output.strip() == str(tmp_path / "out" / "report.html")
    assert "data" in Page(tmp_path / "out" / "report.html").scripts
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"scan", "status.tsv", "report.html"}


def test_unreliable_case_has_a_red_banner_in_its_own_page(make_case, tmp_path):
    """Its line in status.tsv is not that of a failure; the banner says each doubt once, and other warnings stay."""
    doubts = ["slices of <5.0> mm", "another contrast"]
    make_case(tmp_path / "out", result=verdict(doubts), warnings=["of another kind"])
    status = "case\tstatus\tseconds\tmessage\nscan\tunreliable\t1.00\tslices\n"
    (tmp_path / "out" / "status.tsv").write_text(status, encoding="utf-8")
    write_report(tmp_path / "out")
    page = Page(tmp_path / "out" / "report.html")
    assert "data" in page.scripts
    banner = {"class": "unreliable", "role": "alert"}
    assert [attributes for tag, attributes in page.elements if attributes.get("class") == "unreliable"] == [banner]
    assert "Unreliable, do not interpret: slices of <5.0> mm; another contrast" in page.text
    assert page.text.count("another contrast") == 1
    assert "of another kind" in page.text
    make_case(tmp_path / "out", "other")
    write_report(tmp_path / "out")
    page = Page(tmp_path / "out" / "report.html")
    assert [row[0].split()[0] for row in page.cells[:2]] == ["other", "scan"]  # no table of failures comes first
    assert page.cells[0][0] == "other"
    assert page.cells[1][0].startswith("scan unreliable, do not interpret")
    assert page.text.count("Unreliable, do not interpret: slices of <5.0> mm; another contrast") == 1
    marked = [
        (tag, attributes.get("id", "")) for tag, attributes in page.elements if "doubtful" in class_of(attributes)
    ]
    assert marked == [("tr", ""), ("details", "case-2")]  # the row and the case, not those of the other one


def class_of(attributes):
    return (attributes.get("class") or "").split()


def test_reliable_case_has_no_banner(case_page):
    assert "alert" not in [attributes.get("role") for _, attributes in case_page[1].elements]
    assert not [tag for tag, attributes in case_page[1].elements if "doubtful" in class_of(attributes)]


def test_numbers_of_an_unreliable_case_are_marked_and_not_compared(make_case, tmp_path):
    make_case(tmp_path / "out", result=verdict(["another contrast"]))
    write_report(tmp_path / "out")
    elements = Page(tmp_path / "out" / "report.html").elements
    classes = [name for _, attributes in elements for name in class_of(attributes)]
    assert "doubtful" in classes and "gauge" not in classes


def test_warnings_say_that_they_are_ones(make_case, tmp_path):
    """Not by a sign or a colour alone."""
    for name in ("a", "b"):
        folder = make_case(tmp_path / "out", name, warnings=["the calibration is of other settings"])
    write_report(folder)
    assert "⚠ Warning: the calibration is of other settings" in Page(folder / "report.html").text
    write_report(tmp_path / "out")
    assert "⚠ Warning: the calibration is of" in Page(tmp_path / "out" / "report.html").cells[0][0]


def test_small_picture_is_the_row_of_the_map(make_case, tmp_path):
    """Where `save_preview` says it is; of earlier versions the third of four rows."""
    folder = make_case(tmp_path / "out")
    with Image.open(folder / "preview.png") as picture:
        left, top, right, bottom = map_row(picture)
        assert 0 < left < right < picture.width and picture.height / 3 < top < bottom < picture.height
        picture.info.pop("map_row")
        assert map_row(picture) == (0, picture.height // 2, picture.width, 3 * picture.height // 4)


def test_case_of_a_bids_derivative(make_case, tmp_path):
    make_case(tmp_path / "out", "sub-01", entities="sub-01_ses-1_desc-dae")
    write_report(tmp_path / "out" / "sub-01")
    page = Page(tmp_path / "out" / "sub-01" / "report.html")
    assert "sub-01_ses-1" in page.text
    assert "data" in page.scripts


def test_nothing_found(make_case, tmp_path):
    folder = make_case(tmp_path / "out", strength=0.0, input_sha256={})
    write_report(folder)
    page = Page(folder / "report.html")
    assert "Nothing is above the threshold" in page.text
    assert page.cells == []


def test_cohort_is_sorted_by_score_and_says_what_failed(cohort_folder):
    write_report(cohort_folder)
    page = Page(cohort_folder / "report.html")
    markup = next(path.name for path in cohort_folder.iterdir() if "onerror" in path.name)
    failed, first, second, third = page.cells[:4]
    assert failed[:2] == ["bad", "ImageShapeError"]
    assert failed[2].startswith("bad.nii.gz: </script><script>")
    assert [row[0] for row in (first, second, third)] == ["high", markup, "low"]
    values = [float(a["data-value"]) for t, a in page.elements if t == "td" and a.get("data-value", "x")[0].isdigit()]
    scores = values[::4]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] == json.loads((cohort_folder / "high" / "run.json").read_text(encoding="utf-8"))["volume_score"]
    assert len([1 for tag, a in page.elements if tag == "img" and a["src"].startswith("data:image/jpeg")]) == 6
    assert not [a for tag, a in page.elements if tag == "img" and "onerror" in a]
    assert_asks_for_nothing(page)


def test_cohort_links_to_the_reports_of_cases(make_case, tmp_path):
    for name in ("javascript:alert(1)", "b"):
        make_case(tmp_path / "out", name)
    write_report(tmp_path / "out" / "javascript:alert(1)")
    write_report(tmp_path / "out")
    page = Page(tmp_path / "out" / "report.html")
    links = [a["href"] for tag, a in page.elements if tag == "a" and "report.html" in a["href"]]
    assert links == ["javascript%3Aalert%281%29/report.html"]
    assert_asks_for_nothing(page)


def test_broken_case_does_not_hide_the_others(make_case, tmp_path):
    for name in ("a", "b", "c"):
        make_case(tmp_path / "out", name)
    (tmp_path / "out" / "b" / "run.json").write_text("{", encoding="utf-8")
    (tmp_path / "out" / "c" / "preview.png").write_bytes(b"no picture")
    write_report(tmp_path / "out")
    rows = Page(tmp_path / "out" / "report.html").cells
    assert [row[:2] for row in rows[:2]] == [["b", "ResultError"], ["c", "ResultError"]]
    assert rows[2][0] == "a"


def test_same_result_same_bytes(case_page, benchmark_folder):
    for folder in (case_page[0], benchmark_folder):
        pages = [write_report(folder).read_bytes() for _ in range(2)]
        assert pages[0] == pages[1]


@pytest.mark.parametrize(
    ("name", "content", "fact"),
    [
        ("run.json", "{", "cannot be read"),
        ("run.json", "[]", "not a JSON object"),
        ("run.json", '{"bundle": "dae"}', "threshold"),
        ("run.json", '{"threshold": NaN}', "threshold"),
        ("lesions.csv", "a,b\n1,2\n", "not a table of lesions"),
        ("lesions.csv", "lesion,volume_ml,x_mm,y_mm,z_mm,mean_map,max_map\n1,x,0,0,0,0,0\n", "not a table of lesions"),
        ("to_mni.tfm", "no transform", "not a transform"),
        ("anomaly_map.nii.gz", "no image", "anomaly_map"),
        ("reconstruction.nii.gz", None, "no such file"),
        ("preview.png", None, "no such picture"),
    ],
)
def test_broken_files_are_named(name, content, fact, make_case, tmp_path):
    folder = make_case(tmp_path / "out")
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_text(content, encoding="utf-8")
    with pytest.raises(ResultError, match=fact) as error:
        write_report(folder)
    assert name in str(error.value)
    assert str(error.value).count("\n") == 0
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize("kind", ["missing", "empty", "other", "file"])
def test_folder_without_results(kind, tmp_path):
    folder = tmp_path / "out"
    if kind in ("empty", "other"):
        folder.mkdir()
    if kind == "other":
        (folder / "notes.txt").write_text("none", encoding="utf-8")
    if kind == "file":
        folder.write_text("none", encoding="utf-8")
    result = CliRunner().invoke(app, ["report", str(folder)])
    assert result.exit_code == 3
    assert result.stderr.startswith("ResultError: ")
    assert result.stderr.count("\n") == 1


def test_one_scan_for_many_cases_is_refused(cohort_folder, tmp_path):
    with pytest.raises(ResultError, match="many cases"):
        write_report(cohort_folder, tmp_path / "scan.nii.gz")
