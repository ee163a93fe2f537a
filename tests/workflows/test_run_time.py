"""Seconds and memory of a case, without what the metrics need."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader
from monai.engines import SupervisedEvaluator

from common.workflows import run_time

READING_S, NETWORK_S, METRICS_S = 0.05, 0.1, 0.4
BLOCK_MB = 200


class Clock:
    """Stands in for the module `time`: it goes on when it is told to, however busy the machine is."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def pass_by(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(run_time, "time", clock)
    return clock


class Items:
    def __init__(self, clock):
        self.clock = clock

    def __len__(self):
        return 3

    def __getitem__(self, index):
        self.clock.pass_by(READING_S)
        image = torch.zeros(1, 8, 8, 6)
        image[..., 1:4] = 1
        return {"image": image}


class Slow(torch.nn.Module):
    def __init__(self, clock):
        super().__init__()
        self.clock = clock

    def forward(self, image):
        self.clock.pass_by(NETWORK_S)
        return image


def run(clock):
    handler = run_time.RunTime()
    evaluator = SupervisedEvaluator(torch.device("cpu"), DataLoader(Items(clock)), Slow(clock))
    handler.attach(evaluator)
    evaluator.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: clock.pass_by(METRICS_S))
    evaluator.run()
    return handler.result()


def test_reading_and_network_are_counted_and_metrics_are_not(clock):
    result = run(clock)
    assert result["seconds_per_volume"] == pytest.approx(READING_S + NETWORK_S)
    assert result["network_seconds_per_slice"] == pytest.approx(NETWORK_S / 3, abs=1e-5)
    assert result["slices_per_volume"] == 3
    assert result["device"] == "cpu"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak can be reset on Linux only")
def test_peak_memory_is_that_since_the_reset():
    """Whatever the process used and freed before: the block is mapped, so it is new memory of the system's."""
    freed = [bytes(100_000) for _ in range(3000)]  # 300 MB, which stay with the process
    del freed
    cpu = torch.device("cpu")
    run_time.reset_peak_memory(cpu)
    before = run_time.peak_memory_mb(cpu)
    with mmap.mmap(-1, BLOCK_MB * 10**6) as block:
        block[:: mmap.PAGESIZE] = bytes(len(range(0, len(block), mmap.PAGESIZE)))  # each page is used
        during = run_time.peak_memory_mb(cpu)
    assert 0.7 * BLOCK_MB < during - before < 1.3 * BLOCK_MB
    assert (
        run_time.peak_memory_mb(cpu) > during - 0.1 * BLOCK_MB
    )  # the highest, not the current (Linux rounds a little)
    run_time.reset_peak_memory(cpu)
    assert run_time.peak_memory_mb(cpu) < before + 0.3 * BLOCK_MB


def test_memory_that_the_system_does_not_tell_is_none(clock, monkeypatch):
    monkeypatch.setattr(run_time, "_STATUS", Path("/nowhere"))
    monkeypatch.setattr(run_time, "_RESET", Path("/nowhere/either"))
    assert run(clock)["peak_memory_mb"] is None
