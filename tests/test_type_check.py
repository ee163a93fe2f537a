"""Settings of the wrong type are one line, wherever they come from."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import pytest
from monai.bundle import ConfigParser
from torch import nn
from typer.testing import CliRunner

from common.bundle import BUNDLES_DIR
from common.cli import app
from common.errors import SettingError
from common.images.check import root_cause
from common.recorded import Recorded
from common.type_check import fits, setting_error


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (1, int, True),
        (np.int64(1), int, True),
        (1.0, int, False),
        (True, int, False),
        ("1", int, False),
        (None, int, False),
        (1, float, True),
        (0.5, float, True),
        ("0.5", float, False),
        (False, float, False),
        (True, bool, True),
        (1, bool, False),
        ("a", str, True),
        (1, str, False),
        ("a", Literal["a", "b"], True),
        ("c", Literal["a", "b"], False),
        (None, float | None, True),
        (0.5, float | None, True),
        ("abc", float | None, False),
        ([1, 2], Sequence[int], True),
        ((1, 2), Sequence[int], True),
        ([1, "2"], Sequence[int], False),
        ("12", Sequence[int], False),
        (1, Sequence[int], False),
        (1, int | Sequence[int], True),
        ({"a": 1}, Mapping[str, float], True),
        ([1], Mapping[str, float], False),
        (nn.Identity(), nn.Module, True),
        ("unet", nn.Module, False),
        ("anything", object, True),
    ],
)
def test_fits(value, hint, expected):
    assert fits(value, hint) is expected


class Sampler(Recorded):
    def __init__(self, level: int, sigma_px: float = 0.0, kind: Literal["a", "b"] = "a") -> None:
        self.level, self.sigma_px, self.kind = level, sigma_px, kind


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"level": "abc"}, "Sampler: level = 'abc'; give an integer"),
        ({"level": 1, "sigma_px": None}, "Sampler: sigma_px = None; give a number"),
        ({"level": 1, "kind": "c"}, "Sampler: kind = 'c'; give 'a' or 'b'"),
    ],
)
def test_argument_of_the_wrong_type(given, message):
    with pytest.raises(SettingError) as caught:
        Sampler(**given)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("item", "value", "message"),
    [
        ("network_def::smoothing_vox", "abc", "VolumeDetector: smoothing_vox = 'abc'; give a number or a list, each "),
        ("unet::channels", "abc", "WeightStandardisedUNet: channels = 'abc'; give a list, each item an integer"),
        ("network_def::nonsense", 1, "VolumeDetector: cannot be made of the given settings (TypeError: "),
        ("device", "tpu", "tpu: is no device; choose cpu, cuda, cuda:0, ..., or mps"),
        ("dataloader::num_workers", "abc", "DataLoader: cannot be made of the given settings (TypeError: "),
        ("output_dir", 3, "SaveDetections: cannot be made of the given settings (TypeError: "),
        ("threshold", "abc", "SegmentAnomaliesd: threshold = 'abc'; give a number or null"),
        ("displayable_configs::min_volume_ml", "abc", "SegmentAnomaliesd: min_volume_ml = 'abc'; give a number"),
    ],
)
def test_item_of_a_config_of_the_wrong_type(item, value, message):
    parser = ConfigParser()
    parser.read_config(str(BUNDLES_DIR / "dae" / "configs" / "inference.json"))
    parser[item] = value
    with pytest.raises(RuntimeError) as caught:
        parser.get_parsed_content("evaluator")
    error = root_cause(caught.value)
    assert isinstance(error, SettingError)
    assert message in str(error)
    assert "\n" not in str(error)


def test_other_failures_are_none_of_a_setting():
    assert setting_error(RuntimeError("Failed to instantiate component 'a' with keywords: b")) is None
    run = ConfigParser({"run": {"_target_": "common.workflows.engines.run_or_exit", "evaluator": None}})
    with pytest.raises(RuntimeError) as caught:
        run.get_parsed_content("run")
    assert setting_error(caught.value) is None
    assert root_cause(caught.value) is caught.value


def test_one_line_through_monai_and_through_uad(tmp_path):
    config = BUNDLES_DIR / "dae" / "configs" / "inference.json"
    command = [sys.executable, "-m", "monai.bundle", "run", f"--config_file={config}", "--threshold=abc"]
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == "SettingError: SegmentAnomaliesd: threshold = 'abc'; give a number or null"

    scan = tmp_path / "a.nii.gz"
    scan.write_bytes(b"")
    result = CliRunner().invoke(
        app, ["detect", str(scan), "-m", "dae", "-o", str(tmp_path / "out"), "--set", "threshold=abc"]
    )
    assert result.exit_code == 3
    assert result.stderr == "SettingError: SegmentAnomaliesd: threshold = 'abc'; give a number or null\n"
    assert not (tmp_path / "out").exists()


class Draws(Protocol):
    """Not to be checked at runtime."""

    def __call__(self, count: int) -> list[float]: ...


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (lambda count: [0.0] * count, Draws, True),
        (lambda count: [0.0] * count, Draws | None, True),
        (None, Draws | None, True),
        ("gaussian", Draws, False),
        ("gaussian", Any, True),
        (1.5, Any, True),
        (object(), Any, True),
    ],
)
def test_protocols_and_any(value, hint, expected):
    assert fits(value, hint) == expected
