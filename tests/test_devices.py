"""A device that this machine lacks is said in one line, before anything is computed."""

from __future__ import annotations

import ctypes
import os
import platform

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import common
from common.cli import app
from common.devices import _unless_double, checked_device, keep_freed_memory, moved
from common.errors import SettingError

CASES = {
    "tpu9": "is no device",
    "cuda": "no GPU on this machine",
    "cuda:1": "no GPU on this machine",
    "mps": "no Apple GPU",
}


@pytest.fixture(autouse=True)
def _without_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.parametrize("name", CASES)
def test_a_device_that_is_not_there(name):
    with pytest.raises(SettingError, match=CASES[name]):
        checked_device(name)


def test_a_gpu_beyond_those_that_are_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert checked_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(SettingError, match="has 2 GPU"):
        checked_device("cuda:2")


def test_devices_that_are_there(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert (checked_device("cpu").type, checked_device("mps").type) == ("cpu", "mps")


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_commands_say_it_in_one_line(device, save_nifti, phantom, tmp_path):
    shape, affine = phantom.grid(spacing_mm=(8, 8, 8))
    scan = save_nifti(tmp_path / "scan.nii.gz", phantom.on_grid(shape, affine)[0], affine)
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["detect", str(scan), "-m", "dae", "-o", str(out), "--device", device])
    assert (done.exit_code, done.stderr.count("\n"), out.exists()) == (3, 1, False)
    assert done.stderr.startswith(f"SettingError: {device}: torch finds no")
    with pytest.raises(SettingError):
        common.load_detector("dae", device=device)


class _Module(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("threshold", torch.tensor(1.5, dtype=torch.float64))


def test_a_module_is_moved():
    assert moved(_Module(), torch.device("meta")).threshold.device.type == "meta"


def test_double_precision_stays_on_the_cpu_where_the_device_has_none():
    module = _Module()
    module._apply(lambda tensor: _unless_double(tensor, torch.device("meta")))  # in the place of MPS
    assert (module.layer.weight.device.type, module.threshold.device.type) == ("meta", "cpu")
    assert float(module.threshold) == 1.5


def page_faults_of_layers():
    """Of blocks as a network asks for, for the second time; of this thread, whatever those of other tests do."""
    resource = pytest.importorskip("resource")
    before = 0
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        blocks = [np.ones(2**21) for _ in range(6)]  # 16 MB each
        del blocks
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such setting")
def test_memory_that_was_freed_is_used_again(monkeypatch):
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    keep_freed_memory()
    assert page_faults_of_layers() < 1000  # of 24,576 pages


def test_what_the_environment_says_of_memory_holds(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000000")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("the environment was overruled"))
    keep_freed_memory()
