"""Draw what each bundle's method does with its sample, for its page of the documentation.

    python scripts/make_stage_pictures.py [KEY]...

Writes docs/methods/KEY.png, the picture of `uad figures` in fewer colours, which makes it small. The sha256 of the
weights stands in its text `weights_sha256`: run this whenever the weights of a bundle have changed; a test says so
otherwise. All bundles take a few minutes on one CPU core.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import matplotlib as mpl
import numpy as np
import typer
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from common.bundle import BUNDLES_DIR, WEIGHTS, available_bundles, load_workflow
from common.errors import one_line
from common.files import replacing
from common.report.stages import COLOURS, SIDE
from common.weights import sha256
from common.workflows.figures import draw_stages

PICTURES = Path(__file__).resolve().parents[1] / "docs" / "methods"
SHADES = 42  # of each colour map


def main(
    keys: Annotated[list[str] | None, typer.Argument(help="Default: all.")] = None,
    folder: Annotated[Path, typer.Option("-o", "--output", help="Folder.")] = PICTURES,
) -> None:
    """Draw one after the other."""
    folder.mkdir(parents=True, exist_ok=True)
    for key in keys or available_bundles():
        make_picture(key, folder / f"{key}.png")
        print(folder / f"{key}.png")


def make_picture(key: str, path: Path) -> None:
    """The middle slice of the scan that the bundle's configs name."""
    image = load_workflow(key, ["inference.json"]).parser.get_parsed_content("image")
    text = PngInfo()
    text.add_text("weights_sha256", sha256(BUNDLES_DIR / key / WEIGHTS))
    with tempfile.TemporaryDirectory() as temporary:
        drawn = Path(temporary) / "stages.png"
        draw_stages(key, [Path(file) for file in ([image] if isinstance(image, str) else image)], drawn, None)
        with Image.open(drawn) as picture:
            small = picture.convert("RGB").quantize(palette=palette(), dither=Image.Dither.NONE)
    with replacing(path) as new:
        small.save(new, "PNG", optimize=True, pnginfo=text)


def palette() -> Image.Image:
    """A picture of all the colours that are drawn with."""
    shades = [mpl.colormaps[name](np.linspace(0, 1, SHADES))[:, :3] for name in sorted(set(COLOURS.values()))]
    colours = np.concatenate([*shades, [mpl.colors.to_rgb(SIDE)]])
    holder = Image.new("P", (1, 1))
    holder.putpalette((colours * 255).round().astype(np.uint8).tobytes())
    return holder


if __name__ == "__main__":
    typer.run(one_line(main))
