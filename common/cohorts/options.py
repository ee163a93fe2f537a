"""Arguments that all kinds of cohorts share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DataDir = Annotated[Path, typer.Argument(help="Folder of the images.", exists=True, file_okay=False)]
Output = Annotated[Path, typer.Option("-o", "--output", help="Folder for cohort.csv and what is made for it.")]
Seed = Annotated[int, typer.Option(help="Same seed, same cohort.")]
