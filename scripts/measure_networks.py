"""CPU seconds of what a bundle does to its slices: by torch, by torch in channels_last, by ONNX Runtime; and the limit.

    python scripts/measure_networks.py dae vae pddpm --scan scan_2mm.nii.gz -o docs/benchmarks/speed

One process on one thread. The states take turns, and with them a large convolution, whose rate is called the peak here,
so that whatever else runs on the machine slows all alike; the figures are medians. Floating point operations are those
of convolutions, matrix products and attention. Written: networks.json, and the table as networks.md.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from measure_speed import write_both
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from common.bundle import metadata
from common.detection.method import AnomalyDetector
from common.detection.onnx_runtime import check_engine, describe_engine, use_engine
from common.detection.volume import padded
from common.devices import keep_freed_memory
from common.errors import one_line
from common.networks.weight_standardised_unet import filters_kept
from common.results.case import versions
from common.sharing.export import load_network
from common.weights import weights_sha256
from common.workflows.variants import Variant

CHANNELS, SIDE, BATCH = 128, 96, 4  # of the large convolution, 3 x 3
PEAK_GFLOP = 2 * 9 * CHANNELS**2 * SIDE**2 * BATCH / 1e9
ENOUGH_S = 1.0  # of torch's measurements: short ones are repeated more often
FEW = 4  # slices of which operations and the shares of the time are told
PRODUCTS = ("conv", "mm", "attention", "linear", "einsum")  # operators whose operations are counted


def main(
    method: Annotated[list[str], typer.Argument(help="Keys of bundles.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of networks.json and networks.md.")],
    scan: Annotated[Path | None, typer.Option(help="For bundles of T1; of others, and without it, the sample.")] = None,
    slices: Annotated[int, typer.Option(min=1, help="Of the volume, spread evenly; one batch.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="At least, of each measurement.")] = 3,
) -> None:
    """Measure each bundle."""
    keep_freed_memory()
    torch.set_num_threads(1)
    rows = []
    for name in method:
        rows.append(row_of(name, scan, slices, repeats))
        result = {"slices": slices, "repeats": repeats, "threads": 1, "rows": rows}
        result |= {"engine": describe_engine("onnxruntime"), "versions": versions()}
        write_both(output, "networks", result, table(rows))
    print(table(rows))


def row_of(name: str, scan: Path | None, count: int, repeats: int) -> dict[str, Any]:
    """Figures of a bundle. Raises UADError."""
    parser = Variant.parse(name).parser()
    if is_given := scan is not None and metadata(name)["modalities"] == ["T1"]:
        parser["image"] = str(scan.resolve())
    image = parser.get_parsed_content("dataset")[0]["image"].as_tensor().movedim(-1, 0)
    used = (image > 0).flatten(1).any(1).nonzero().flatten()
    detector = load_network(name).detector
    chosen = image[used[torch.linspace(0, len(used) - 1, min(count, len(used))).round().long()]]
    slices = padded(chosen, detector.size_divisor)
    few = slices[:FEW]
    gflop, products, others = limits_of(_calls(detector, few), len(few))
    states, peak = measured({state: _calls(one, slices) for state, one in states_of(detector).items()}, repeats)
    for figures in states.values():
        if "seconds" in figures:
            figures["ms_per_slice"] = 1e3 * figures["seconds"] / len(slices)
    return {
        "method": name,
        "weights_sha256": weights_sha256(parser.get_parsed_content("weights")),
        "image": scan.name if is_given else "sample",
        "slices": len(slices),
        "size": list(slices.shape[2:]),
        "gflop_per_slice": gflop,
        "peak_gflop_per_s": peak,
        "share_of_peak": gflop * len(slices) / states["torch"]["seconds"] / peak,
        "products_share_of_time": products,
        "other_operators": others,
        "states": states,
    }


def measured(calls: dict[str, Callable[[], Tensor]], repeats: int) -> tuple[dict[str, dict[str, Any]], float]:
    """Figures of each state, and of the peak GFLOP a second; a state that torch refuses has `refused` alone."""
    found: dict[str, dict[str, Any]] = {}
    maps, everything = {}, calls | {"peak": large_convolution()}
    for state, call in everything.items():
        try:
            first_s, maps[state] = _timed(call)
            found[state] = {"first_s": first_s, "runs": []}
        except RuntimeError as error:  # a `view` of what is not contiguous, in MONAI
            found[state] = {"refused": str(error).splitlines()[0]}
    while len(found["torch"]["runs"]) < repeats or sum(found["torch"]["runs"]) < ENOUGH_S:
        for state in maps:
            found[state]["runs"].append(_timed(everything[state])[0])
    for state, anomaly_map in maps.items():
        found[state]["seconds"] = median(found[state]["runs"])
        if state not in ("torch", "peak"):
            found[state]["times_as_fast"] = found["torch"]["seconds"] / found[state]["seconds"]
            found[state] |= differences(anomaly_map, maps["torch"])
    return found, PEAK_GFLOP / found.pop("peak")["seconds"]


def states_of(detector: AnomalyDetector) -> dict[str, AnomalyDetector]:
    """The detector by each way of computing it; by ONNX Runtime only where it allows that."""
    found = {"torch": detector, "channels_last": copy.deepcopy(detector).to(memory_format=torch.channels_last)}
    if detector.networks:
        check_engine("onnxruntime", detector, torch.device("cpu"))
        found["onnxruntime"] = copy.deepcopy(detector)
        use_engine("onnxruntime", found["onnxruntime"])
    return found


def _calls(detector: AnomalyDetector, slices: Tensor) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with filters_kept(detector):
            return detector.detect(slices, seeds=torch.arange(len(slices))).anomaly_map

    return call


def large_convolution() -> Callable[[], Tensor]:
    """A convolution of `PEAK_GFLOP`."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(BATCH, CHANNELS, SIDE, SIDE, generator=generator)
    weight = torch.rand(CHANNELS, CHANNELS, 3, 3, generator=generator)
    return lambda: F.conv2d(image, weight, padding=1)


@torch.no_grad()
def _timed(call: Callable[[], Tensor]) -> tuple[float, Tensor]:
    started = time.process_time()
    result = call()
    return time.process_time() - started, result


def differences(found: Tensor, expected: Tensor) -> dict[str, float]:
    """Of maps, as shares of the highest value: the largest difference, and that which one voxel in 100 exceeds."""
    difference = (found - expected).abs().flatten() / expected.max()
    return {
        "largest_difference": float(difference.max()),
        "percentile_99": float(difference[expected.flatten() > 0].quantile(0.99)),
    }


@torch.no_grad()
def limits_of(call: Callable[[], Tensor], count: int) -> tuple[float, float, dict[str, float]]:
    """Operations in 10^9, of each of `count` slices; the share of the time in operators that they are counted in; and
    those of the three largest others."""
    with FlopCounterMode(display=False) as counter:
        call()
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        call()
    times = {event.key.removeprefix("aten::"): event.self_cpu_time_total for event in profiler.key_averages()}
    total = sum(times.values())
    others = {name: spent for name, spent in times.items() if not any(product in name for product in PRODUCTS)}
    largest = sorted(others, key=lambda name: -others[name])[:3]
    share = 1 - sum(others.values()) / total
    return counter.get_total_flops() / 1e9 / count, share, {name: others[name] / total for name in largest}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    head = ["bundle", "GFLOP a slice", "ms a slice", "share of peak", "time in products", "most of the rest"]
    head += ["channels_last", "its map", "ONNX Runtime", "its map", "export, s"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        states = row["states"]
        cells = [row["method"], f"{row['gflop_per_slice']:.2f}", f"{states['torch']['ms_per_slice']:.1f}"]
        cells += [f"{row['share_of_peak']:.2f}", f"{row['products_share_of_time']:.0%}"]
        cells.append(", ".join(f"{name} {share:.0%}" for name, share in row["other_operators"].items() if share > 0.01))
        for state in ("channels_last", "onnxruntime"):
            figures = states.get(state, {})
            cells.append(f"x {figures['times_as_fast']:.2f}" if "times_as_fast" in figures else "-")
            cells.append(f"{figures['largest_difference']:.1e}" if "times_as_fast" in figures else "-")
        cells.append(f"{figures['first_s'] - figures['seconds']:.1f}" if "seconds" in figures else "-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(one_line(main))
