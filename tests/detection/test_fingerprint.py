"""A result says which settings made it, another run notices, and so does a calibration of other settings."""

from __future__ import annotations

import copy
import json
import sys

import pytest
from monai.bundle import ConfigParser
from typer.testing import CliRunner

from common.bundle import BUNDLES_DIR
from common.cli import app
from common.detection.fingerprint import Fingerprint, differences, of_map
from common.weights import load_into, load_weights, save_weights

SHIPPED = BUNDLES_DIR / "dae" / "models" / "model.pt"
OPENED: list[str] = []
sys.addaudithook(lambda event, arguments: OPENED.append(str(arguments[0])) if event == "open" else None)


def uad(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def parts(bundle="dae", **override):
    """Network and preprocessing of a bundle's inference, with some items other than shipped."""
    parser = ConfigParser()
    parser.read_config(str(BUNDLES_DIR / bundle / "configs" / "inference.json"))
    for key, value in override.items():
        parser[key] = value
    return parser.get_parsed_content("network_def"), parser.get_parsed_content("preprocessing")


@pytest.fixture(scope="module")
def scan(phantom, save_nifti, tmp_path_factory):
    """A brain of four slices."""
    (height, width, depth), affine = phantom.grid(spacing_mm=(4, 4, 4))
    affine[:3, 3] += affine[:3, :3] @ (0, 0, depth // 2 - 2)
    path = tmp_path_factory.mktemp("scan") / "a.nii.gz"
    return save_nifti(path, phantom.on_grid((height, width, 4), affine)[0], affine)


@pytest.fixture(scope="module")
def finished(scan, tmp_path_factory):
    """A folder of results."""
    out = tmp_path_factory.mktemp("out")
    done = uad("detect", scan, "-m", "dae", "-o", out)
    assert done.exit_code == 0, done.output
    return out


@pytest.fixture(scope="module")
def recorded_weights(tmp_path_factory):
    """The shipped weights, with a calibration that says of which settings it is: of those that are shipped."""
    network, preprocessing = parts()
    load_into(network, SHIPPED)
    calibration = network.calibration
    state = load_weights(SHIPPED)
    calibration.fit(float(calibration.threshold), 0.01, calibration.score_quantiles, of_map(network, preprocessing))
    state |= {f"calibration.{name}": value for name, value in calibration.state_dict().items()}
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    save_weights(state, path)
    return path


def test_record_names_the_settings(finished):
    run = json.loads((finished / "a" / "run.json").read_text(encoding="utf-8"))
    assert run["network"]["class"] == "VolumeDetector"
    assert run["network"]["detector"]["class"] == "DAE"
    assert run["network"]["detector"]["network"]["channels"] == [24, 48, 96, 192]
    assert run["network"]["smoothing_vox"] == 1.5
    assert run["settings"]["spacing_mm"] == 2
    assert run["min_volume_ml"] == 0.02
    assert run["threshold_origin"]["kind"] == "calibrated"
    assert run["threshold_origin"]["subjects"] >= 10
    assert run["threshold_origin"]["false_positive_share"] == 0.01
    assert len(run["fingerprint"]) == 16


def test_same_settings_are_not_run_again(finished, scan):
    before = (finished / "a" / "run.json").stat().st_mtime_ns
    for options in ([], ["--batch-size", "3"], ["--set", "network_def::smoothing_vox=1.5"]):
        done = uad("detect", scan, "-m", "dae", "-o", finished, *options)
        assert done.exit_code == 0, done.output
    assert (finished / "a" / "run.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--set", "network_def::smoothing_vox=0"], "network.smoothing_vox: 1.5 before, 0 now"),
        (["--set", "network_def::num_seeds=2"], "network.num_seeds: 1 before, 2 now"),
        (["--set", "network_def::mirror=true"], "network.mirror: False before, True now"),
        (
            ["--set", "unet::groups=[4, 4, 8, 8]"],
            "network.detector.network.groups: [8, 8, 16, 16] before, [4, 4, 8, 8]",
        ),
        (["--set", "threshold=0.5"], "threshold: "),
        (["--set", "displayable_configs::min_volume_ml=1"], "min_volume_ml: 0.02 before, 1 now"),
        (["--seed", "3"], "seed: 0 before, 3 now"),
        (["--register"], "settings.register: False before, True now"),
    ],
)
def test_other_settings_are_noticed(options, said, finished, scan):
    before = (finished / "a" / "run.json").stat().st_mtime_ns
    done = uad("detect", scan, "-m", "dae", "-o", finished, *options)
    assert done.exit_code == 3
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("OutputError: ")]
    assert said in line
    assert line.count(" before, ") == 1  # and nothing else differs
    assert "choose another output folder, or give --overwrite" in line
    assert (finished / "a" / "run.json").stat().st_mtime_ns == before


def test_result_of_an_earlier_version_is_noticed(finished, scan, tmp_path):
    case = tmp_path / "a"
    case.mkdir()
    run = json.loads((finished / "a" / "run.json").read_text(encoding="utf-8"))
    (case / "run.json").write_text(json.dumps({k: v for k, v in run.items() if k != "network"}), encoding="utf-8")
    done = uad("detect", scan, "-m", "dae", "-o", tmp_path)
    assert done.exit_code == 3
    assert "network: not recorded before" in done.stderr


def test_weights_are_read_once(scan, recorded_weights, tmp_path):
    weights = tmp_path / "model.pt"
    weights.write_bytes(recorded_weights.read_bytes())
    OPENED.clear()
    done = uad("detect", scan, "-m", "dae", "-o", tmp_path / "out", "--weights", weights)
    assert done.exit_code == 0, done.output
    assert OPENED.count(str(weights)) == 1


def test_calibration_of_other_settings_is_said(scan, recorded_weights, tmp_path):
    arguments = ("detect", scan, "-m", "dae", "--weights", recorded_weights)
    done = uad(*arguments, "-o", tmp_path / "same")
    assert (done.exit_code, "Warning" in done.stderr) == (0, False)
    run = json.loads((tmp_path / "same" / "a" / "run.json").read_text(encoding="utf-8"))
    assert not any("calibration" in warning for warning in run["warnings"])

    done = uad(*arguments, "-o", tmp_path / "other", "--set", "network_def::smoothing_vox=0")
    assert done.exit_code == 0, done.output
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("Warning: ")]
    assert "calibration is of other settings (network.smoothing_vox: 1.5 before, the default now)" in line
    run = json.loads((tmp_path / "other" / "a" / "run.json").read_text(encoding="utf-8"))
    assert run["warnings"][0] == line.removeprefix("Warning: ")


def test_threshold_of_the_user_is_used_for_everything(cohort, tmp_path):
    path = tmp_path / "result.json"
    options = ("--no-baselines", "--set", "threshold=1000", "--set", "displayable_configs::min_volume_ml=0")
    done = uad("evaluate", cohort, "-m", "dae", "-o", path, *options)
    assert done.exit_code == 0, done.output
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["threshold"] == 1000
    assert result["threshold_origin"] == {"kind": "given"}
    assert result["dice_at_threshold"]["value"] == 0  # nothing is above it
    assert result["healthy_fp_share"]["value"] == 0
    assert result["network"]["detector"]["class"] == "DAE"


def test_digest_is_of_what_a_result_depends_on():
    shipped = Fingerprint.of(*parts(), SHIPPED)
    assert Fingerprint.of(*parts(**{"network_def::batch_size": 3}), SHIPPED).digest == shipped.digest
    assert Fingerprint.of(*parts(**{"network_def::seed": 3}), SHIPPED).digest != shipped.digest
    assert Fingerprint.of(*parts(**{"network_def::seed": 3}), SHIPPED).of_map == shipped.of_map
    stripped = Fingerprint.of(*parts(**{"preprocessing::strip": "atlas"}), SHIPPED)
    assert stripped.digest != shipped.digest
    assert stripped.of_map == shipped.of_map
    assert Fingerprint.of(*parts(**{"preprocessing::register": True}), SHIPPED).of_map != shipped.of_map
    assert Fingerprint.of(*parts(**{"smoothing_vox": 1.0}), SHIPPED).of_map != shipped.of_map


def test_no_map_depends_on_the_number_of_timesteps_of_a_score():
    """It is recorded; yet a calibration holds whatever it is, as those do that earlier versions made with none."""

    def of(count):
        return Fingerprint.of(*parts("latent_ddpm", **{"num_score_timesteps": count}), weights)

    weights = BUNDLES_DIR / "latent_ddpm" / "models" / "model.pt"
    few, many = of(3), of(999)
    assert few.digest != many.digest
    assert few.network["detector"]["num_score_timesteps"] == 3
    assert few.of_map == many.of_map
    for stored in (0, 3, 50):
        calibrated = copy.deepcopy(many.of_map)
        calibrated["network"]["detector"]["num_score_timesteps"] = stored
        assert many.calibration_warning(calibrated) is None
    calibrated["network"]["detector"]["variant"] = "c"
    assert "network.detector.variant: c before, d now" in many.calibration_warning(calibrated)


def test_default_that_is_written_out_is_no_other_setting():
    given = {"network_def::axis": 2, "network_def::mirror": False, "preprocessing::register": False}
    assert of_map(*parts(**given)) == of_map(*parts())


def test_differences():
    before = {"a": {"b": 1, "c": [1, 2]}, "d": 0}
    assert differences(before, {"a": {"b": 1.0, "c": [1, 2]}, "d": 0}, "none") == []
    now = {"a": {"b": 2, "c": [1, 3]}, "e": "x" * 50}
    assert differences(before, now, "none") == [
        "a.b: 1 before, 2 now",
        "a.c: [1, 2] before, [1, 3] now",
        "d: 0 before, none now",
        f"e: none before, {'x' * 37}... now",
    ]
