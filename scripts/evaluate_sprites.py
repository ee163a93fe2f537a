"""The synthetic experiment of Pinaya et al. (MICCAI 2022, Table 1): sprites in head CT, beside the paper's numbers.

    for seed in 0 1 2; do
        uad cohort headct-sprites MedNIST/HeadCT -o sprites$seed --seed $seed --test-only
    done
    python scripts/evaluate_sprites.py sprites0 sprites1 sprites2 -o result.json \\
        --row latent_ddpm_headct:variant=c --row latent_ddpm_headct:num_score_timesteps=999 --row vae_headct

A row is a bundle or the path of an `inference.json`, and after a colon items of it with other values, `weights` too.
Written: the JSON and, beside it, the table as Markdown. Slices go to the method as the network prepares them. Images
are ranked by the mean of the highest 1 % of their map, and by the method's own score where it has one, which is what
the paper prints: the mean KL of the latent DDPM, -log p of the transformers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from monai.transforms import Orientation
from torch import Tensor

from common.cohorts.table import cohort_modalities, read_cohort
from common.detection.method import foreground_of, seeded_generators, top_mean
from common.detection.volume import slice_seeds
from common.errors import one_line
from common.files import replacing
from common.metrics import intensity_threshold, latent_ddpm_sprites
from common.results.case import versions
from common.transforms.head import HeadCTPreprocessing
from common.transforms.load import load_lesion
from common.weights import load_into, sha256
from common.workflows.variants import Variant

BATCH_SIZE = 50
METRICS = {"max_dice": "best Dice", "auprc": "AUPRC", "image_auroc": "image AUROC", "image_auprc": "image AUPRC"}
OF_METHOD = {"method_auroc": "image AUROC, method's score", "method_auprc": "image AUPRC, method's score"}
SECONDS = {"seconds_per_100": "s per 100 images", "score_seconds_per_100": "and for the method's score"}
PAPER = {  # best Dice, AUPRC, and where they are printed those of images by the method's score
    "AE": (0.165, 0.093),
    "VAE, dense": (0.533, 0.464),
    "f-AnoGAN": (0.492, 0.432),
    "transformer": (0.768, 0.808, 0.921, 0.707),
    "transformers, ensemble": (0.895, 0.956),
    "latent DDPM (a)": (0.777, 0.810),
    "latent DDPM (b)": (0.908, 0.950),
    "latent DDPM (c)": (0.920, 0.955, 0.827, 0.702),
}
# slices, places in their stacks -> maps (N, H, W), and the method's own scores (N,) where they come with them
Method = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]
Score = Callable[[Tensor, Tensor], Tensor | None]  # the same -> own scores (N,) that take passes of their own


def main(
    cohorts: Annotated[list[Path], typer.Argument(help="Folders that `uad cohort headct-sprites` wrote, a seed each.")],
    row: Annotated[list[str], typer.Option(help="BUNDLE or inference.json, then [:item=value,...].")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The result, a JSON file.")],
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    batch_size: Annotated[int, typer.Option(min=1, help="Slices at a time.")] = BATCH_SIZE,
) -> None:
    """Measure each row on each cohort."""
    rows = [Variant.parse(text) for text in row]
    results = [measure(one, cohorts, device, batch_size) for one in rows]
    result = record(cohorts, results, device, batch_size)
    text = table(result["rows"])
    for path, content in ((output, json.dumps(result, indent=2)), (output.with_suffix(".md"), text)):
        with replacing(path) as temporary:
            temporary.write_text(content + "\n", encoding="utf-8")
    print(text)


def record(
    cohorts: list[Path], results: list[dict[str, Any]], device: str, batch_size: int = BATCH_SIZE
) -> dict[str, Any]:
    """The result as JSON: the baselines that cost nothing, and the measured rows."""
    names = [path.resolve().name for path in cohorts]
    baselines = [intensity_row(cohorts, direction) for direction in ("bright", "dark")]
    about = {"cohorts": names, "device": device, "batch_size": batch_size}
    return {**about, "rows": baselines + results, "versions": versions()}


def measure(
    row: Variant, cohorts: list[Path], device: str, batch_size: int = BATCH_SIZE, with_score: bool = True
) -> dict[str, Any]:
    """What a method reaches on each cohort, and how long it takes.

    with_score: whether images are ranked by the method's own score too where that takes passes of its own.
    """
    content = row.parser().get_parsed_content
    network, weights, preprocessing = content("network_def"), content("weights"), content("preprocessing")
    load_into(network, weights)
    detector = network.to(device).eval().detector

    def batches(slices: Tensor, positions: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        seeds = slice_seeds(network.seed, positions)
        return zip(slices.to(device).split(batch_size), seeds.split(batch_size), strict=True)

    def method(slices: Tensor, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        found = [detector.detect(part, seeds=seeds) for part, seeds in batches(slices, positions)]
        return torch.cat([f.anomaly_map[:, 0].cpu() for f in found]), joined([f.score for f in found])

    def score(slices: Tensor, positions: Tensor) -> Tensor | None:
        return joined(
            [
                detector.score(part, foreground_of(part), seeded_generators(seeds))
                for part, seeds in batches(slices, positions)
            ]
        )

    has_score = with_score and detector.has_separate_score
    result = evaluate(method, preprocessing, cohorts, score if has_score else None)
    return {"name": row.name, **result, "weights_sha256": sha256(weights), "seed": network.seed}


def joined(scores: list[Tensor | None]) -> Tensor | None:
    """Those of all batches, on the CPU; None where there are none."""
    known = [score.cpu() for score in scores if score is not None]
    return torch.cat(known) if known else None


def intensity_row(cohorts: list[Path], direction: Any) -> dict[str, Any]:
    """The baseline that costs nothing: its seconds, which no two runs share, are left out."""

    def method(slices: Tensor, _: Tensor) -> tuple[Tensor, None]:
        volume = slices.movedim(0, -1)
        return intensity_threshold(volume, foreground_of(volume[None])[0], direction)[0].movedim(-1, 0), None

    return {"name": f"intensity, {direction}", "metrics": evaluate(method, HeadCTPreprocessing(), cohorts)["metrics"]}


def evaluate(
    method: Method, preprocessing: Callable[..., Any], cohorts: list[Path], score: Score | None = None
) -> dict[str, Any]:
    """The metrics, each as `mean` and `values` over the cohorts, and the `SECONDS`; `score`: where it is apart."""
    found, seconds, score_seconds, count = [], 0.0, 0.0, 0
    for cohort in cohorts:
        slices, sprites, positions = read_slices(cohort / "cohort.csv", preprocessing)
        started = time.perf_counter()
        maps, of_method = method(slices, positions)
        seconds, count = seconds + time.perf_counter() - started, count + len(slices)
        if score is not None:
            started = time.perf_counter()
            of_method = score(slices, positions)
            score_seconds += time.perf_counter() - started
        of_map = torch.stack([top_mean(m[s]) for m, s in zip(maps, foreground_of(slices)[:, 0], strict=True)])
        found.append(metrics_of(maps, sprites, of_map, of_method))
    values = {metric: [one[metric] for one in found] for metric in found[0]}
    metrics = {metric: {"mean": float(np.mean(v)), "values": v} for metric, v in values.items()}
    apart = {} if score is None else {"score_seconds_per_100": 100 * score_seconds / count}
    return {"metrics": metrics, "seconds_per_100": 100 * seconds / count, **apart}


def metrics_of(maps: Tensor, sprites: Tensor, of_map: Tensor, of_method: Tensor | None) -> dict[str, float]:
    """`METRICS`, and `OF_METHOD` where there is such a score: the paper's protocol by either score of the images."""
    metrics = latent_ddpm_sprites(maps.numpy(), sprites.numpy(), of_map.double().numpy())
    if of_method is None:
        return metrics
    own = latent_ddpm_sprites(maps.numpy(), sprites.numpy(), of_method.double().numpy())
    return metrics | {"method_auroc": own["image_auroc"], "method_auprc": own["image_auprc"]}


def read_slices(cohort: Path, preprocessing: Callable[..., Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Prepared slices (N, 1, H, W), sprites (N, H, W) bool, and the place of each slice in its stack (N,)."""
    slices, sprites, positions = [], [], []
    for item in read_cohort(cohort, cohort_modalities(cohort), "test"):
        data = preprocessing(item)
        image = data["image"].as_tensor().movedim(-1, 0)
        lesion = torch.zeros_like(image[:, 0], dtype=torch.bool)
        if "lesion" in item:
            mask = load_lesion(str(item["lesion"]), data["brain"])
            lesion = torch.as_tensor(Orientation("RAS", labels=None)(mask)[0]).movedim(-1, 0) > 0
        slices.append(image)
        sprites.append(lesion)
        positions.append(torch.arange(len(image)))
    return torch.cat(slices), torch.cat(sprites), torch.cat(positions)


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: means with the range over the cohorts; the paper's rows below."""
    header = METRICS | OF_METHOD | SECONDS
    lines = [f"| | {' | '.join(header.values())} |", f"|---|{'---|' * len(header)}"]
    for result in results:
        cells = {name: cell(metric["values"]) for name, metric in result["metrics"].items()}
        cells |= {name: f"{result[name]:.2g}" for name in SECONDS if name in result}
        lines.append(line(result["name"], cells))
    for name, numbers in PAPER.items():
        printed = zip(("max_dice", "auprc", *OF_METHOD), numbers, strict=False)
        lines.append(line(f"paper: {name}", {metric: f"{number:.3f}" for metric, number in printed}))
    return "\n".join(lines)


def line(name: str, cells: Mapping[str, str]) -> str:
    """A row of the table; a dash where nothing is known."""
    return f"| {name} | {' | '.join(cells.get(column, '-') for column in METRICS | OF_METHOD | SECONDS)} |"


def cell(values: list[float]) -> str:
    """Mean (lowest-highest)."""
    return f"{np.mean(values):.3f}" + (f" ({min(values):.3f}-{max(values):.3f})" if len(values) > 1 else "")


if __name__ == "__main__":
    typer.run(one_line(main))
