"""The bundle of a new method begins as a copy; the page that explains it is followed to the letter."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from contract import monai_checks, test_settings, test_weights
from contract import test_configs as contract
from contract.test_detection import OUTPUTS
from monai.bundle import ConfigParser
from typer.testing import CliRunner

import common.methods
from common.bundle import BUNDLES_DIR, available_bundles
from common.cli import app
from common.errors import BundleError, OutputError, SettingError
from common.sharing.new_bundle import json_layout, new_bundle
from common.weights import load_weights

PAGE = Path(__file__).parents[2] / "docs" / "adding_a_method.md"
SCHEMA = Path(monai_checks.__file__).with_name("meta_schema_20240725.json")
OF_DAE = ("unet", "objective", "loss", "noise_resolutions", "noise_std")


@pytest.mark.parametrize("like", available_bundles())
def test_a_copy_has_another_name_and_no_claims(like, tmp_path):
    folder = new_bundle("toy", like, tmp_path)
    assert not list(folder.rglob("*.pt"))
    for path in (path for path in folder.rglob("*") if path.is_file()):
        text = path.read_text(encoding="utf-8")
        assert not re.search(rf"(?<![\w.]){like}(?!\w)", text), path
        if path.suffix == ".json":
            assert text == json_layout(json.loads(text)) + "\n", path
    about = json.loads((folder / "configs" / "metadata.json").read_text(encoding="utf-8"))
    assert (about["name"], about["title"], about["references"]) == ("toy", "TODO", ["TODO"])
    card = (folder / "docs" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlicense: TODO\nlibrary_name: monai\n")
    assert card.count("TODO") >= 8
    assert not re.search(r"\b[0-9a-f]{64}\b|\d\.\d{3}", card)  # weights, figures
    original = (BUNDLES_DIR / like / "docs" / "README.md").read_text(encoding="utf-8")
    assert re.findall("^## .*", card, flags=re.MULTILINE) == re.findall("^## .*", original, flags=re.MULTILINE)


def test_what_cannot_be_made_is_refused_before_anything_is_written(tmp_path):
    for key, like, error in (("A b", "dae", SettingError), ("../toy", "dae", SettingError), ("toy", "no", BundleError)):
        with pytest.raises(error):
            new_bundle(key, like, tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "toy").mkdir()
    with pytest.raises(OutputError):
        new_bundle("toy", "dae", tmp_path)
    assert not list((tmp_path / "toy").iterdir())


def test_command(tmp_path, monkeypatch):
    monkeypatch.setenv("UAD_BUNDLES", str(tmp_path))
    arguments = ["new-bundle", "toy", "--like", "vae"]
    done = CliRunner().invoke(app, arguments)
    assert (done.exit_code, done.stdout.split(":")[0]) == (0, str(tmp_path / "toy"))
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 3
    assert again.stderr.startswith("OutputError: ")
    assert len(again.stderr.splitlines()) == 1


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The bundle of the page, and the working directory in it; its method is one of this package for a while."""
    method, both, training = re.findall(
        r"^```(?:python|json)\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S
    )
    (tmp_path / "blind_spot.py").write_text(method, encoding="utf-8")
    monkeypatch.setattr(common.methods, "__path__", [*common.methods.__path__, str(tmp_path)])
    folder = new_bundle("blind_spot", "dae", tmp_path / "bundles")
    for name, items in (("inference.json", [both]), ("train.json", [both, training])):
        path = folder / "configs" / name
        config = {id_: item for id_, item in json.loads(path.read_text(encoding="utf-8")).items() if id_ not in OF_DAE}
        for id_, item in (pair for text in items for pair in json.loads(text).items()):
            *above, last = id_.split("::")
            inner = config
            for part in above:
                inner = inner[part]
            inner[last] = item
        path.write_text(json_layout(config) + "\n", encoding="utf-8")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])  # MONAI adds the bundle's folder
    yield folder
    sys.modules.pop("common.methods.blind_spot", None)
    vars(common.methods).pop("blind_spot", None)


def test_the_method_of_the_page_keeps_the_contract(toy, cohort, tmp_path):
    configs = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in (toy / "configs").glob("*.json")}
    locator = contract.ComponentLocator()
    for name, config in configs.items():
        if name != "metadata.json":
            found = contract.lint(config, lambda short: locator.get_component_module_name(short) is not None)
            assert found == [], name
    for name in ("network_def", "preprocessing"):
        contract.test_training_and_inference_share(name, configs)
        test_settings.test_every_setting_is_in_the_fingerprint(name, configs, None)
    contract.test_workflows_name_this_bundle(configs, toy)

    monai_checks.main(toy, SCHEMA, cohort, tmp_path)  # trains, too
    results = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert {name: error for name, error in results.items() if error} == {}

    (toy / "models").mkdir()
    shutil.copy(tmp_path / "runs" / "model.pt", toy / "models")
    for names, settings in ((["inference.json", "calibrate.json"], {"cohort": str(cohort)}), (["inference.json"], {})):
        workflow = monai_checks.make_workflow(toy, names, "infer", output_dir=str(tmp_path / "out"), **settings)
        workflow.parser.get_parsed_content("evaluator").run()
    parser = ConfigParser(configs["inference.json"])
    test_settings.test_classes_of_this_project_record_their_settings(parser)
    network = parser.get_parsed_content("network_def")
    network.load_state_dict(load_weights(toy / "models" / "model.pt"))
    test_weights.test_file_holds_tensors_only_and_all_of_them(toy, network)
    (case,) = (tmp_path / "out").iterdir()
    assert {path.name for path in case.iterdir()} == OUTPUTS
    anomaly_map = np.asarray(nib.load(case / "anomaly_map.nii.gz").dataobj)
    assert np.isfinite(anomaly_map).all()
    assert anomaly_map.max() > 0


def test_the_page_counts_its_lines():
    page = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(python|json)\n(.*?)^```", page, re.M | re.S)
    count = {kind: sum(len(text.splitlines()) for k, text in blocks if k == kind) for kind in ("python", "json")}
    assert f"{count['python']} lines of Python and {count['json']} lines of JSON" in page
