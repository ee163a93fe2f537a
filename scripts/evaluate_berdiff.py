"""Evaluate masked Bernoulli diffusion slice by slice, as the paper does, over a grid of its settings.

    python scripts/evaluate_berdiff.py berdiff_glioma cohort.csv -o result.json [--split test] [--max-slices 200]

For each noise level L, probability threshold P, number of network calls and of walks: Dice, AUPRC and PSNR under the
protocol of `common.metrics.masked_bernoulli`, AUPRC of the pooled foreground, AUROC of the share of masked entries
(slices with lesion against slices without), time and memory; beside them an intensity threshold. All is on the
network's grid. Written: the JSON; the table is printed. L and P belong to the split "val": the paper chose them on its
test set.
"""

from __future__ import annotations

import json
import time
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from matplotlib.cbook import boxplot_stats
from monai.bundle import ConfigParser
from tqdm import tqdm

from common.bundle import BUNDLES_DIR, metadata
from common.detection.method import Detection, foreground_of
from common.errors import CohortError, one_line
from common.files import replacing
from common.methods.berdiff import BerDiff
from common.metrics import intensity_threshold
from common.metrics.masked_bernoulli import map_metrics, masked_bernoulli_metrics
from common.results.case import versions
from common.weights import load_into, sha256
from common.workflows.drawn_slices import Slices, drawn, load_slices, pooled
from common.workflows.run_time import peak_memory_mb

BATCH = 32  # slices at once
Setting = tuple[int, float, int, int]  # L, P, network calls, walks
POOLED = ("auprc", "auroc", "max_dice_pooled")


def main(
    bundle: Annotated[str, typer.Argument(help="Key of the bundle.")],
    cohort: Annotated[Path, typer.Argument(help="Cohort CSV.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The JSON.")],
    split: Annotated[str, typer.Option(help="val or test.")] = "val",
    config: Annotated[list[Path], typer.Option(help="Instead of the bundle's inference.json.")] = [],  # noqa: B006
    weights: Annotated[Path | None, typer.Option(help="Instead of the bundle's model.pt.")] = None,
    noise_levels: Annotated[list[int], typer.Option("-L", help="Noise steps.")] = [100, 200, 300],  # noqa: B006
    thresholds: Annotated[list[float], typer.Option("-P", help="0 masks all.")] = [0.0, 0.5],  # noqa: B006
    steps: Annotated[list[int], typer.Option(help="Network calls; 0: as many as L.")] = [20],  # noqa: B006
    walks: Annotated[list[int], typer.Option(help="`num_passes`; the bundle's own if left out.")] = [],  # noqa: B006
    baseline: Annotated[str | None, typer.Option(help="Of the intensity threshold: FLAIR, or the first.")] = None,
    direction: Annotated[str, typer.Option(help="What is abnormal in it: bright or dark.")] = "bright",
    max_slices: Annotated[int | None, typer.Option(help="Only so many, half with lesions, drawn.")] = None,
    seed: Annotated[int, typer.Option(help="Of the detection and of the slices drawn.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda" if torch.cuda.is_available() else "cpu",
) -> None:
    """Write the JSON, and print the table."""
    if not config:
        metadata(bundle)  # names the bundles that there are
        config = [BUNDLES_DIR / bundle / "configs" / "inference.json"]
    weights = weights or BUNDLES_DIR / bundle / "models" / "model.pt"
    parser = ConfigParser()
    parser.read_config([str(path) for path in config])
    parser.update({"bundle_root": str(BUNDLES_DIR / bundle)})
    modalities = parser.get_parsed_content("modalities")
    baseline = baseline or ("FLAIR" if "FLAIR" in modalities else modalities[0])
    if baseline not in modalities:
        raise CohortError(baseline, "not a modality of the bundle", f"choose --baseline of {', '.join(modalities)}")
    detector = load_detector(parser, weights, device)
    slices = load_slices(cohort, modalities, split, parser.get_parsed_content("preprocessing"), seed)
    if max_slices is not None:
        slices = slices.take(drawn(slices.diseased.numpy(), max_slices, seed))
    if not slices.diseased.any() or slices.diseased.all():
        raise CohortError(
            cohort, f"no slices with and without lesion in split {split!r}", "take more, or another split"
        )
    settings = [
        (L, P, n or L, m) for L, P, n, m in product(noise_levels, thresholds, steps, walks or [detector.num_passes])
    ]
    result = {
        "bundle": bundle,
        "split": split,
        "n_slices": len(slices.image),
        "n_lesion_slices": int(slices.diseased.sum()),
        "n_subjects": len(set(slices.subject)),
        "grid": [measure(detector, slices, setting, seed) for setting in tqdm(settings)],
        "baseline": measure_baseline(slices, modalities, baseline, direction, seed),
        "weights_sha256": sha256(weights),
        "seed": seed,
        "device": torch.cuda.get_device_name() if device != "cpu" else f"{torch.get_num_threads()} CPU threads",
        "versions": versions(),
    }
    with replacing(output) as temporary:
        temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(table(result))


def load_detector(parser: ConfigParser, weights: Path, device: str) -> BerDiff:
    """The method of a bundle's `network_def` with its weights."""
    network = parser.get_parsed_content("network_def")
    load_into(network, weights)
    return network.detector.eval().to(device)


def detect(detector: BerDiff, slices: Slices) -> tuple[Detection, float]:
    """The detections of all slices, on the CPU, and the seconds that a slice took."""
    device = next(detector.parameters()).device
    parts, start = [], time.perf_counter()
    for image, seeds in zip(slices.image.split(BATCH), slices.seed.split(BATCH), strict=True):
        found = detector.detect(image.to(device), seeds=seeds)
        parts.append((found.anomaly_map.cpu(), found.reconstruction.cpu(), torch.as_tensor(found.score).cpu()))
    seconds = (time.perf_counter() - start) / len(slices.image)
    return Detection(*(torch.cat(part) for part in zip(*parts, strict=True))), seconds


def configure(detector: BerDiff, setting: Setting) -> None:
    """Other settings of the same networks."""
    L, detector.P, num_inference_steps, detector.num_passes = setting
    detector.scheduler.set_timesteps(num_inference_steps, L)


def measure(detector: BerDiff, slices: Slices, setting: Setting, seed: int) -> dict[str, Any]:
    """One line of the table."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    configure(detector, setting)
    found, seconds = detect(detector, slices)
    shares = torch.as_tensor(found.score).double().numpy()
    metrics = pooled(slices, found.anomaly_map[:, 0], seed, found.score)
    both = {"healthy": ~slices.diseased.numpy(), "diseased": slices.diseased.numpy()}
    return {
        **dict(zip(("L", "P", "num_inference_steps", "num_passes"), setting, strict=True)),
        "sum": masked_bernoulli_metrics(slices.image, found.reconstruction, slices.lesion, "sum"),
        "per_channel": masked_bernoulli_metrics(slices.image, found.reconstruction, slices.lesion, "per-channel"),
        "pooled": {name: metrics[name] for name in POOLED},
        "masked_share": {"auroc": metrics["image_auroc_method"]}
        | {name: box(shares[which]) for name, which in both.items()},
        "seconds_per_slice": seconds,
        "peak_memory_gb": peak_memory_mb(next(detector.parameters()).device) / 1e3,
    }


def box(values: np.ndarray) -> dict[str, float]:
    """Mean, quartiles and whiskers (1.5 times the quartiles' distance) of a box plot."""
    (stats,) = boxplot_stats(values)
    return {name: float(stats[name]) for name in ("mean", "whislo", "q1", "med", "q3", "whishi")}


def measure_baseline(slices: Slices, modalities: list[str], modality: str, direction: Any, seed: int) -> dict[str, Any]:
    """The intensity of a modality as anomaly map, under the same protocol."""
    channel = modalities.index(modality)
    maps = intensity_threshold(slices.image[None, :, channel], foreground_of(slices.image)[None, :, 0], direction)[0]
    metrics = pooled(slices, maps, seed)
    return {
        "modality": modality,
        "direction": direction,
        "sum": map_metrics(maps[:, None], slices.lesion),
        "pooled": {name: metrics[name] for name in POOLED},
        "image_auroc": metrics["image_auroc"],
    }


def label(entry: dict[str, Any]) -> str:
    """Name of a setting."""
    return f"L = {entry['L']}, P = {entry['P']:g}, {entry['num_passes']} x {entry['num_inference_steps']} calls"


def table(result: dict[str, Any]) -> str:
    """Markdown: mean and standard deviation over slices with lesion, and the pooled metrics' values."""

    def spread(summary: dict[str, dict[str, float]], name: str, digits: int) -> str:
        return f"{summary[name]['mean']:.{digits}f} +- {summary[name]['std']:.{digits}f}" if name in summary else "-"

    def line(name: str, summary: dict[str, Any], entry: dict[str, Any], auroc: Any, *cost: str) -> str:
        cells = [name, spread(summary, "dice", 3), spread(summary, "auprc", 3), spread(summary, "psnr", 2)]
        values = [v["value"] for v in (entry["pooled"]["auprc"], auroc)]
        return " | ".join(["", *cells, *("-" if v is None else f"{v:.3f}" for v in values), *cost, ""]).strip()

    heads = ("", "Dice", "AUPRC", "PSNR", "pooled AUPRC", "slice AUROC", "s/slice", "GB", "")
    lines = [" | ".join(["", *heads]).strip(), "|---" * (len(heads) - 1) + "|"]
    for entry in result["grid"]:
        cost = f"{entry['seconds_per_slice']:.2f}", f"{entry['peak_memory_gb']:.2f}"
        lines.append(line(label(entry), entry["sum"], entry, entry["masked_share"]["auroc"], *cost))
    baseline = result["baseline"]
    name = f"{baseline['modality']}, {baseline['direction']}"
    lines.append(line(name, baseline["sum"], baseline, baseline["image_auroc"], "-", "-"))
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(one_line(main))
