"""No command writes over what it reads, or over what is not its own earlier result, however the paths are written."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from common import bundle
from common.bundle import BUNDLES_DIR, run_inference
from common.cli import app
from common.cohorts.kinds import KINDS
from common.errors import OutputError, UADError
from common.outputs import Inputs, case_place, check_case_folder, check_places, is_safe_name, put_in_place
from common.sharing import archive
from common.sharing.archive import write_bundle
from common.workflows.training_handlers import SaveWeights

LAYOUTS = {
    kind: ["--layout", name] for kind, name in (("glioma", "tcga_lgg"), ("healthy", "ct"), ("patients", "brats"))
}


def digests(folder):
    """Of all files in a folder, and where its links lead, by their paths."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[path] = path.readlink()
        elif path.is_file():
            found[path] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def thin_brain(phantom, save_nifti, path):
    """A brain of four slices."""
    (height, width, depth), affine = phantom.grid(spacing_mm=(4, 4, 4))
    affine[:3, 3] += affine[:3, :3] @ (0, 0, depth // 2 - 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    return save_nifti(path, phantom.on_grid((height, width, 4), affine)[0], affine)


@pytest.fixture(scope="module")
def original(phantom, save_nifti, write_series, tmp_path_factory):
    """Inputs of all kinds in one folder."""
    root = tmp_path_factory.mktemp("original")
    write_series(root / "scans" / "patient1")
    scan = thin_brain(phantom, save_nifti, root / "flat" / "sub01.nii.gz")

    def put(name, content=None):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            shutil.copy(scan, path)
        else:
            path.write_text(content, encoding="utf-8")

    put("flat/sub01/raw.dat", "raw")
    put("flat/.nii.gz")
    put("flat/w.nii.gz")
    shutil.copytree(BUNDLES_DIR / "dae" / "models", root / "flat" / "w")
    put("flat/linked.nii.gz")
    (root / "flat" / "linked").symlink_to(root / "flat" / "sub01")
    put("deep/T1/T1.nii.gz")
    put("deep/results/status.tsv", "what\tmine\n")
    put("bids/dataset_description.json", json.dumps({"Name": "raw", "BIDSVersion": "1.10.0"}))
    put("bids/sub-01/anat/sub-01_T1w.nii.gz")
    rows = ["s1,train,s1/T1.nii.gz", "s2,val,s2/T1.nii.gz", "s3,test,s3/T1.nii.gz"]
    for row in rows:
        put(f"cohort/{row.split(',')[2]}")
    table = "\n".join(["subject,split,T1,brain,lesion", *(f"{row},," for row in rows)]) + "\n"
    for name in ("cohort.csv", "benchmark.csv", "model.csv"):
        put(f"cohort/{name}", table.replace("s1/T1.nii.gz", "model.pt") if name == "model.csv" else table)
    put("cohort/model.pt")
    put("outer.csv", "subject,split,T1\ncohort,train,cohort/T1.nii.gz\n")
    put("cohort/T1.nii.gz")
    put("dicom.csv", "subject,split,T1\na,train,scans/patient1\n")
    put("other/benchmark.md", "mine")
    put("other/vae/result.json", "{}")
    put("other/report.html", "<html>mine</html>")
    put("other/status.tsv", "case\tstatus\tseconds\tmessage\na\tError\t1.00\tx\n")
    put("other/model.pt", "mine")
    for name in ("T1", "FLAIR", "T1CE", "seg"):
        put(f"glioma/TCGA_CS_4941_{name}.nii.gz")
    put("linked_glioma/x.txt", "x")
    (root / "linked_glioma" / "TCGA_CS_4941_seg.nii.gz").symlink_to(root / "glioma" / "TCGA_CS_4941_seg.nii.gz")
    (root / "to_scans").symlink_to(root / "scans")
    (root / "to_patient1").symlink_to(root / "scans" / "patient1")
    (root / "aside").mkdir()
    (root / "aside" / "patient1").symlink_to(root / "scans" / "patient1")
    (root / "to_cohort").symlink_to(root / "cohort")
    (root / "to_image.json").symlink_to(root / "cohort" / "s3" / "T1.nii.gz")
    return root


@pytest.fixture
def root(original, monkeypatch):
    """The inputs, which stay as they are: nothing of them is changed, and nothing is added, unless a test allows it."""
    before = digests(original)
    monkeypatch.chdir(original)
    yield original
    after = digests(original)
    assert {path: after.get(path) for path in before} == before
    assert after.keys() == before.keys()


DETECT = {
    "a DICOM folder at the place of the case": ("scans/patient1", "scans"),
    "the same, through a link to the output": ("scans/patient1", "to_scans"),
    "the same, through a link of that name": ("aside/patient1", "scans"),
    "the same, through the parent of a link": ("aside/patient1", "aside"),
    "the output is the input": ("scans/patient1", "scans/patient1"),
    "the output is a link to the input": ("scans/patient1", "to_patient1"),
    "the output lies in the input": ("scans/patient1", "scans/patient1/out"),
    "the parent of the input": ("scans", "."),
    "raw data beside a file": ("flat/sub01.nii.gz", "flat"),
    "a link to raw data beside a file": ("flat/linked.nii.gz", "flat"),
    "a file without a name": ("flat/.nii.gz", "flat/sub01"),
    "a folder of images at the place of a case": ("deep/T1", "deep"),
    "a case of a cohort": ("cohort/cohort.csv", "cohort"),
    "a raw BIDS dataset": ("bids", "bids"),
    "a table of another program": ("flat/sub01.nii.gz", "deep/results"),
    "the output is a file": ("flat/w.nii.gz", "flat/sub01.nii.gz"),
}


def refused(*arguments, error="OutputError"):
    """What the command says, which must end with one line and exit code 3."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 3, done.output + repr(done.exception)
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"{error}: ")
    return done.stderr


@pytest.fixture
def unloaded(monkeypatch):
    """No model may be loaded: what is refused is refused before."""

    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("common.cli.load_workflow", load)
    monkeypatch.setattr("common.bundle.load_workflow", load)


@pytest.mark.parametrize("kind", DETECT)
def test_detect(kind, root, unloaded):
    image, output = DETECT[kind]
    error = "CohortError" if kind == "a file without a name" else "OutputError"
    refused("detect", image, "-m", "dae", "-o", output, error=error)
    refused("detect", root / image, "-m", "dae", "-o", root / output, "--overwrite", error=error)


@pytest.mark.parametrize(("folder", "image", "output"), [(".", ".", ".."), (".", ".", "."), ("..", "patient1", ".")])
def test_detect_from_inside(folder, image, output, root, unloaded, monkeypatch):
    monkeypatch.chdir(root / "scans" / "patient1" / folder)
    refused("detect", image, "-m", "dae", "-o", output)


def test_detect_with_weights_at_the_place_of_the_case(root, unloaded):
    message = refused("detect", "flat/w.nii.gz", "-m", "dae", "-o", "flat", "--weights", "flat/w/model.pt")
    assert "the folder of the input" in message


@pytest.mark.parametrize("kind", [kind for kind in DETECT if "file" not in kind and "table" not in kind])
def test_bundle_that_monai_runs(kind, root):
    """The same below the command: `python -m monai.bundle run --image ... --output_dir ...`."""
    image, output = DETECT[kind]
    with pytest.raises(UADError):
        run_inference("dae", ["inference.json"], image=image, output_dir=output)


@pytest.mark.parametrize(
    ("cohort", "output"),
    [
        ("cohort/cohort.csv", "cohort"),
        ("cohort/cohort.csv", "to_cohort"),
        ("to_cohort/cohort.csv", "cohort"),
        ("outer.csv", "."),
        ("dicom.csv", "scans/patient1/out"),
        ("dicom.csv", "to_patient1"),
        ("cohort/cohort.csv", "other/report.html"),
    ],
)
def test_prepare(cohort, output, root):
    refused("prepare", cohort, "-o", output)


def test_prepare_over_other_files(root):
    """Of no cohort, and not written by it."""
    (root / "new.csv").write_text("subject,split,T1\ncohort,train,flat/sub01.nii.gz\n", encoding="utf-8")
    try:
        assert "is not of an earlier run" in refused("prepare", "new.csv", "-o", ".")
    finally:
        (root / "new.csv").unlink()


@pytest.mark.parametrize(
    "result",
    [
        "cohort/cohort.csv",
        "cohort/s3/T1.nii.gz",
        "to_cohort/s1/T1.nii.gz",
        "to_image.json",
        "flat/w/model.pt",
        "flat/sub01/raw.dat",
        "other/vae/result.json",
        "other",
        "cohort/s3/T1.nii.gz/result.json",
    ],
)
def test_evaluate(result, root, unloaded):
    refused("evaluate", "cohort/cohort.csv", "-m", "dae", "-o", result, "--weights", "flat/w/model.pt")


def test_evaluate_beside_what_would_be_lost(unloaded, root, tmp_path):
    """The bootstrap replicates of a result are a file of their own."""
    (tmp_path / "result.replicates.json").write_text("{}", encoding="utf-8")
    assert "result.replicates.json" in refused(
        "evaluate", "cohort/cohort.csv", "-m", "dae", "-o", tmp_path / "result.json"
    )


@pytest.mark.parametrize("result", ["cohort/cohort.csv", "cohort/s3/T1.nii.gz", "flat/w/model.pt", "other"])
def test_evaluation_that_monai_runs(result, root):
    paths = {"cohort": "cohort/cohort.csv", "result": result, "weights": str(root / "flat" / "w" / "model.pt")}
    with pytest.raises(OutputError):
        run_inference("dae", ["inference.json", "evaluate.json"], **paths, **{"task::baselines": False})


@pytest.mark.parametrize(
    ("cohort", "output"), [("cohort/benchmark.csv", "cohort"), ("cohort/cohort.csv", "other"), ("dicom.csv", "scans")]
)
def test_benchmark(cohort, output, root, unloaded):
    if output == "scans":
        output = "scans/patient1/out"
    refused("benchmark", cohort, "-o", output, "-m", "vae")


@pytest.mark.parametrize(
    ("cohort", "output"),
    [
        ("cohort/model.csv", "cohort"),
        ("cohort/model.csv", "to_cohort"),
        ("cohort/cohort.csv", "other"),
        ("dicom.csv", "scans/patient1"),
    ],
)
def test_train(cohort, output, root, unloaded):
    refused("train", "vae", cohort, "-o", output)


@pytest.mark.parametrize("output", ["glioma", "glioma/cohort", "GLIOMA_LINK"])
@pytest.mark.parametrize("kind", KINDS)
def test_cohort(kind, output, root, tmp_path):
    if output == "GLIOMA_LINK":
        output = tmp_path / "link"
        output.symlink_to(root / "glioma")
    assert "lies in the input" in refused("cohort", kind, "glioma", "-o", output, *LAYOUTS.get(kind, ()))


def test_cohort_over_what_is_linked(root):
    refused("cohort", "glioma", "linked_glioma", "-o", "glioma", "--layout", "tcga_lgg")


def test_training_that_monai_runs(root):
    """Weights are not written over an image, a table or a folder; this is said before the first epoch."""
    for name in ("cohort/cohort.csv", "cohort/s1/T1.nii.gz", "other"):
        with pytest.raises(OutputError, match="weights"):
            SaveWeights(None, str(root / name)).check(None)
    for name in ("flat/w/model.pt", "new/model.pt"):
        SaveWeights(None, str(root / name)).check(None)


def test_report_over_another_page(root):
    assert "is not a report" in refused("report", "other")


@pytest.mark.parametrize("output_format", ["bundle", "torchscript", "onnx"])
@pytest.mark.parametrize("place", ["", "models"])
def test_export_into_the_bundle(output_format, place, tmp_path, monkeypatch):
    shutil.copytree(BUNDLES_DIR / "dae", tmp_path / "dae")
    before = digests(tmp_path)
    for module in (bundle, archive):
        monkeypatch.setattr(module, "BUNDLES_DIR", tmp_path, raising=False)
    message = refused("export", "dae", "-o", tmp_path / "dae" / place, "--format", output_format)
    assert "lies in the input" in message
    assert digests(tmp_path) == before


def test_import_of_a_folder_around_the_bundles(tmp_path, monkeypatch):
    """A bundle is only read; it is not added into itself."""
    files = {"configs/metadata.json": json.dumps({"name": "small"}).encode()}
    write_bundle("small", files, tmp_path)
    before = digests(tmp_path)
    monkeypatch.setenv("UAD_BUNDLES", str(tmp_path / "small" / "bundles"))
    assert "lies in the input" in refused("import", tmp_path / "small")
    assert digests(tmp_path) == before


def test_results_beside_the_inputs(phantom, save_nifti, tmp_path, monkeypatch):
    """`-o .` is fine where nothing is in the way; again, and over an earlier result, of which what others put stays."""
    thin_brain(phantom, save_nifti, tmp_path / "sub01.nii.gz")
    before = digests(tmp_path)
    monkeypatch.chdir(tmp_path)
    command = ["detect", "sub01.nii.gz", "-m", "dae", "-o", "."]
    assert CliRunner().invoke(app, command).exit_code == 0
    record = json.loads(Path("sub01/run.json").read_text(encoding="utf-8"))
    assert record["subject"] == "sub01"
    Path("sub01/notes.txt").write_text("mine", encoding="utf-8")
    Path("sub01/report.html").write_text("of the earlier result", encoding="utf-8")
    written = Path("sub01/anomaly_map.nii.gz").stat().st_mtime_ns
    assert CliRunner().invoke(app, [*command, "--overwrite"]).exit_code == 0
    assert Path("sub01/anomaly_map.nii.gz").stat().st_mtime_ns != written
    assert Path("sub01/notes.txt").read_text(encoding="utf-8") == "mine"
    assert not Path("sub01/report.html").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"sub01.nii.gz", "sub01", "status.tsv"}
    assert {path: digests(tmp_path)[path] for path in before} == before
    message = refused("detect", "sub01.nii.gz", "-m", "vae", "-o", ".", "--overwrite")  # the result of another method
    assert "holds a result of dae" in message


def test_a_name_that_is_not_utf8(phantom, save_nifti, tmp_path):
    """The case gets a name that every system has; it and the others are done, and what fails is said."""
    folder, out = tmp_path / "in", tmp_path / "out"
    scan = thin_brain(phantom, save_nifti, folder / "a.nii.gz")
    for name in (b"M\xfcller.nii.gz", b"z.nii.gz"):
        shutil.copy(scan, folder / os.fsdecode(name))
    (folder / os.fsdecode(b"l\xf6st.nii.gz")).write_bytes(b"no image")
    for _ in range(2):
        done = CliRunner().invoke(app, ["detect", str(folder), "-m", "dae", "-o", str(out)])
        assert done.exit_code == 3, done.output
        with (out / "status.tsv").open(newline="", encoding="utf-8") as file:
            rows = {row["case"]: row for row in csv.DictReader(file, delimiter="\t")}
        assert {case: row["status"] for case, row in rows.items()} == {
            "M_ller": "unreliable",  # of thick slices
            "a": "unreliable",
            "l_st": "ImageFileError",
            "z": "unreliable",
        }
        assert "l\\udcf6st.nii.gz: named .gz but not compressed" in rows["l_st"]["message"]
    assert {path.name for path in out.iterdir()} == {"M_ller", "a", "z", "status.tsv", "cases.csv", "lesions_all.csv"}


@pytest.mark.parametrize(
    ("name", "is_safe"),
    [
        *((name, True) for name in ("sub-01", "Jürgen 2", "a..b", "脳")),
        *((name, False) for name in ("", ".", "..", ".a", "a/b", "a\\b", "a\nb", "a\x00b", "a\x85b", "a\udcfcb")),
    ],
)
def test_safe_names(name, is_safe, tmp_path):
    assert is_safe_name(name) is is_safe
    if is_safe:
        assert case_place(tmp_path, {"subject": name}, "dae") == (tmp_path / name, None)
    else:
        with pytest.raises(OutputError, match="cannot name a folder"):
            case_place(tmp_path, {"subject": name}, "dae")


@pytest.mark.parametrize("derivative", ["../sub-01", "sub-01/../../x", "/sub-01/x", "sub-01//x"])
def test_derivatives_stay_in_their_dataset(derivative, tmp_path):
    with pytest.raises(OutputError, match="cannot name a folder"):
        case_place(tmp_path, {"subject": "x", "derivative": derivative}, "dae")


@pytest.mark.parametrize(
    ("bundle", "name"),
    [("dae", "sub-01_desc-dae"), ("ano_ddpm", "sub-01_desc-anoDdpm"), ("a__b_2_", "sub-01_desc-aB2")],
)
def test_name_of_a_derivative_says_the_method(bundle, name, tmp_path):
    item = {"subject": "x", "derivative": "sub-01/anat/sub-01"}
    assert case_place(tmp_path, item, bundle) == (tmp_path / "sub-01" / "anat", name)


def test_derivative_is_of_one_bundle_and_one_dataset(tmp_path):
    made_by = [{"Name": "uad-bundles", "Description": "vae"}]
    (tmp_path / "dataset_description.json").write_text(json.dumps({"GeneratedBy": made_by}), encoding="utf-8")
    item = {"subject": "sub-01", "image": "a.nii.gz", "derivative": "sub-01/anat/sub-01", "dataset": "a"}
    check_places(tmp_path, [item], "vae")
    with pytest.raises(OutputError, match=r"of another bundle, vae; .* derivatives/uad-dae in"):
        check_places(tmp_path, [item], "dae")
    with pytest.raises(OutputError, match="several BIDS datasets"):
        check_places(tmp_path, [item, item | {"dataset": "b"}], "vae")


def test_inputs_by_hard_link_and_letter_case(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("x", encoding="utf-8")
    os.link(tmp_path / "a" / "x", tmp_path / "y")
    inputs = Inputs([tmp_path / "a" / "x"])
    for target in ("y", "a", "a/x", "a/x/z", "../" + tmp_path.name + "/a"):
        with pytest.raises(OutputError):
            inputs.check([tmp_path / target])
    inputs.check([tmp_path / "b", tmp_path / "a" / "other", tmp_path / "xx"])


RECORDS = {
    "of another case": {"bundle": "dae", "subject": "other"},
    "of another method": {"bundle": "vae", "subject": "case"},
    "of something else": {"name": "pipeline"},
    "no object": [1],
}


@pytest.mark.parametrize("kind", RECORDS)
def test_folder_with_another_record_is_not_replaced(kind, tmp_path):
    folder = tmp_path / "case"
    folder.mkdir()
    check_case_folder(folder, "case", "dae")  # empty
    (folder / "run.json").write_text(json.dumps(RECORDS[kind]), encoding="utf-8")
    with pytest.raises(OutputError):
        check_case_folder(folder, "case", "dae")
    (folder / "run.json").write_text(json.dumps({"bundle": "dae"}), encoding="utf-8")  # of an earlier version
    check_case_folder(folder, "case", "dae")


def test_what_others_put_into_a_result_is_kept(tmp_path):
    old, new = tmp_path / "case", tmp_path / ".partial"
    for folder in (old, new, old / "figures"):
        folder.mkdir()
    for path in (old / "run.json", old / "to_mni.tfm", old / "notes.txt", old / "figures" / "one.png"):
        path.write_text("old", encoding="utf-8")
    (new / "run.json").write_text("new", encoding="utf-8")
    put_in_place(new, old)
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()} == {
        "case/run.json",
        "case/notes.txt",
        "case/figures/one.png",
    }
    assert (old / "run.json").read_text(encoding="utf-8") == "new"
