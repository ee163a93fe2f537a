"""Bundles that stand alone: they hold what they need, run where this package is not, and give the same bytes."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from monai.bundle import ConfigParser
from monai.data import load_net_with_metadata
from monai.networks.layers import MedianFilter
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from typer.testing import CliRunner

from common import bundle, cli
from common.bundle import BUNDLES_DIR, available_bundles, run_inference
from common.errors import BundleError
from common.methods.dae import DAE
from common.sharing.export import TraceableMedian, example, export_bundle, export_onnx, export_torchscript, load_network
from common.sharing.vendor import PACKAGE

ONE_PASS = ["dae", "vae"]
SCHEMA = Path(__file__).parents[1] / "contract" / "meta_schema_20240725.json"
BARE_RUN = """
import importlib, importlib.metadata, pathlib, runpy, sys
for find in (lambda: importlib.import_module("common"), lambda: importlib.metadata.version("uad-bundles")):
    try:
        find()
    except ImportError:
        continue
    raise SystemExit("this package is here")
modules, config, image = sys.argv[1:]
sys.argv = ["monai.bundle", "run", "--config_file", config, "--image", image]
runpy.run_module("monai.bundle", run_name="__main__", alter_sys=True)
for module in pathlib.Path(modules).read_text().split():
    importlib.import_module(module)
"""


ZOO = """
import sys
from monai.bundle import ConfigWorkflow, verify_metadata, verify_net_in_out

config, logging = "configs/inference.json", "configs/logging.conf"
for metadata in sys.argv[2:]:
    try:
        verify_metadata(meta_file=metadata, filepath=sys.argv[1])
        verify_net_in_out("network_def", meta_file=metadata, config_file=config, device="cpu", n=1, p=1, any=1)
        workflow = ConfigWorkflow(config, meta_file=metadata, logging_file=logging, workflow_type="infer")
        workflow.initialize()
        print(f"{metadata}: missing {workflow.check_properties()}")
    except Exception as error:
        print(f"{metadata}: {error}")
"""


@pytest.fixture(scope="module", params=available_bundles())
def exported(request, tmp_path_factory):
    """The folder of each bundle as it is exported."""
    folder = tmp_path_factory.mktemp("exported")
    export_bundle(request.param, folder)
    return folder / request.param


@pytest.fixture(scope="module")
def dae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dae")
    export_bundle("dae", folder)
    return folder / "dae"


@pytest.fixture(scope="module")
def bare_site(dae, tmp_path_factory):
    """Packages of the environment that the bundle's requirements.txt would install, and no others."""
    site, seen = tmp_path_factory.mktemp("site"), set()
    waiting = (dae / "requirements.txt").read_text(encoding="utf-8").splitlines()
    while waiting:
        requirement = Requirement(waiting.pop())
        name = canonicalize_name(requirement.name)
        if name in seen or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        seen.add(name)
        try:
            package = distribution(name)
        except PackageNotFoundError:  # libraries of a GPU build
            continue
        waiting += package.requires or ()
        for top in {file.parts[0] for file in package.files or ()} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(package.locate_file(top))
    return site


@pytest.fixture(scope="module")
def bare_python(bare_site, tmp_path_factory):
    """Run Python with nothing but these packages: `-S` leaves out the environment's own, with its editable installs."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"PYTHONPATH": str(bare_site)}

    def run(*arguments):
        command = [sys.executable, "-S", *map(str, arguments)]
        return subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False)

    return run


def modules(folder):
    """Names of the modules in a folder with a bundle."""
    paths = [path.relative_to(folder).with_suffix("") for path in (folder / "scripts").rglob("*.py")]
    return [".".join(path.parts).removesuffix(".__init__") for path in paths]


def test_same_bytes_each_time(dae, tmp_path):
    assert export_bundle("dae", tmp_path).read_bytes() == dae.with_suffix(".zip").read_bytes()


def test_it_is_the_bundle(exported):
    source = BUNDLES_DIR / exported.name
    for path in exported.rglob("*"):
        part = path.relative_to(exported)
        if path.is_file() and part.parts[0] in {"docs", "models", "LICENSE"}:
            assert path.read_bytes() == (source / part).read_bytes()
    for path in (source / "configs").iterdir():
        assert (exported / "configs" / path.name).read_text(encoding="utf-8").replace(
            "scripts._common.", "common."
        ) == path.read_text(encoding="utf-8")
    assert not re.search(
        r'"_target_": "common\.', (exported / "configs" / "inference.json").read_text(encoding="utf-8")
    )
    names = {path.relative_to(exported).parts[0] for path in exported.rglob("*") if path.is_file()}
    assert names == {"LICENSE", "SHA256SUMS", "configs", "docs", "models", "requirements.txt", "scripts"}


def test_archive_has_the_form_of_the_model_zoo(exported):
    """What its `ci/verify_bundle.py` and CONTRIBUTING want of the files; the card: `tests/contract`."""
    zoo = ("LICENSE", "docs/README.md", "docs/data_license.txt", "models/model.pt")
    zoo += tuple(f"configs/{name}" for name in ("metadata.json", "inference.json", "train.json", "logging.conf"))
    assert [name for name in zoo if not (exported / name).is_file()] == []
    about = json.loads((exported / "configs" / "metadata.json").read_text(encoding="utf-8"))
    assert about["version"] in about["changelog"]
    assert all(re.fullmatch(r"\d+(\.\d+)+", number) for number in about["required_packages_version"].values())
    large = [
        file for path in exported.glob("large_files.*") for file in yaml.safe_load(path.read_bytes())["large_files"]
    ]
    for file in large:
        assert {"path", "url", "hash_val", "hash_type"} <= set(file)
        assert file["hash_type"] == "sha256"
        assert re.fullmatch("[0-9a-f]{64}", file["hash_val"])
    kept = [path for path in exported.rglob("*") if path.is_file()]
    assert [path for path in kept if path.stat().st_size > 25 * 2**20] == []


def zoo_says(folder, work, *metadata):
    """What the model zoo's checks of a bundle say of each metadata file, in its folder, where the zoo runs them."""
    shutil.copy(SCHEMA, work / "schema.json")  # a schema that is there already is not downloaded
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [sys.executable, "-c", ZOO, work / "schema.json", "configs/metadata.json", *metadata]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if ".json: " in line]


ACCEPTED = "configs/metadata.json: missing []"


def test_zoo_accepts_an_archive_and_sees_what_is_wrong(dae, tmp_path):
    text = (dae / "configs" / "metadata.json").read_text(encoding="utf-8")
    wrong = {"channels": ('"num_channels": 2', '"num_channels": 3'), "schema": ('"task"', '"tasks"')}
    for name, change in wrong.items():
        (tmp_path / f"{name}.json").write_text(text.replace(*change), encoding="utf-8")
    accepted, channels, schema = zoo_says(dae, tmp_path, *(tmp_path / f"{name}.json" for name in wrong))
    assert accepted == ACCEPTED
    assert "channel number" in channels
    assert "schema" in schema


@pytest.mark.slow
def test_zoo_accepts_every_archive(exported, tmp_path):
    assert zoo_says(exported, tmp_path) == [ACCEPTED]


def test_vendored_modules_are_those_of_the_package_and_no_others(exported):
    vendored = exported / "scripts" / "_common"
    places = {path.relative_to(vendored).as_posix() for path in vendored.rglob("*") if path.is_file()}
    assert not places & {"cli.py", "__main__.py", "sharing/export.py", "sharing/archive.py", "workflows/prepare.py"}
    if exported.name == "dae":
        assert {path for path in places if path.startswith("methods/")} == {
            "methods/__init__.py",
            "methods/dae.py",
        }
        assert "detection/method.py" in places
    assert all((vendored / place).read_bytes() == (PACKAGE / place).read_bytes() for place in places)
    config = ConfigParser.load_config_file(BUNDLES_DIR / exported.name / "configs" / "inference.json")
    images = ConfigParser(config).get_parsed_content("image")
    for image in [images] if isinstance(images, str) else images:
        assert Path(image).relative_to(PACKAGE).as_posix() in places


def imports_of(folder):
    """(file, ImportFrom or Import node, names) of all modules in a folder."""
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                yield path, node, [alias.name for alias in node.names]


def test_no_module_is_missing(exported):
    vendored = exported / "scripts" / "_common"
    for path, node, names in imports_of(vendored):
        if isinstance(node, ast.ImportFrom) and node.level:
            module = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            assert module.is_relative_to(vendored)
            assert module.with_suffix(".py").is_file() or (module / "__init__.py").is_file(), (path, node.module)
            for name in names:
                source = PACKAGE / module.relative_to(vendored) / f"{name}.py"
                assert not source.is_file() or (module / f"{name}.py").is_file(), (path, name)


def test_other_packages_are_required(exported):
    needed = {"fire", "tensorboard"}  # by `python -m monai.bundle`, and by a handler of MONAI
    for path, node, names in imports_of(exported / "scripts"):
        modules = names if isinstance(node, ast.Import) else [] if node.level else [node.module]
        modules += re.findall(r'optional_import\("(\w+)', path.read_text(encoding="utf-8"))
        needed |= {module.split(".")[0] for module in modules} - sys.stdlib_module_names
    lines = (exported / "requirements.txt").read_text(encoding="utf-8").splitlines()
    required = {canonicalize_name(line.split("==")[0]) for line in lines}
    owners = packages_distributions()
    assert [module for module in needed if not required & set(map(canonicalize_name, owners.get(module, ())))] == []


def test_same_bytes_where_only_required_packages_are(dae, bare_python, phantom, save_nifti, tmp_path):
    """The command of the README in a Python without this package; then all modules are imported there."""
    (height, width, _), affine = phantom.grid()
    affine[2, 3] = phantom.centre_mm[2] - 6
    scan = save_nifti(tmp_path / "scan.nii.gz", phantom.on_grid((height, width, 6), affine)[0], affine)
    (tmp_path / "modules").write_text(" ".join(modules(dae)), encoding="utf-8")
    done = bare_python("-c", BARE_RUN, tmp_path / "modules", dae / "configs" / "inference.json", scan)
    assert done.returncode == 0, done.stderr
    run_inference("dae", ["inference.json"], image=str(scan), output_dir=str(tmp_path / "here"))
    for name in ("anomaly_map.nii.gz", "segmentation.nii.gz", "reconstruction.nii.gz", "lesions.csv"):
        there = (dae / "eval" / "scan" / name).read_bytes()  # where the config says: in the exported bundle itself
        assert there == (tmp_path / "here" / "scan" / name).read_bytes(), name


def test_bundle_without_weights(tmp_path, monkeypatch):
    (tmp_path / "new" / "configs").mkdir(parents=True)
    (tmp_path / "new" / "configs" / "metadata.json").write_text('{"name": "new"}', encoding="utf-8")
    monkeypatch.setattr(bundle, "BUNDLES_DIR", tmp_path)
    with pytest.raises(BundleError, match="no weights"):
        export_bundle("new", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_export_and_import_by_command(tmp_path, monkeypatch):
    done = CliRunner().invoke(cli.app, ["export", "dae", "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert re.search(r"dae\.zip: sha256 [0-9a-f]{64}$", done.output.strip())
    monkeypatch.setattr(bundle, "BUNDLES_DIR", tmp_path / "bundles")
    done = CliRunner().invoke(cli.app, ["import", str(tmp_path / "out" / "dae.zip")])
    assert done.exit_code == 0, done.output
    assert available_bundles() == ["dae"]
    for path in (tmp_path / "bundles" / "dae").rglob("*"):
        if path.is_file():
            assert (
                path.read_bytes() == (BUNDLES_DIR / "dae" / path.relative_to(tmp_path / "bundles" / "dae")).read_bytes()
            )
    assert load_network("dae").calibration.is_fitted
    done = CliRunner().invoke(cli.app, ["import", str(tmp_path / "out" / "dae.zip")])
    assert (done.exit_code, done.stderr.count("\n")) == (cli.FAILED, 1)
    assert done.stderr.startswith("OutputError: ")


@pytest.mark.parametrize("name", ONE_PASS)
def test_torchscript_is_the_network(name, tmp_path):
    path = export_torchscript(name, tmp_path)
    traced, about, _ = load_net_with_metadata(str(path))
    assert about["name"] == name
    assert about["threshold"] == float(load_network(name).calibration.threshold)  # of the map that is normalised
    assert about["normalisation"]["class"] == "WithinSubjectNormalisation"
    assert len(about["preparation"]["tissue_modes"]) == 3
    same_as_bundle(name, traced, 1e-5)
    assert str(PACKAGE).encode() not in path.read_bytes()


@pytest.mark.parametrize("name", ONE_PASS)
def test_onnx_is_the_network(name, tmp_path):
    onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    path = export_onnx(name, tmp_path)
    (about,) = [p.value for p in onnx.load(path).metadata_props if p.key == "metadata"]
    assert json.loads(about)["name"] == name
    session = runtime.InferenceSession(path)
    same_as_bundle(name, lambda image: torch.from_numpy(session.run(None, {"image": image.numpy()})[0]), 1e-4)
    assert str(PACKAGE).encode() not in path.read_bytes()


def same_as_bundle(name, exported, tolerance):
    """Slices with a lesion, of another number than those that were traced."""
    network = load_network(name)
    image = example(network, 4)
    image[:, :, 40:50, 40:50] = 1
    detection = network.detector.detect(image)
    assert float(detection.anomaly_map.max()) > 0.1
    expected = torch.cat([detection.anomaly_map, detection.reconstruction], dim=1)
    torch.testing.assert_close(exported(image), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("export", [export_torchscript, export_onnx])
def test_random_methods_cannot_be_traced(export, tmp_path):
    if export is export_onnx:
        pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    with pytest.raises(BundleError, match=r"mad_ad: cannot be traced .*random numbers"):
        export("mad_ad", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_methods_whose_steps_depend_on_the_image_cannot_be_traced(tmp_path, monkeypatch):
    detect, mean = DAE._detect, example(load_network("dae"), 2).mean()

    def two_ways(self, image, foreground, generators):
        anomaly_map, reconstruction = detect(self, image, foreground, generators)
        return anomaly_map * (2 if image.mean() > mean else 1), reconstruction

    monkeypatch.setattr(DAE, "_detect", two_ways)
    with pytest.raises(BundleError, match=r"dae: what was traced differs by .*depend on the image"):
        export_torchscript("dae", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_onnx_without_its_packages(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BundleError, match=r"pip install 'uad-bundles\[onnx\]'"):
        export_onnx("dae", tmp_path)


@pytest.mark.parametrize("size", [3, 5])
def test_median_is_that_of_monai(size):
    image = torch.rand(2, 3, 12, 9, generator=torch.Generator().manual_seed(0))
    assert np.array_equal(TraceableMedian(size)(image), MedianFilter(size // 2, spatial_dims=2)(image))
