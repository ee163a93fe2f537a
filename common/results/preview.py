"""A picture of one case: input, reconstruction, map over input, outline of the segmentation."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import nibabel as nib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from monai.data import MetaTensor
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
    axes = figure.add_axes((0, 0, 1, 1), autoscale_on=False)  # one for all slices: axes take long to make
    axes.set_axis_off()
    for row, picture in enumerate((slices.image, slices.reconstruction, slices.image, slices.image)):
        for column in range(len(slices.z_mm)):
            place = grid.fitted(row, column, slices.height_by_width)
            axes.imshow(picture[column], cmap="gray", norm=slices.window, aspect="auto", extent=place)
            if row == MAP_ROW:
                shown = np.ma.masked_less_equal(slices.anomaly_map[column], threshold)
                axes.imshow(shown, cmap=colours, norm=norm, aspect="auto", extent=place, interpolation="nearest")
            if ROWS[row] == "segmentation" and slices.mask[column].any():
                mask = slices.mask[column]
                axes.contour(mask, levels=[0.5], colors="red", linewidths=0.8, origin="image", extent=place)
            _mark(axes, place, "R", "L", f"z = {slices.z_mm[column]:.0f} mm" if row == 0 else "")
    for row, name in enumerate(ROWS):
        figure.text(*grid.beside(row), name, color=TEXT, fontsize=9, rotation=90, ha="center", va="center")
    _colour_bar(figure, grid.bar(), colours, norm, threshold)
    left, bottom, _, _ = grid.cell(len(ROWS) - 1, 0)
    figure.text(left, bottom - 0.07 / grid.height, FOOT, color=QUIET, fontsize=7.5, va="top")
    metadata: dict[str, Any] = {"Software": None, "map_row": " ".join(map(str, grid.map_row()))}
    # level 2 of zlib: a third of the time of 6, the default, and as small within a few per cent
    FigureCanvasAgg(figure).print_png(path, metadata=metadata, pil_kwargs={"compress_level": 2})


@dataclass(frozen=True)
class _Slices:
    """The chosen slices, lowest first: (slices, rows from the front, columns from the patient's right), and more."""

    image: np.ndarray
    reconstruction: np.ndarray
    anomaly_map: np.ndarray
    mask: np.ndarray
    z_mm: list[float]  # RAS, of the middle of each slice
    height_by_width: float  # of a slice
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
        shape = case.image.shape[1:]
        upright = case.affine @ nib.orientations.inv_ornt_aff(nib.io_orientation(case.affine), shape)
        row, column = ((side.start + side.stop - 1) / 2 for side in box[1:])
        middle = [image.shape[2] - 1 - column, image.shape[1] - 1 - row]  # the axes of RAS run the other way
        right_mm, front_mm, _ = nib.affines.voxel_sizes(upright)
        places = [[*middle, box[0].start + index] for index in chosen]
        return cls(
            image=image[box][chosen],
            reconstruction=reconstruction[box][chosen],
            anomaly_map=anomaly_map[box][chosen],
            mask=mask[box][chosen] > 0,
            z_mm=(nib.affines.apply_affine(upright, places)[:, 2].round() + 0.0).tolist(),
            height_by_width=float(front_mm * inside.shape[1] / right_mm / inside.shape[2]),
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
        columns = len(slices.z_mm)
        cell_width = min(2.4, 12 / columns)
        cell_height = cell_width * min(max(slices.height_by_width, 0.5), 1.6)
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

    def fitted(self, row: int, column: int, height_by_width: float) -> tuple[float, float, float, float]:
        """Left, right, bottom, top of a picture in the middle of a cell."""
        left, bottom, width, height = self.cell(row, column)
        half_width = min(width, height * self.height / self.width / height_by_width) / 2
        half_height = half_width * height_by_width * self.width / self.height
        x, y = left + width / 2, bottom + height / 2
        return x - half_width, x + half_width, y - half_height, y + half_height

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


def _mark(axes: Axes, place: tuple[float, float, float, float], left: str, right: str, above: str) -> None:
    """The sides of the patient, and above the slice where it is."""
    x, other_x, bottom, top = place
    width, height = other_x - x, top - bottom
    style: dict[str, Any] = {"fontsize": 9, "va": "top", "color": SIDE}
    axes.text(x + 0.02 * width, top - 0.01 * height, left, ha="left", **style)
    axes.text(x + 0.98 * width, top - 0.01 * height, right, ha="right", **style)
    if above:
        style |= {"va": "bottom", "color": TEXT}
        axes.text(x + width / 2, top + 0.02 * height, above, ha="center", **style)


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
    """(1, H, W, D) on any grid -> a view, (slices from below, rows from front, columns from the right)."""
    to_ras = nib.io_orientation(np.asarray(volume.affine))
    ras = nib.orientations.apply_orientation(volume.as_tensor()[0].cpu().numpy(), to_ras)
    return ras.transpose(2, 1, 0)[:, ::-1, ::-1]


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
