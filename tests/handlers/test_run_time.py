"""Seconds and memory of a case, without what the metrics need."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader
from monai.engines import SupervisedEvaluator

from common.handlers.run_time import RunTime, peak_memory_mb, reset_peak_memory

CPU = torch.device("cpu")


class Slow(torch.nn.Module):
    def forward(self, image):
        time.sleep(0.1)
        return image


def load(index):
    time.sleep(0.05)
    image = torch.zeros(1, 8, 8, 6)
    image[..., 1:4] = 1
    return {"image": image}


class Items:
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return load(index)


def run(after=lambda engine: None):
    run_time = RunTime()
    evaluator = SupervisedEvaluator(CPU, DataLoader(Items()), Slow())
    run_time.attach(evaluator)
    evaluator.add_event_handler(Events.ITERATION_COMPLETED, after)
    evaluator.run()
    return run_time.result()


def test_reading_and_network_are_counted_and_metrics_are_not():
    result = run(after=lambda engine: time.sleep(0.4))
    assert 0.15 <= result["seconds_per_volume"] < 0.4
    assert 0.1 / 3 <= result["network_seconds_per_slice"] < result["seconds_per_volume"] / 3
    assert result["slices_per_volume"] == 3
    assert result["device"] == "cpu"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak can be reset on Linux only")
def test_peak_memory_is_that_since_the_reset():
    reset_peak_memory(CPU)
    before = peak_memory_mb(CPU)
    block = np.ones(25_000_000)  # 200 MB
    assert 190 < peak_memory_mb(CPU) - before < 260
    del block
    reset_peak_memory(CPU)
    assert peak_memory_mb(CPU) < before + 60


def test_memory_that_the_system_does_not_tell_is_none(monkeypatch):
    monkeypatch.setattr("common.handlers.run_time._STATUS", Path("/nowhere"))
    monkeypatch.setattr("common.handlers.run_time._RESET", Path("/nowhere/either"))
    assert run()["peak_memory_mb"] is None
