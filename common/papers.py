"""The verbs of `uad` about the papers, `reproduce` and `figures`; what they need is imported when they run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .bundle import checked_items, parse_items
from .errors import SettingError
from .workflows.recipes import Networks, recipes


def reproduce(
    name: Annotated[str | None, typer.Argument(help="Of the table, see --list.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of the data sets, each in a folder of its own: see --dry-run.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for everything that is made; tables may share it.")
    ] = None,
    networks: Annotated[
        Networks, typer.Option(help="paper, compact: trained with these configs; shipped: as the bundles have them.")
    ] = Networks.PAPER,
    show: Annotated[bool, typer.Option("--list", help="Only say which tables there are.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say the steps, and rough hours on a GPU.")] = False,
    strip: Annotated[str | None, typer.Option(help="How brains are found in heads: atlas, deepbet, hd-bet.")] = None,
    items: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="ITEM=VALUE", help="Of the configs that have it; may be repeated."),
    ] = None,
) -> None:
    """Make a table of a paper from the data sets, the printed numbers beside: train, calibrate, measure. Resumable."""
    if show:
        for key, one in recipes().items():
            print(f"{key}: {one.title}")
        return
    if name is None or data is None or output is None:
        raise SettingError("uad reproduce", "NAME, --data or -o is missing", "give all three, or --list alone")
    from .workflows import reproduce as tables  # slow to import

    plan = tables.Reproduction(name, data, output, networks, strip, parse_items(items or ()))
    if dry_run:
        print("\n".join(tables.steps(plan)))
        return
    print(f"{tables.reproduce(plan)}: the table")


def figures(
    key: Annotated[str, typer.Argument(help="Of a bundle, see `uad list`.")],
    case: Annotated[list[Path], typer.Argument(help="The scan; of several modalities a file each.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The picture, a PNG file.")],
    index: Annotated[
        int | None, typer.Option("--slice", help="On the network's grid, from below. Default: the middle one.")
    ] = None,
    strip: Annotated[str | None, typer.Option(help="How the brain is found in a head: atlas, deepbet, hd-bet.")] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same picture.")] = 0,
    items: Annotated[
        list[str] | None, typer.Option("--set", metavar="ITEM=VALUE", help="Of inference.json; may be repeated.")
    ] = None,
) -> None:
    """Draw what a method does with a slice: its steps, maps and masks, before the result."""
    from .workflows.figures import draw_stages  # slow to import

    override = checked_items(key, items or ()) | {"network_def::seed": seed}
    if strip is not None:
        override["preprocessing::strip"] = strip
    draw_stages(key, case, output, index, **override)
    print(f"{output}: the picture")
