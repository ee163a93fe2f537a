"""A picture of one case: input, reconstruction, map over input, outline of the segmentation."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import matplotlib as mpl
import nibabel as nib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from monai.data import MetaTensor
from monai.transforms import Orientation
from scipy import ndimage

if TYPE_CHECKING:
    from .case import Case

COLUMNS = 6
ROWS = ("input", "reconstruction", "anomaly map", "segmentation")
MAP_ROW = ROWS.index("anomaly map")
FULL = 3  # times the threshold, where the colours of the map end
DPI = 100
LEFT_IN, RIGHT_IN, TOP_IN, FOOT_IN, GAP_IN = 0.35, 1.1, 0.3, 0.3, 0.03  # around the slices
LEAST_WIDTH_IN = 7.5  # or a title would take more lines than slices
WIDTH_EM = 0.55  # of a letter, rather too much
BANNER, TEXT, QUIET, SIDE = "#b00020", "white", "#9aa4b0", "#8ecbff"
FOOT = "The patient's right is on the left (R). z: RAS, as in lesions.csv. Research software, not a medical device."


def save_preview(case: Case, threshold: float, path: Path, doubts: Sequence[str] = (), title: str = "") -> None:
    """Write a PNG of axial slices: those with the most abnormal tissue and, between them, an even sample.

    Radiological view: the patient's left is on the right. The colour scale of the map is the same for every case of a
    bundle: it begins at the threshold and is full at three times the threshold. Where the row of the map is (left, top,
    right, bottom in pixels) stands in the PNG's text `map_row`.

    doubts: reasons not to interpret the result, which stand above the slices in red. title: above the slices, lines.
    """
    slices = _Slices.of(case)
    grid = _Grid.around(slices, [*_titles(title), *_banners(doubts)])
    figure = Figure(figsize=(grid.width, grid.height), dpi=DPI, facecolor="black")
    grid.write_header(figure)
    colours, norm = map_colours(threshold)
    for row, picture in enumerate((slices.image, slices.reconstruction, slices.image, slices.image)):
        for column in range(len(slices.z_mm)):
            axes = figure.add_axes(grid.cell(row, column))
            axes.set_axis_off()
            axes.imshow(picture[column], cmap="gray", norm=slices.window, aspect=slices.aspect)
            if row == MAP_ROW:
                heat = slices.anomaly_map[column]
                shown = np.ma.masked_less_equal(heat, threshold)
                axes.imshow(shown, cmap=colours, norm=norm, aspect=slices.aspect, interpolation="nearest")
            if ROWS[row] == "segmentation" and slices.mask[column].any():
                axes.contour(slices.mask[column], levels=[0.5], colors="red", linewidths=0.8)
            _mark(axes, "R", "L", f"z = {slices.z_mm[column]:.0f} mm" if row == 0 else "")
    for row, name in enumerate(ROWS):
        figure.text(*grid.beside(row), name, color=TEXT, fontsize=9, rotation=90, ha="center", va="center")
    _colour_bar(figure, grid.bar(), colours, norm, threshold)
    left, bottom, _, _ = grid.cell(len(ROWS) - 1, 0)
    figure.text(left, bottom - 0.07 / grid.height, FOOT, color=QUIET, fontsize=7.5, va="top")
    metadata: dict[str, Any] = {"Software": None, "map_row": " ".join(map(str, grid.map_row()))}
    FigureCanvasAgg(figure).print_png(path, metadata=metadata)


@dataclass(frozen=True)
class _Slices:
    """The chosen slices, lowest first: (slices, rows from the front, columns from the patient's right), and more."""

    image: np.ndarray
    reconstruction: np.ndarray
    anomaly_map: np.ndarray
    mask: np.ndarray
    z_mm: list[float]  # RAS, of the middle of each slice
    aspect: float  # of a pixel, height by width
    window: Normalize

    @classmethod
    def of(cls, case: Case) -> _Slices:
        image, brain, anomaly_map, reconstruction, mask = (
            _axial(volume)
            for volume in (case.image, case.brain, case.anomaly_map, case.reconstruction, case.segmentation)
        )
        box = ndimage.find_objects((brain > 0).astype(np.uint8))[0]  # the air around a brain shows nothing
        inside = brain[box] > 0
        chosen = choose_slices(np.where(inside, anomaly_map[box], 0), inside)
        low, top = np.percentile(image[box][inside].astype(np.float64), (0.5, 99.5))
        upright = cast(MetaTensor, Orientation("RAS", labels=None)(case.image))
        row, column = ((side.start + side.stop - 1) / 2 for side in box[1:])
        middle = [upright.shape[1] - 1 - column, upright.shape[2] - 1 - row]  # its axes run the other way
        places = [[*middle, box[0].start + index] for index in chosen]
        return cls(
            image=image[box][chosen],
            reconstruction=reconstruction[box][chosen],
            anomaly_map=anomaly_map[box][chosen],
            mask=mask[box][chosen] > 0,
            z_mm=(nib.affines.apply_affine(np.asarray(upright.affine), places)[:, 2].round() + 0.0).tolist(),
            aspect=float(upright.pixdim[1] / upright.pixdim[0]),
            window=Normalize(min(low, 0.0), top),
        )


@dataclass(frozen=True)
class _Line:
    """A line of the header, above the slices."""

    text: str
    size_pt: float
    weight: str = "normal"
    background: str | None = None

    @property
    def height_in(self) -> float:
        return self.size_pt * 1.6 / 72

    def wrapped(self, room_in: float) -> list[_Line]:
        """In as many lines as it takes."""
        parts = textwrap.wrap(self.text, int(room_in * 72 / (WIDTH_EM * self.size_pt)))
        return [replace(self, text=part) for part in parts or [""]]


def _titles(title: str) -> list[_Line]:
    first, *others = title.split("\n")
    return [_Line(first, 13, "bold"), *(_Line(line, 9.5) for line in others)] if title else []


def _banners(doubts: Sequence[str]) -> list[_Line]:
    if not doubts:
        return []
    head = _Line("UNRELIABLE, do not interpret", 13, "bold", BANNER)
    edge = _Line("", 3, background=BANNER)
    return [_Line("", 3), edge, head, *(_Line(f"- {doubt}", 10, background=BANNER) for doubt in doubts), edge]


@dataclass(frozen=True)
class _Grid:
    """Where things are on the figure; inches from the top left here, fractions from the bottom left to the outside."""

    columns: int
    cell_width: float
    cell_height: float
    lines: list[_Line]

    @classmethod
    def around(cls, slices: _Slices, lines: list[_Line]) -> _Grid:
        columns, (height, width) = len(slices.z_mm), slices.image.shape[1:]
        cell_width = min(2.4, 12 / columns)
        cell_height = cell_width * min(max(height * slices.aspect / width, 0.5), 1.6)
        wide = cls(columns, cell_width, cell_height, [])
        wrapped = [
            _Line(text, line.size_pt, line.weight, line.background)
            for line in lines
            for text in textwrap.wrap(line.text, int((wide.width - 2 * LEFT_IN) * 72 / (WIDTH_EM * line.size_pt)))
            or [""]
        ]
        return cls(columns, cell_width, cell_height, wrapped)

    @property
    def width(self) -> float:
        return max(LEFT_IN + self.columns * self.cell_width + RIGHT_IN, LEAST_WIDTH_IN)

    @property
    def header(self) -> float:
        return 0.08 + sum(line.height_in for line in self.lines) + TOP_IN

    @property
    def height(self) -> float:
        return self.header + len(ROWS) * self.cell_height + FOOT_IN

    def cell(self, row: int, column: int) -> tuple[float, float, float, float]:
        """Left, bottom, width, height."""
        left, bottom = LEFT_IN + column * self.cell_width, FOOT_IN + (len(ROWS) - 1 - row) * self.cell_height
        width, height = self.cell_width - GAP_IN, self.cell_height - GAP_IN
        return left / self.width, bottom / self.height, width / self.width, height / self.height

    def beside(self, row: int) -> tuple[float, float]:
        """The middle of the left margin of a row."""
        _, bottom, _, height = self.cell(row, 0)
        return LEFT_IN / 2 / self.width, bottom + height / 2

    def bar(self) -> tuple[float, float, float, float]:
        """Of the colours, to the right of the map."""
        left, bottom, width, height = self.cell(MAP_ROW, self.columns - 1)
        return left + width + 0.12 / self.width, bottom + 0.06 * height, 0.14 / self.width, 0.82 * height

    def map_row(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom in pixels."""
        top = self.header + MAP_ROW * self.cell_height
        right = LEFT_IN + self.columns * self.cell_width - GAP_IN
        inches = (LEFT_IN, top + GAP_IN, right, top + self.cell_height)
        left, upper, right, lower = (round(inch * DPI) for inch in inches)
        return left, upper, right, lower

    def write_header(self, figure: Figure) -> None:
        top = 0.08
        for line in self.lines:
            middle = 1 - (top + line.height_in / 2) / self.height
            if line.background:
                corner = 0, 1 - (top + line.height_in) / self.height
                size = 1, line.height_in / self.height
                figure.add_artist(Rectangle(corner, *size, facecolor=line.background, linewidth=0, antialiased=False))
            style: dict[str, Any] = {"fontsize": line.size_pt, "fontweight": line.weight, "parse_math": False}
            figure.text(LEFT_IN / self.width, middle, line.text, color=TEXT, va="center_baseline", **style)
            top += line.height_in


def map_colours(threshold: float) -> tuple[Colormap, Normalize]:
    """Of the map, from 0 to three times the threshold: grey below the threshold, where nothing is shown, then red,
    yellow, white."""
    hot = mpl.colormaps["hot"](np.linspace(1 / FULL, 1, 256 * (FULL - 1)))
    below = np.tile((0.25, 0.25, 0.25, 1.0), (256, 1))
    return ListedColormap(np.concatenate([below, hot])), Normalize(0, FULL * threshold if threshold > 0 else 1)


def _mark(axes: Axes, left: str, right: str, place: str) -> None:
    """The sides of the patient, and above the slice where it is."""
    style: dict[str, Any] = {"transform": axes.transAxes, "fontsize": 9, "va": "top", "color": SIDE}
    axes.text(0.02, 0.99, left, ha="left", **style)
    axes.text(0.98, 0.99, right, ha="right", **style)
    axes.text(0.5, 1.02, place, ha="center", **style | {"va": "bottom", "color": TEXT, "fontsize": 9})


def _colour_bar(
    figure: Figure, place: tuple[float, float, float, float], colours: Colormap, norm: Normalize, threshold: float
) -> None:
    """With the threshold marked; nothing below it is shown in the map."""
    axes = figure.add_axes(place)
    ticks = {0.0: "0", threshold: f"{threshold:.3g}\nthreshold"}
    ticks |= {times * threshold: f"{times * threshold:.3g}" for times in range(2, FULL + 1)}
    bar = figure.colorbar(ScalarMappable(norm, colours), cax=axes, extend="max", ticks=list(ticks))
    bar.ax.set_yticklabels(list(ticks.values()))
    bar.ax.axhline(threshold, color=TEXT, linewidth=2)
    bar.ax.tick_params(color=TEXT, labelcolor=TEXT, labelsize=8)
    bar.outline.set_edgecolor(QUIET)  # type: ignore[operator]
    bar.ax.set_title("map", color=TEXT, fontsize=8, loc="left")


def _axial(volume: MetaTensor) -> np.ndarray:
    """(1, H, W, D) on any grid -> (slices from below, rows from the front, columns from the patient's right)."""
    ras = np.asarray(Orientation("RAS", labels=None)(volume.to(torch.float32)).cpu())[0]
    return ras.transpose(2, 1, 0)[:, ::-1, :].copy()[:, :, ::-1]


def choose_slices(anomaly_map: np.ndarray, brain: np.ndarray, count: int = COLUMNS) -> list[int]:
    """Indices of slices (axis 0), rising: half an even sample of the brain, half those with the largest map sum."""
    present = np.flatnonzero(brain.any(axis=(1, 2)))
    even = present[np.linspace(0, len(present) - 1, count // 2 + 2).astype(int)[1:-1]].tolist()
    gap = max(1, len(present) // (3 * count))
    chosen = list(even)
    for index in np.argsort(-anomaly_map.sum(axis=(1, 2), dtype=np.float64), kind="stable").tolist():
        if len(chosen) == min(count, len(present)):
            break
        if all(abs(index - other) >= gap for other in chosen) and index in present:
            chosen.append(index)
    return sorted(set(chosen))
