"""The options that several commands of `uad` share. Nothing here imports torch: `uad --help` shows them at once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from .bundle import available_bundles

KEY_HELP = "Key of a bundle, see `uad list`."


def known_bundle(key: str | None) -> str | None:
    """The key of a bundle that is there, or none where none was given. Raises typer.BadParameter."""
    if key is not None and key not in available_bundles():
        raise typer.BadParameter(f"{key!r} is none of {', '.join(available_bundles())}")
    return key


def _device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", name):
        raise typer.BadParameter(f"{name!r} is none of auto, cpu, cuda, cuda:0, ..., mps")
    return name


def _part(text: str | None) -> str | None:
    if text is not None:
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise typer.BadParameter(f"{text!r} is not like 1/8, ..., 8/8")
    return text


Method = Annotated[
    str,
    typer.Option("-m", "--method", help=KEY_HELP, callback=known_bundle, autocompletion=available_bundles),
]
MethodArgument = Annotated[str, typer.Argument(help=KEY_HELP, callback=known_bundle, autocompletion=available_bundles)]
Cohort = Annotated[Path, typer.Argument(help="CSV with the columns subject, split, the modalities, brain, lesion.")]
Seed = Annotated[int, typer.Option(help="Same seed, same result.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.", callback=_device)]
Engine = Annotated[
    Literal["torch", "onnxruntime"],  # those of `check_engine`
    typer.Option("--engine", help="What computes the networks; onnxruntime: on the CPU, by the extra onnx."),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Slices at a time; changes memory and speed only.")]
Weights = Annotated[Path | None, typer.Option(help="Your own weights instead of the bundle's.")]
StripHow = Annotated[
    Literal["atlas", "deepbet", "hd-bet"] | None,  # the values of `Strip`
    typer.Option(
        "--strip", help="Find the brain in a scan with the skull on: atlas (approximate), deepbet (T1), or hd-bet."
    ),
]
Register = Annotated[
    bool | None, typer.Option("--register/--no-register", help="Work in MNI152 space. Default: what the bundle wants.")
]
Series = Annotated[str | None, typer.Option(help="UID or description of the DICOM series to take.")]
Participants = Annotated[list[str] | None, typer.Option(help="Of a BIDS dataset; may be repeated.")]
Part = Annotated[
    str | None, typer.Option(help="i/n: the i-th of n parts of the cases. SLURM's array is read.", callback=_part)
]
Jobs = Annotated[int | None, typer.Option(min=1, help="Processes on this machine that share the cases, by Dask.")]
Scheduler = Annotated[str | None, typer.Option(help="Let a Dask cluster do the cases: tcp://HOST:PORT.")]
Items = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="ITEM=VALUE", help="Of the bundle's inference.json, such as L=300; may be repeated."),
]
