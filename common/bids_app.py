"""What a BIDS App (Gorgolewski et al. 2017) takes on its command line beside what typer knows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, Option
from typer.core import TyperCommand

LABEL_OPTIONS = ("--participant-label", "--participant_label")


BidsDir = Annotated[Path, Argument(help="Root of a BIDS dataset, which is only read.")]
OutputDir = Annotated[Path, Argument(help="Root of the derivative dataset, of one bundle alone.")]
AnalysisLevel = Annotated[Literal["participant"], Argument(help="Each scan by itself; there is no group level.")]
Labels = Annotated[
    list[str] | None, Option(*LABEL_OPTIONS, metavar="LABEL", help="One or several, with or without sub-.")
]


class BidsAppCommand(TyperCommand):
    """A command whose labels of participants may follow one option: `--participant_label 01 02`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse what `repeat_option` makes of the arguments."""
        return super().parse_args(ctx, repeat_option(args))


def repeat_option(arguments: Sequence[str]) -> list[str]:
    """Arguments with the option of the labels before each of them, as typer wants it.

    All that follows the option up to the next one is a label, so what is no option comes before it.
    """
    found: list[str] = []
    option, labels = "", 0
    for argument in arguments:
        if argument.startswith("-"):
            if option and not labels:
                found.append(option)  # without a label, which is an error
            option, labels = (argument, 0) if argument in LABEL_OPTIONS else ("", 0)
            found += [] if option else [argument]
        else:
            found += [option, argument] if option else [argument]
            labels += 1
    return [*found, option] if option and not labels else found
