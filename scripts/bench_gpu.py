"""Seconds a volume on a GPU, the share of its peak that a network reaches, and what bfloat16 changes.

    python scripts/bench_gpu.py -o docs/benchmarks/gpu
    python scripts/bench_gpu.py dae --device cpu --slices 2 -o out

A row is a bundle or the path of an `inference.json`, and after a colon items of it with other values. The volume is the
bundle's sample. The seconds are those of the network; the floating-point operations are counted by torch, and the peak
is what a large convolution reaches in the same run, each in its number format. Maps and segmentations are compared as
they would be written. Written after each row: gpu.json, and the table as gpu.md.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from measure_speed import write_both
from monai.data import MetaTensor
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from common.detection.volume import VolumeDetector
from common.devices import checked_device
from common.errors import one_line
from common.images.mni import dice
from common.results.case import versions
from common.weights import load_into, sha256
from common.workflows.run_time import peak_memory_mb, reset_peak_memory
from common.workflows.variants import Variant

ROWS = ["dae", "ddpm", "berdiff", "mad_ad"]
FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PEAK_S = 0.5  # for which the convolution is repeated; the fastest counts
CONVOLUTION = {"cpu": (4, 128, 32), "cuda": (64, 512, 64), "mps": (16, 256, 64)}  # images, channels, height and width


def main(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of gpu.json and gpu.md.")],
    row: Annotated[list[str] | None, typer.Argument(help="BUNDLE or inference.json, then [:item=value,...].")] = None,
    device: Annotated[str, typer.Option(help="cuda, cuda:1, mps or cpu.")] = "cuda",
    repeats: Annotated[int, typer.Option(min=1, help="Of each volume; the median counts.")] = 3,
    slices: Annotated[int | None, typer.Option(min=1, help="From the middle; the others are made empty.")] = None,
) -> None:
    """Measure each row."""
    where = checked_device(device)
    rows = [Variant.parse(text) for text in row or ROWS]
    peaks = {name: peak(where, dtype) for name, dtype in FORMATS.items()}
    result: dict[str, Any] = {"device": name_of(where), "threads": torch.get_num_threads(), "repeats": repeats}
    result |= {"tf32_convolutions": torch.backends.cudnn.allow_tf32, "peak_tflops": peaks, "rows": []}
    for one in rows:
        result["rows"].append(measure(one, where, peaks, repeats, slices))
        write_both(output, "gpu", result | {"versions": versions()}, table(result))
    print(table(result))


def name_of(device: torch.device) -> str:
    """What a person calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak(device: torch.device, dtype: torch.dtype) -> float:
    """Tera (10^12) floating-point operations a second of a large convolution."""
    count, channels, side = CONVOLUTION[device.type]
    layout = {"device": device, "dtype": dtype}
    images = torch.ones(count, channels, side, side, **layout).to(memory_format=torch.channels_last)
    kernel = torch.ones(channels, channels, 3, 3, **layout).to(memory_format=torch.channels_last)
    fastest, until = float("inf"), time.perf_counter() + PEAK_S
    while time.perf_counter() < until:
        fastest = min(fastest, timed(lambda: F.conv2d(images, kernel, padding=1), device)[0])
    return 2 * 9 * channels**2 * count * side**2 / fastest / 1e12


def timed(do: Any, device: torch.device) -> tuple[float, Any]:
    """Seconds until the device has done it, and the result."""
    synchronised(device)
    started = time.perf_counter()
    found = do()
    synchronised(device)
    return time.perf_counter() - started, found


def synchronised(device: torch.device) -> None:
    """Wait until the device has nothing more to do."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def measure(
    row: Variant, device: torch.device, peaks: dict[str, float], repeats: int, slices: int | None
) -> dict[str, Any]:
    """A row of the result."""
    content = row.parser().get_parsed_content
    network, postprocessing, weights = (content(name) for name in ("network_def", "postprocessing", "weights"))
    load_into(network, weights)
    network = network.to(device).eval()
    prepared_s, case = timed(lambda: content("dataset")[0], torch.device("cpu"))
    case["image"] = middle(case["image"], network.axis, slices)
    image = case["image"].as_tensor()[None].to(device)
    with FlopCounterMode(display=False) as counter:
        network(image)  # the first call is slower, so that it does not count otherwise
    tflop = counter.get_total_flops() / 1e12
    found: dict[str, Any] = {"name": row.name, "weights_sha256": sha256(weights)}
    found |= {"slices": used_slices(image, network.axis), "prepared_s": prepared_s, "tflop": tflop}
    written = {}
    for name, dtype in FORMATS.items():
        reset_peak_memory(device)
        seconds, pred = passes(network, image, dtype, repeats)
        share = tflop / seconds / peaks[name]
        found[name] = {"network_s": seconds, "share_of_peak": share, "peak_memory_gb": peak_memory_mb(device) / 1e3}
        written[name] = postprocessing({**case, "pred": MetaTensor(pred)})
    return found | compared(*written.values())


def passes(network: VolumeDetector, image: Tensor, dtype: torch.dtype, repeats: int) -> tuple[float, Tensor]:
    """Median seconds of a volume (1, C, H, W, D), and the prediction (1 + C, H, W, D) float32 on the CPU."""
    device = image.device
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
        found = [timed(lambda: network(image), device) for _ in range(repeats + 1)]
    return median(seconds for seconds, _ in found[1:]), found[-1][1][0].float().cpu()


def middle(image: MetaTensor, axis: int, slices: int | None) -> MetaTensor:
    """An image (C, H, W, D) of which only so many slices along a spatial axis are left, in the middle of the brain."""
    used = (image.as_tensor() > 0).movedim(axis + 1, 0).flatten(1).any(1).nonzero().flatten()
    first = (len(used) - (slices or len(used))) // 2
    kept = set(used[max(first, 0) :][: slices or len(used)].tolist())
    empty = torch.tensor([index for index in range(image.shape[axis + 1]) if index not in kept], dtype=torch.long)
    return image.index_fill(axis + 1, empty, 0)


def used_slices(image: Tensor, axis: int) -> int:
    """How many slices of a volume (1, C, H, W, D) are not empty."""
    return int((image > 0).movedim(axis + 2, 0).flatten(1).any(1).sum())


def compared(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """How what would be written differs: the map, as a share of its maximum, and the segmentation, as Dice."""
    maps, masks = ([found[name].as_tensor() for found in (one, other)] for name in ("anomaly_map", "segmentation"))
    difference = float((maps[0] - maps[1]).abs().max() / maps[0].abs().max())
    a, b = (mask > 0 for mask in masks)
    overlap = dice(a, b) if (a | b).any() else None
    return {"difference_share_of_maximum": difference, "segmented_voxels": int(a.sum()), "segmentation_dice": overlap}


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    heads = ["bundle", "slices", "TFLOP a volume", "s a volume, float32", "share of the peak", "s, bfloat16"]
    heads += ["share of the peak", "largest difference of the map / its maximum", "Dice", "GB, float32"]
    peaks = ", ".join(f"{value:.3g} TFLOP/s in {name}" for name, value in result["peak_tflops"].items())
    lines = [f"{result['device']}; peak {peaks}", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in result["rows"]:
        cells = [row["name"], str(row["slices"]), f"{row['tflop']:.3g}"]
        for name in FORMATS:
            cells += [f"{row[name]['network_s']:.3g}", f"{row[name]['share_of_peak']:.0%}"]
        overlap = row["segmentation_dice"]
        cells += [f"{row['difference_share_of_maximum']:.1g}", "-" if overlap is None else f"{overlap:.3f}"]
        cells.append(f"{row['float32']['peak_memory_gb']:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(one_line(main))
