"""The command `uad`: thin, everything happens in the bundles' own workflows."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from .bundle import available_bundles, run_inference
from .errors import UADError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

FAILED = 3


def _known(method: str) -> str:
    if method not in available_bundles():
        raise typer.BadParameter(f"{method!r} is none of {', '.join(available_bundles())}")
    return method


Method = Annotated[
    str, typer.Option("-m", "--method", help=f"One of {', '.join(available_bundles())}.", callback=_known)
]


@app.callback()
def main() -> None:
    """Find what is abnormal in a brain scan, with methods trained on healthy images only."""


@app.command()
def detect(
    image: Annotated[list[Path], typer.Argument(help="NIfTI files, or a folder of them; skull-stripped T1.")],
    method: Method,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the results, one folder a case.")],
    seed: Annotated[int, typer.Option(help="Same seed, same result.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Slices at a time; changes memory and speed only.")] = 16,
) -> None:
    """Write an anomaly map, a segmentation and a pseudo-healthy reconstruction of each scan, on its own grid."""
    paths = [str(path) for path in image]
    _run(
        method,
        ["inference.json"],
        image=paths[0] if len(paths) == 1 else paths,
        output_dir=str(output),
        network_def__seed=seed,
        network_def__batch_size=batch_size,
    )


@app.command()
def evaluate(
    cohort: Annotated[Path, typer.Argument(help="CSV with the columns subject, split, T1, lesion.")],
    method: Method,
    output: Annotated[Path, typer.Option("-o", "--output", help="The result, a JSON file.")],
    seed: Annotated[int, typer.Option(help="Of the method and of the bootstrap.")] = 0,
) -> None:
    """Measure a method on the test subjects of a labelled cohort, beside the baselines that cost nothing."""
    _run(
        method,
        ["inference.json", "evaluate.json"],
        cohort=str(cohort),
        result=str(output),
        network_def__seed=seed,
    )


def _run(method: str, configs: list[str], **override: object) -> None:
    logging.disable(logging.ERROR)  # what MONAI and ignite say of a failed case is said once, below
    override = {name.replace("__", "::"): value for name, value in override.items()}
    try:
        run_inference(method, configs, **override)
    except UADError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise typer.Exit(FAILED) from None
