"""Settings of any bundles on drawn slices of a labelled cohort: what they find, what they keep, what they cost.

    uad cohort ixi-lesions IXI -o val --insert-into val
    python scripts/evaluate_slices.py val/cohort.csv -o result.json --row ddpm:level=200 --row ddpm:level=300

A row is a bundle or the path of an `inference.json`, and after a colon items of it with other values, `weights` too;
`network_def::num_seeds` and `network_def::mirror` among them. The maps are those of the slices, not smoothed in three
dimensions, on the network's grid; SSIM and PSNR are those of the reconstruction in the foreground outside lesions.
Settings are chosen so on the split "val": a slice costs a hundredth of a volume. Written after each row: the JSON; the
table is printed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from common.errors import one_line
from common.files import replacing
from common.results.case import versions
from common.weights import load_into, sha256
from common.workflows.drawn_slices import Slices, drawn, load_slices, pooled
from common.workflows.variants import Variant

METRICS = {"auprc": "AUPRC", "auroc": "AUROC", "max_dice_pooled": "best Dice (oracle)", "ssim": "SSIM", "psnr": "PSNR"}


def main(
    cohort: Annotated[Path, typer.Argument(help="Cohort CSV.")],
    row: Annotated[list[str], typer.Option(help="BUNDLE or inference.json, then [:item=value,...].")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The JSON.")],
    split: Annotated[str, typer.Option(help="val or test.")] = "val",
    max_slices: Annotated[int | None, typer.Option(help="Only so many, half with lesions, drawn.")] = 50,
    seed: Annotated[int, typer.Option(help="Of the detection and of the slices drawn.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Measure each row, and print the table."""
    rows, prepared, results = [Variant.parse(text) for text in row], dict[str, Slices](), []
    result = {
        "cohort": cohort.name,
        "split": split,
        "seed": seed,
        "device": device,
        "threads": torch.get_num_threads(),
        "rows": results,
        "versions": versions(),
    }
    print(f"| | {' | '.join(METRICS.values())} | s a slice |\n{'|---' * (len(METRICS) + 2)}|")
    for one in rows:
        content = one.parser().get_parsed_content
        preprocessing = content("preprocessing")
        about = json.loads((one.config.parent / "metadata.json").read_text(encoding="utf-8"))
        key = repr((about["modalities"], preprocessing.settings))  # bundles that prepare alike share the slices
        if key not in prepared:
            slices = load_slices(cohort, about["modalities"], split, preprocessing, seed)
            chosen = torch.arange(len(slices.image))
            if max_slices is not None:
                chosen = drawn(slices.diseased.numpy(), max_slices, seed)
            prepared[key] = slices.take(chosen)
        results.append({"name": one.name, **measure(content, prepared[key], seed, device)})
        print(line(results[-1]), flush=True)
        with replacing(output) as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def measure(content: Callable[[str], Any], slices: Slices, seed: int, device: str) -> dict[str, Any]:
    """A row of the result; `content` gives the items of its config."""
    network, weights = content("network_def"), content("weights")
    load_into(network, weights)
    network.to(device).eval().smoothing_vox = 0  # the neighbours of a drawn slice are far away
    started = time.perf_counter()
    found = network(slices.image.to(device).movedim(0, -1)[None])[0].movedim(-1, 0).cpu()
    seconds = (time.perf_counter() - started) / len(found)
    metrics = pooled(slices, found[:, 0], seed, reconstruction=found[:, 1:])
    return {
        "weights_sha256": sha256(weights),
        "n_slices": len(slices.image),
        "n_lesion_slices": int(slices.diseased.sum()),
        **{name: metrics[name] for name in METRICS},
        "seconds_per_slice": seconds,
    }


def line(result: dict[str, Any]) -> str:
    """A line of the table."""
    values = [f"{result[name]['value']:.3f}" for name in METRICS]
    return f"| {result['name']} | {' | '.join(values)} | {result['seconds_per_slice']:.2f} |"


if __name__ == "__main__":
    typer.run(one_line(main))
