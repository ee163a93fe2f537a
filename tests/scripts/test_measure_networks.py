"""CPU seconds of networks: what is counted, what is timed, what is told of a state that torch refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F


@pytest.fixture
def script(load_script):
    return load_script("measure_networks")


def test_operations_are_those_of_convolutions_and_their_time_is_told(script):
    image, weight = torch.rand(2, 4, 16, 16), torch.rand(8, 4, 3, 3)
    gflop, products, others = script.limits_of(lambda: F.silu(F.conv2d(image, weight, padding=1)), 2)
    assert gflop == pytest.approx(2 * 9 * 4 * 8 * 16 * 16 / 1e9)
    assert 0 < products < 1
    assert "silu" in others
    assert products + sum(others.values()) <= 1 + 1e-9


def test_a_state_that_is_slower_differs_or_is_refused(script, monkeypatch):
    monkeypatch.setattr(script, "ENOUGH_S", 0)
    expected, calls = torch.tensor([[0.0, 2.0, 4.0]]), []

    def slow():
        calls.append(1)
        torch.rand(400, 400) @ torch.rand(400, 400)
        return expected + torch.tensor([0.0, 1.0, 0.0])

    def refuse():
        raise RuntimeError("view size is not compatible\nUse reshape")

    found, peak = script.measured({"torch": lambda: expected, "other": slow, "refusing": refuse}, repeats=2)
    assert len(calls) == 3
    assert found["other"]["times_as_fast"] < 1
    assert found["other"]["largest_difference"] == 0.25
    assert found["refusing"] == {"refused": "view size is not compatible"}
    assert peak > 0
    assert len(found["torch"]["runs"]) == 2


def test_a_row_of_a_bundle(script):
    pytest.importorskip("onnx", reason="the extra onnx is not installed")
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    row = script.row_of("vae_headct", None, 2, 1)
    assert (row["image"], row["slices"]) == ("sample", 2)
    assert 0 < row["share_of_peak"] < 1
    assert row["states"]["onnxruntime"]["largest_difference"] < 1e-4
    assert "view" in row["states"]["channels_last"]["refused"]
    line = script.table([row]).splitlines()[-1]
    assert line.startswith("| vae_headct |")
    assert line.count("|") == script.table([row]).splitlines()[0].count("|")
