"""Seconds and peak memory a slice of bundles, 32 slices at once and one at a time, and whether their maps agree.

    python scripts/measure_batching.py dae mad_ad berdiff:network_def::detector::batch_size=1 -o batching.json

A row is a bundle or the path of an `inference.json`, and after a colon items of it with other values. The slices are
those of the bundle's sample, spread evenly. Each measurement is a process of its own. Written: the JSON; the table is
printed.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray

from common.errors import one_line
from common.files import replacing
from common.results.case import versions
from common.weights import load_into, sha256
from common.workflows.run_time import peak_memory_mb
from common.workflows.variants import Variant

COUNT = 32
SIZES = (1, COUNT)


def main(
    row: Annotated[list[str], typer.Argument(help="BUNDLE or inference.json, then [:item=value,...].")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The JSON.")],
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Measure each row."""
    rows = [Variant.parse(text) for text in row]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as processes:
        found = list(processes.map(measure, *zip(*product(rows, SIZES, [device]), strict=True)))
    results = [compared(one, *found[2 * i : 2 * i + 2]) for i, one in enumerate(rows)]
    result = {"slices": COUNT, "device": device, "threads": torch.get_num_threads(), "rows": results}
    with replacing(output) as temporary:
        temporary.write_text(json.dumps(result | {"versions": versions()}, indent=2) + "\n", encoding="utf-8")
    print(table(results))


def measure(row: Variant, batch_size: int, device: str) -> tuple[dict[str, float], NDArray[Any]]:
    """Cost of a slice, and the maps (COUNT, 1, H, W)."""
    content = row.parser().get_parsed_content
    network = content("network_def")
    load_into(network, content("weights"))
    detector = network.to(device).eval().detector
    image = content("dataset")[0]["image"].as_tensor().movedim(-1, 0)
    used = (image > 0).flatten(1).any(1).nonzero().flatten()
    indices = used[torch.linspace(0, len(used) - 1, COUNT).round().long()]
    slices = image[indices].to(device)
    detector.detect(slices[:batch_size], seeds=torch.arange(batch_size))  # the first call is slower
    started, maps = time.perf_counter(), []
    for part, seeds in zip(slices.split(batch_size), torch.arange(COUNT).split(batch_size), strict=True):
        maps.append(detector.detect(part, seeds=seeds).anomaly_map.cpu())
    seconds = (time.perf_counter() - started) / COUNT
    cost = {"seconds_per_slice": seconds, "peak_memory_gb": peak_memory_mb(slices.device) / 1e3}
    return cost, torch.cat(maps).numpy()


def compared(row: Variant, alone: tuple[Any, NDArray[Any]], together: tuple[Any, NDArray[Any]]) -> dict[str, Any]:
    """A row of the result."""
    difference = float(np.abs(alone[1] - together[1]).max())
    weights = row.parser().get_parsed_content("weights")
    return {
        "name": row.name,
        "weights_sha256": sha256(weights),
        "alone": alone[0],
        "together": together[0],
        "largest_difference": difference,
    }


def table(results: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| | s a slice, alone | 32 at once | times as fast | GB, alone | 32 at once | largest difference |"]
    lines.append("|---" * 7 + "|")
    for result in results:
        alone, together = result["alone"], result["together"]
        seconds = [cost["seconds_per_slice"] for cost in (alone, together)]
        cells = [result["name"], *(f"{s:.2g}" for s in seconds), f"{seconds[0] / seconds[1]:.1f}"]
        cells += [f"{cost['peak_memory_gb']:.2f}" for cost in (alone, together)]
        lines.append(f"| {' | '.join(cells)} | {result['largest_difference']:.1g} |")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(one_line(main))
