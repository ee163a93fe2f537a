import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import pytest
import torch
from monai.bundle import ConfigParser

from common.bundle import BUNDLES_DIR
from common.cohorts.table import read_cohort
from common.errors import UADError
from common.weights import save_weights, sha256

ROOT = Path(__file__).parents[2]
CONFIGS = next(
    folder
    for folder in (BUNDLES_DIR / "berdiff" / "configs", ROOT / "tests" / "workflows" / "berdiff")
    if (folder / "inference.json").is_file()
)
SCRIPT = ROOT / "scripts" / "evaluate_berdiff.py"
MODALITIES = ("T1", "T1CE", "T2", "FLAIR")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Options that name configs and random weights of a small network of four channels."""
    folder = tmp_path_factory.mktemp("small")
    override = {
        "preprocessing::canvas": 32,
        "preprocessing::brain_volume_ml": [10, 2300],  # cylinders of 22 ml
        "autoencoder": {
            "_target_": "common.networks.binary_autoencoder.StridedBinaryAutoencoder",
            "channels": [8, 8],
            "in_channels": 4,
            "latent_channels": 8,
        },
        "downsampling": 4,
        "unet::latent_channels": 8,
        "unet::channels": [8, 8],
        "unet::attention_levels": [False, True],
        "unet::norm_num_groups": 4,
    }
    (folder / "small.json").write_text(json.dumps(override), encoding="utf-8")
    files = [CONFIGS / "inference.json", CONFIGS / "brats2020.json", folder / "small.json"]
    parser = ConfigParser()
    parser.read_config([str(file) for file in files])
    parser.update({"bundle_root": "nowhere"})
    network = parser.get_parsed_content("network_def")
    torch.manual_seed(0)
    torch.nn.init.normal_(network.detector.unet.out[2].conv.weight)  # zeros would flip everything alike
    save_weights(network.state_dict(), folder / "model.pt")
    return {"config": files, "weights": folder / "model.pt"}


@pytest.fixture(scope="module")
def evaluate(small, brats2020):
    """The script's command as a function of what differs from L = 4, P = 0.5 and 2 calls."""
    spec = importlib.util.spec_from_file_location("evaluate_berdiff", SCRIPT)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)  # dataclasses look there
    spec.loader.exec_module(module)
    settings = {"noise_levels": [4], "thresholds": [0.5], "steps": [2]} | small

    def run(output, **override):
        module.main("berdiff", brats2020[1] / "cohort.csv", output, **(settings | override))
        return json.loads(output.read_text(encoding="utf-8"))

    yield run
    del sys.modules[spec.name]


def test_result_and_table(brats2020, small, evaluate, tmp_path, capsys):
    result = evaluate(tmp_path / "result.json", split="test", thresholds=[0.0, 0.5], steps=[2, 0], walks=[1, 2])
    items = read_cohort(brats2020[1] / "cohort.csv", MODALITIES, "test")
    lesions = [nib.load(item["lesion"]).get_fdata() for item in items]
    assert (result["n_subjects"], result["n_slices"]) == (1, 49)
    assert result["n_lesion_slices"] == sum(int(lesion.any((0, 1)).sum()) for lesion in lesions)
    found = [tuple(entry[name] for name in ("L", "P", "num_inference_steps", "num_passes")) for entry in result["grid"]]
    assert found == [(4, P, calls, walks) for P in (0, 0.5) for calls in (2, 4) for walks in (1, 2)]
    for entry in result["grid"]:
        share = entry["masked_share"]
        assert (share["healthy"]["med"] == 1) == (entry["P"] == 0)
        assert 0 <= share["diseased"]["q1"] <= share["diseased"]["q3"] <= 1
        assert 0 <= entry["sum"]["dice"]["mean"] <= 1
        assert 0 < entry["pooled"]["auprc"]["value"] < 1
        assert min(entry["seconds_per_slice"], entry["peak_memory_gb"], entry["sum"]["psnr"]["mean"]) > 0
    assert result["weights_sha256"] == sha256(small["weights"])
    assert result["versions"]["torch"] == torch.__version__
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 2 + 8 + 1
    assert len({row.count("|") for row in rows}) == 1


def test_slices_are_drawn_and_detected_with_the_seed(evaluate, tmp_path):
    """Of the patient that validates, whose tumour-free slices are a subject of the cohort too, without that one."""
    first, again, other = (
        evaluate(tmp_path / f"{number}.json", max_slices=20, seed=seed) for number, seed in enumerate((0, 0, 1))
    )
    assert (first["n_subjects"], first["n_slices"], first["n_lesion_slices"]) == (1, 20, 10)
    assert first["grid"][0]["sum"] == again["grid"][0]["sum"] != other["grid"][0]["sum"]
    assert first["baseline"]["sum"] == again["baseline"]["sum"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"baseline": "PD", "max_slices": 9}, "PD: not a modality of the bundle; choose --baseline of T1, T1CE"),
        ({"max_slices": 1}, "no slices with and without lesion"),
        ({"weights": Path("nothing.pt")}, "nothing.pt: no weights"),
    ],
)
def test_bad_input_is_a_typed_error_and_nothing_is_written(override, message, evaluate, tmp_path):
    with pytest.raises(UADError, match=message):
        evaluate(tmp_path / "result.json", **override)
    assert not list(tmp_path.iterdir())


def test_command_ends_in_one_line_where_the_bundle_is_unknown(tmp_path):
    command = [sys.executable, SCRIPT, "no_such_bundle", "cohort.csv", "-o", tmp_path / "result.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("BundleError: no_such_bundle: no such bundle; choose one of")
