"""Seconds and peak memory of a method, case by case, on the machine that it runs on."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents

from .engines import cases

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class CaseTime(NamedTuple):
    """Of one case, and what that depends on."""

    seconds: float
    network_seconds: float
    n_slices: int
    peak_mb: float
    device: str
    threads: int


class RunTime:
    """Measures from the file that is read to the result on its own grid; what handlers do with that is not counted.

    Args:
        axis: spatial axis of the network's slices.

    `times` holds what was measured, case by case.
    """

    def __init__(self, axis: int = 2) -> None:
        self.axis = axis
        self.times: list[CaseTime] = []
        self._started = self._network_started = self._network_seconds = 0.0
        self._device = torch.device("cpu")

    def attach(self, engine: Engine) -> None:
        """Add the handler to an evaluator, before those whose work is not to be counted."""
        engine.add_event_handler(Events.GET_BATCH_STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_STARTED, self._start_network)
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self._end_network)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._end)

    def _start(self, engine: Engine) -> None:
        self._device = torch.device(engine.state.device)  # type: ignore[attr-defined]
        reset_peak_memory(self._device)
        self._started = self._now()

    def _start_network(self, engine: Engine) -> None:
        self._network_started = self._now()

    def _end_network(self, engine: Engine) -> None:
        self._network_seconds = self._now() - self._network_started

    def _end(self, engine: Engine) -> None:
        seconds, peak_mb = self._now() - self._started, peak_memory_mb(self._device)
        images = (batch["image"].movedim(self.axis + 1, 0) for batch, _ in cases(engine))
        n_slices = sum(int((image > 0).flatten(1).any(1).sum()) for image in images)
        where = (str(self._device), torch.get_num_threads())
        self.times.append(CaseTime(seconds, self._network_seconds, n_slices, peak_mb, *where))

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def result(self) -> dict[str, Any]:
        """`seconds_per_volume` (median, whole pipeline), `network_seconds_per_slice`, `peak_memory_mb` (highest).

        Memory is that of the process on the CPU, that of the tensors on a GPU; None where the system does not say.
        """
        seconds, network_seconds, n_slices, peaks_mb, devices, threads = zip(*self.times, strict=True)
        peak_mb = max(peaks_mb)
        return {
            "seconds_per_volume": round(float(np.median(seconds)), 3),
            "network_seconds_per_slice": round(sum(network_seconds) / max(sum(n_slices), 1), 5),
            "slices_per_volume": round(float(np.mean(n_slices)), 1),
            "peak_memory_mb": round(peak_mb) if np.isfinite(peak_mb) else None,
            "device": devices[-1],
            "threads": threads[-1],
        }


def reset_peak_memory(device: torch.device) -> None:
    """Begin to measure again; where the system does not allow it, the peak is that since the process began."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        _RESET.write_text("5", encoding="ascii")  # Linux: peak resident set = resident set
    except OSError:
        return


def peak_memory_mb(device: torch.device) -> float:
    """Highest use since the reset, in MB (10^6 bytes); NaN where the system does not say.

    Linux' `VmHWM`, as `ru_maxrss` cannot be reset and begins with that of the parent process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text(encoding="utf-8"))
    except OSError:
        return float("nan")
    return int(found[1]) * 1024 / 1e6 if found else float("nan")
