"""The tables and plots of a benchmark, from the `result.json` of each method."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ..errors import ResultError
from ..metrics.bootstrap import FEW_SUBJECTS
from ..results.read import read_json
from .benchmark_table import EXPLAINED, LESIONS, SITES, SUBJECTS, TIMES, VOXELS, cell

AGAIN = "run uad benchmark again"
TABLES = {  # title -> metrics of result.json with their headings, of methods alone (or of baselines too)
    "Voxels": (VOXELS, False),
    "Slices and healthy subjects": (SUBJECTS, False),
    "Lesions": (LESIONS, True),
}
TEXT, GRID = "#c9d1d9", "#30363d"
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "uad",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.parse_math": False,  # a method's name is no formula
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "legend.frameon": False,
}
COLOURS = ("#58a6ff", "#f0883e", "#3fb950", "#f778ba", "#d2a8ff", "#e3b341", "#39c5cf", "#ff7b72", "#a5d6ff", "#7ee787")

OPTIONAL = {
    "cohort": "-",
    "cohort_sha256": "-",
    "seed": "-",
    "failed": {},
    "machine": {},
    "versions": {},
    "options": {},
}
COLUMNS = 4  # of box plots

Results = Mapping[str, Mapping[str, Any]]


def benchmark_content(folder: Path) -> dict[str, Any]:
    """What the page of a benchmark shows: tables of the methods by falling AUPRC, what failed, and plots as SVG.

    Raises ResultError where a file is missing or broken.
    """
    benchmark = read_json(folder / "benchmark.json", AGAIN)
    try:
        keys = [str(method["key"]) for method in benchmark["methods"]]
        results = {key: read_json(folder / key / "result.json", AGAIN) for key in keys}
        drawn = [(title, caption, draw(results)) for title, (caption, draw) in PLOTS.items()]
        return {
            "title": folder.resolve().name,
            "benchmark": OPTIONAL | benchmark,
            "counts": next(iter(results.values()), {}),
            "few": FEW_SUBJECTS,
            "tables": [
                *(_table(results, title, *about) for title, about in TABLES.items()),
                _sites(results),
                _run_times(results),
            ],
            "plots": [plot for plot in drawn if plot[2] is not None],
        }
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        fact = f"not the files of one benchmark ({type(error).__name__}: {error})"
        raise ResultError(folder, fact, AGAIN) from error


def _table(results: Results, title: str, metrics: Mapping[str, str], of_methods: bool) -> dict[str, Any]:
    rows = {key: result for key, result in results.items() if not (of_methods and is_baseline(result))}
    return {
        "title": title,
        "caption": EXPLAINED[title],
        "headings": list(metrics.values()),
        "rows": [(key, [_cell(result, name) for name in metrics]) for key, result in rows.items()],
    }


def _sites(results: Results) -> dict[str, Any]:
    measured = {key: r["sites"] for key, r in results.items() if r.get("sites") and not is_baseline(r)}
    first: list[dict[str, Any]] = next(iter(measured.values()), [])
    return {
        "title": "Sites",
        "caption": EXPLAINED["Sites"],
        "headings": [f"{site['site'] or 'all'}: {heading}" for site in first for heading in SITES.values()],
        "rows": [(key, [_cell(site, name) for site in sites for name in SITES]) for key, sites in measured.items()],
    }


def _run_times(results: Results) -> dict[str, Any]:
    measured = {key: result["run_time"] for key, result in results.items() if result.get("run_time")}
    rows = [
        (key, [(_number(time.get(name)), str(time.get(name, "-")), "", False) for name in TIMES])
        for key, time in measured.items()
    ]
    return {"title": "Run time", "caption": EXPLAINED["Run time"], "headings": list(TIMES.values()), "rows": rows}


def _cell(result: Mapping[str, Any], name: str) -> tuple[float | None, str, str, bool]:
    """Of a metric: value to sort by, text, interval, whether it is of few subjects."""
    metric = result.get(name) or {"value": None, "ci95": [None, None]}
    text, _, interval = cell(metric).partition(" ")
    return _number(metric.get("value")), text, re.sub("[()]", "", interval), "few_subjects" in metric


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def is_baseline(result: Mapping[str, Any]) -> bool:
    """Whether it costs nothing: no network, no time, no shipped threshold."""
    return result.get("kind") == "baseline"


def _colours(results: Results) -> dict[str, str]:
    return dict(zip(results, cycle(COLOURS), strict=False))


def _curve(result: Mapping[str, Any], name: str) -> NDArray[np.float64]:
    return np.asarray(result.get("curves", {}).get(name) or [], dtype=float)


def _draw(width: float, height: float, columns: int, fill: Callable[[Sequence[Axes]], None], rows: int = 1) -> Markup:
    """A figure as an SVG element, with text that stays text."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
        fill(figure.subplots(rows, columns, squeeze=False).ravel().tolist())
        buffer = StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(buffer, metadata=nothing)
    svg = buffer.getvalue()
    return Markup(svg[svg.index("<svg") :])  # noqa: S704 matplotlib escapes the texts that it is given


def _line(result: Mapping[str, Any]) -> str:
    return "--" if is_baseline(result) else "-"


def _precision_recall(results: Results) -> Markup | None:
    shown = {key: result for key, result in results.items() if len(_curve(result, "recall"))}

    def fill(axes: Sequence[Axes]) -> None:
        for key, result in shown.items():
            recall, precision = _curve(result, "recall"), _curve(result, "precision")
            axes[0].plot(recall, precision, _line(result), label=key, color=_colours(results)[key])
        axes[0].set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1))
        axes[0].figure.legend(loc="outside lower center", ncols=3, fontsize=8)

    return _draw(5, 5, 1, fill) if shown else None


def _dice(results: Results) -> Markup | None:
    shown = {key: result for key, result in results.items() if len(_curve(result, "dice"))}

    def fill(axes: Sequence[Axes]) -> None:
        for key, result in shown.items():
            threshold, dice = _curve(result, "threshold"), _curve(result, "dice")
            unit = _number(result.get("threshold")) or float(threshold[np.argmax(dice)]) or 1.0
            above = threshold > 0
            axes[0].plot(threshold[above] / unit, dice[above], _line(result), label=key, color=_colours(results)[key])
        axes[0].axvline(1, color=TEXT, linewidth=0.8, linestyle=":")
        axes[0].set(xlabel="threshold / shipped threshold", ylabel="Dice, pooled", xscale="log", xlim=(0.1, 10))
        axes[0].xaxis.set_major_formatter("{x:g}")
        axes[0].set_ylim(bottom=0)
        axes[0].figure.legend(loc="outside lower center", ncols=3, fontsize=8)

    return _draw(5, 5, 1, fill) if shown else None


def _time(results: Results) -> Markup | None:
    shown = {
        key: (float(result["run_time"]["network_seconds_per_slice"]), result["auprc"])
        for key, result in results.items()
        if result.get("run_time") and result["auprc"]["value"] is not None
    }
    free = {key: r["auprc"]["value"] for key, r in results.items() if is_baseline(r) and r["auprc"]["value"]}

    def fill(axes: Sequence[Axes]) -> None:
        for key, (seconds, auprc) in shown.items():
            value = auprc["value"]
            low, high = (value if bound is None else bound for bound in auprc["ci95"])
            error = [[max(0.0, value - low)], [max(0.0, high - value)]]
            axes[0].errorbar(seconds, value, yerr=error, fmt="o", color=_colours(results)[key], capsize=3)
            axes[0].annotate(key, (seconds, value), xytext=(7, 5), textcoords="offset points")
        for key, value in free.items():
            axes[0].axhline(value, color=_colours(results)[key], linestyle="--", linewidth=1, label=key)
        axes[0].set(xlabel="seconds a slice, network alone", ylabel="AUPRC", xscale="log")
        axes[0].margins(x=0.3)
        axes[0].xaxis.set_major_formatter("{x:g}")
        axes[0].xaxis.set_minor_formatter("")
        axes[0].set_ylim(bottom=0)
        if free:
            axes[0].legend(fontsize=8)

    return _draw(5, 4.2, 1, fill) if shown else None


def _boxes(results: Results) -> Markup | None:
    shown = {key: result["slice_scores"] for key, result in results.items() if result.get("slice_scores")}
    rows = -(-len(shown) // COLUMNS)

    def fill(axes: Sequence[Axes]) -> None:
        for axis, (key, slices) in zip(axes, shown.items(), strict=False):
            scores, abnormal = np.asarray(slices["score"], dtype=float), np.asarray(slices["abnormal"], dtype=bool)
            boxes = axis.boxplot(
                [scores[~abnormal], scores[abnormal]],
                tick_labels=["healthy", "lesion"],
                whis=(5, 95),
                showfliers=False,
                widths=0.6,
                patch_artist=True,
            )
            for part in ("boxes", "whiskers", "caps", "medians"):
                for artist in boxes[part]:
                    artist.set_color(TEXT)
            for box, colour in zip(boxes["boxes"], ("none", _colours(results)[key]), strict=True):
                box.set_facecolor(colour)
            axis.set_title(key, fontsize=10)
            axis.grid(visible=False, axis="x")
        for axis in axes[len(shown) :]:
            axis.set_visible(False)

    return _draw(2.6 * COLUMNS, 2.9 * rows, COLUMNS, fill, rows) if shown else None


PLOTS: dict[str, tuple[str, Callable[[Results], Markup | None]]] = {
    "Precision and recall": ("All foreground voxels of the subjects with a lesion.", _precision_recall),
    "Dice over the threshold": (
        "The threshold as a multiple of the shipped one; of a baseline (dashed), which has none, of its best one.",
        _dice,
    ),
    "Time against AUPRC": ("With 95 % intervals. Up and to the left is better; baselines take no time.", _time),
    "Scores of slices": ("Without and with a lesion: median, quartiles, 5 to 95 %.", _boxes),
}
