"""What a method does with a slice, step by step, as pictures: for talks, papers and doubts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from ..detection.method import AnomalyDetector, Detection, seeded_generators
from ..methods.ar_transformer import ARTransformer, unflatten
from ..methods.auto_ddpm import AutoDDPM
from ..methods.berdiff import BerDiff
from ..methods.cddpm import CDDPM
from ..methods.cycle_unet import CycleUNet, to_image
from ..methods.ddpm import DDPM, sampling_steps
from ..methods.disyre import DISYRE
from ..methods.iter_mask2 import IterMask2
from ..methods.latent_ddpm import LatentDDPM
from ..methods.mad_ad import MADAD
from ..methods.pddpm import PDDPM
from ..methods.thor import THOR

LEVELS = (50, 100, 150, 200, 250, 300)  # of AutoDDPM's table
MOST = 6  # panels of a row
Kind = Literal["image", "map", "mask", "signed"]
COLOURS = {"image": "gray", "map": "hot", "mask": "gray", "signed": "berlin"}
WIDTH_IN, BAR_IN, NAME_IN, TITLE_IN, DPI = 1.6, 0.5, 0.25, 0.35, 80  # of a panel, its colour bar, its name; the title
MARGIN = 0.02  # around the foreground, of the picture's size
TEXT, SIDE = "white", "#8ecbff"


@dataclass(frozen=True)
class Panel:
    """A picture (H, W) with its name. Images and masks are in [0, 1]; maps from 0 and signed ones have any scale."""

    name: str
    picture: Tensor
    kind: Kind = "image"


Rows = list[list[Panel]]


def stages(detector: AnomalyDetector, image: Tensor, seeds: Tensor) -> Rows:
    """The rows of panels of one slice, (1, C, H, W) in [0, 1] with its seed (1,); the first is input to map.

    Of several modalities the rows below show the first. Methods that have nothing between input and map have one row.
    """
    with torch.no_grad():
        for kind, show in SHOWN.items():
            if isinstance(detector, kind):
                return show(detector, image, seeds)
        return [result(image, detector.detect(image, seeds=seeds))]


def result(image: Tensor, found: Detection, *between: Panel) -> list[Panel]:
    """Input, what lies between, reconstruction, what differs (of one modality, where there is room) and map."""
    ends = [Panel("anomaly map", found.anomaly_map[0, 0], "map")]
    if image.shape[1] == 1 and len(between) + 4 <= MOST:
        ends.insert(0, Panel("input - reconstruction", (image - found.reconstruction)[0, 0], "signed"))
    return [*modalities("input", image), *between, *modalities("reconstruction", found.reconstruction), *ends]


def modalities(name: str, image: Tensor) -> list[Panel]:
    """A panel each, numbered if there are several."""
    channels = image[0].clamp(0, 1)
    return [Panel(name if len(channels) == 1 else f"{name} {n}", channel) for n, channel in enumerate(channels, 1)]


@contextmanager
def calls_of(owner: Any, name: str) -> Iterator[list[tuple[tuple[Any, ...], Any]]]:
    """The arguments and results of all calls of a method within the block."""
    method, calls = getattr(owner, name), []

    def noted(*args: Any, **kwargs: Any) -> Any:
        value = method(*args, **kwargs)
        calls.append((args, value))
        return value

    setattr(owner, name, noted)
    try:
        yield calls
    finally:
        delattr(owner, name)


def some(items: Sequence[Any], most: int = MOST) -> list[Any]:
    """At most so many items at even distances, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def of_ddpm(detector: DDPM, image: Tensor, seeds: Tensor) -> Rows:
    """The noised slice and the steps of the reverse process; below them reconstruction and map by noise level."""
    with calls_of(detector, "step") as calls:
        found = detector.detect(image, seeds=seeds)
    noised = Panel(f"noised to t = {detector.start}", shown(detector.to_image(calls[0][0][0])))
    walk = [Panel(f"after t = {args[1]}", shown(detector.to_image(x))) for args, x in some(calls, MOST - 1)]
    levels = [level for level in LEVELS if level < detector.scheduler.num_train_timesteps]
    by_level = [at_level(detector, level, image, seeds) for level in levels]
    pairs = list(zip(levels, by_level, strict=True))
    return [
        result(image, found),
        [noised, *walk],
        [Panel(f"L = {level}", one.reconstruction[0, 0]) for level, one in pairs],
        [Panel(f"L = {level}", one.anomaly_map[0, 0], "map") for level, one in pairs],
    ]


def at_level(detector: DDPM, level: int, image: Tensor, seeds: Tensor) -> Detection:
    """The result at another noise level than the detector's."""
    before = detector.start, detector.steps
    detector.start = level if detector.first_index == "L" else level - 1
    detector.steps = sampling_steps(detector.start, -1, detector.num_inference_steps)
    try:
        return detector.detect(image, seeds=seeds)
    finally:
        detector.start, detector.steps = before


def of_auto_ddpm(detector: AutoDDPM, image: Tensor, seeds: Tensor) -> Rows:
    """Before and after the resampling: coarse version, the map that is masked, mask, and the resampling's steps."""
    with calls_of(detector, "stitch") as calls, calls_of(detector, "stitch_step") as steps:
        found = detector.detect(image, seeds=seeds)
    made = calls[0][1]
    between = [
        Panel("coarse", made.coarse[0, 0]),
        Panel("masked map", made.combined[0, 0], "map"),
        Panel("mask", made.mask[0, 0], "mask"),
    ]
    walk = [Panel(f"resampled at t = {args[3]}", shown(detector.to_image(x))) for args, x in some(steps)]
    return [result(image, found, *between), walk]


def of_thor(detector: THOR, image: Tensor, seeds: Tensor) -> Rows:
    """By step the predicted clean image, and where it disagrees with the slice."""
    with calls_of(detector, "clean") as clean, calls_of(detector, "scaled") as scaled:
        found = detector.detect(image, seeds=seeds)
    return [
        result(image, found),
        [Panel(f"x0 at t = {args[1]}", shown(detector.to_image(x))) for args, x in some(clean)],
        [Panel(f"disagreement, t = {args[1]}", a[0, 0], "map") for args, a in some(scaled)],
    ]


def of_mad_ad(detector: MADAD, image: Tensor, seeds: Tensor) -> Rows:
    """By step what is changed, and the latent after it (its first channel)."""
    with calls_of(detector.scheduler, "step") as calls:
        found = detector.detect(image, seeds=seeds)
    chosen = some(calls)
    masks = [Panel(f"mask, t = {args[3]}", args[2][0, 0], "mask") for args, _ in chosen]
    return [
        result(image, found),
        masks,
        [Panel(f"z after t = {args[3]}", z[0, 0], "signed") for args, z in chosen],
    ]


def of_latent_ddpm(detector: LatentDDPM, image: Tensor, seeds: Tensor) -> Rows:
    """In the latent space the KL map, it over its threshold, and the mask; then the latent as it is healed."""
    with calls_of(detector.scheduler, "step") as calls:
        found = detector.detect(image, seeds=seeds)
    z0, _ = detector.latent_space.posterior(image)
    kl = detector.kl_map(z0, seeded_generators(seeds), detector.kl_timesteps)
    latent = [
        Panel("KL map", kl[0], "map"),
        Panel("over its threshold", detector.over_threshold(kl)[0, 0], "map"),
        Panel("mask", detector.unlikely(kl)[0, 0], "mask"),
        Panel("z", z0[0, 0], "signed"),
    ]
    walk = [Panel(f"z after t = {args[2]}", z[0, 0], "signed") for args, z in some(calls)]
    return [result(image, found), latent, walk]


def of_berdiff(detector: BerDiff, image: Tensor, seeds: Tensor) -> Rows:
    """By pass the share of a cell's bits that are masked, and what is decoded."""
    with calls_of(detector, "sample") as calls:
        found = detector.detect(image, seeds=seeds)
    chosen = [made for _, made in some(calls)]
    decoded = [detector.latent_space.decode(code).clamp(0, 1)[0, 0] for code, _ in chosen]
    return [
        result(image, found),
        [Panel(f"masked bits, pass {n}", m[0].float().mean(0), "mask") for n, (_, m) in enumerate(chosen, 1)],
        [Panel(f"pass {n}", picture) for n, picture in enumerate(decoded, 1)],
    ]


def of_pddpm(detector: PDDPM, image: Tensor, seeds: Tensor) -> Rows:
    """By patch the slice with the patch noised, and what is predicted from it."""
    with calls_of(detector.unet, "forward") as calls:
        found = detector.detect(image, seeds=seeds)
    ((x_t, _), x0), *_ = calls
    chosen = some(range(len(x_t)))
    return [
        result(image, found),
        [Panel(f"patch {i + 1} noised", shown((x_t[i : i + 1] + 1) / 2)) for i in chosen],
        [Panel(f"x0 from patch {i + 1}", shown((x0[i : i + 1] + 1) / 2)) for i in chosen],
    ]


def of_cddpm(detector: CDDPM, image: Tensor, seeds: Tensor) -> Rows:
    """By index the noised slice, and what is predicted from it and the code."""
    with calls_of(detector.unet, "forward") as calls:
        found = detector.detect(image, seeds=seeds)
    chosen = [(int(t[0]), x_t, x0) for (x_t, t, _), x0 in some(calls)]
    return [
        result(image, found),
        [Panel(f"noised to t = {t}", shown((x_t + 1) / 2)) for t, x_t, _ in chosen],
        [Panel(f"x0 from t = {t}", shown((x0 + 1) / 2)) for t, _, x0 in chosen],
    ]


def of_disyre(detector: DISYRE, image: Tensor, seeds: Tensor) -> Rows:
    """By severity the restored slice, and how much was changed."""
    with calls_of(detector, "restored") as calls:
        found = detector.detect(image, seeds=seeds)
    chosen = [(f"severity {detector.severity[args[1][0]]:.2f}", args[0], restored) for args, restored in some(calls)]
    inside = (image > 0).any(1)[0]
    return [
        result(image, found),
        [Panel(f"restored, {name}", shown(restored) * inside) for name, _, restored in chosen],
        [Panel(f"change, {name}", (x - restored)[0, 0].abs() * inside, "map") for name, x, restored in chosen],
    ]


def of_iter_mask2(detector: IterMask2, image: Tensor, seeds: Tensor) -> Rows:
    """The high frequencies, what the first network makes of them; by round the mask, and the slice with it rebuilt."""
    with calls_of(detector.first, "forward") as first, calls_of(detector, "rebuild") as calls:
        found = detector.detect(image, seeds=seeds)
    ((condition,), prediction), *_ = first
    rounds = some(list(enumerate(calls, 1)))
    inside = (image > 0).any(1)[0]
    between = [
        Panel("high frequencies", condition[0, 0] * inside, "signed"),
        Panel("first network", shown((prediction + 3) / 6) * inside),
    ]
    return [
        result(image, found, *between),
        [Panel(f"mask, round {n}", args[1][0, 0].float(), "mask") for n, (args, _) in rounds],
        [Panel(f"rebuilt, round {n}", shown((v + 3) / 6) * inside) for n, (_, v) in rounds],
    ]


def of_cycle_unet(detector: CycleUNet, image: Tensor, seeds: Tensor) -> Rows:
    """The image of the other modality that lies between."""
    with calls_of(detector.there, "forward") as calls:
        found = detector.detect(image, seeds=seeds)
    inside = (image > 0).any(1)[0]
    there = Panel("other modality", shown(to_image(calls[0][1])) * inside)
    return [result(image, found, there)]


def of_ar_transformer(detector: ARTransformer, image: Tensor, seeds: Tensor) -> Rows:
    """By ordering how unlikely each code is, which are replaced, and what is decoded then."""
    noted = calls_of(detector, "sequence"), calls_of(detector, "log_likelihood"), calls_of(detector, "decode")
    with noted[0] as sequences, noted[1] as calls, noted[2] as decoded:
        found = detector.detect(image, seeds=seeds)
    shape = sequences[0][0][0].shape
    codes = [unflatten(call[1], sequence[1][1], shape) for call, sequence in zip(calls, sequences, strict=True)]
    healed = some(range(len(decoded)))  # with a map of the surprisal the first alone
    return [
        result(image, found),
        [Panel(f"-log p, order {i + 1}", -codes[i][0], "map") for i in some(range(len(calls)))],
        [Panel(f"replaced, order {i + 1}", detector.unlikely(codes[i])[0].float(), "mask") for i in healed],
        [Panel(f"healed, order {i + 1}", shown(decoded[i][1])) for i in healed],
    ]


def shown(image: Tensor) -> Tensor:
    """The first slice and modality of (B, C, H, W), (H, W) within [0, 1]."""
    return image[0, 0].clamp(0, 1)


SHOWN: dict[type[AnomalyDetector], Any] = {
    AutoDDPM: of_auto_ddpm,
    THOR: of_thor,
    DDPM: of_ddpm,  # after those that are one
    MADAD: of_mad_ad,
    LatentDDPM: of_latent_ddpm,
    BerDiff: of_berdiff,
    PDDPM: of_pddpm,
    CDDPM: of_cddpm,
    DISYRE: of_disyre,
    IterMask2: of_iter_mask2,
    CycleUNet: of_cycle_unet,
    ARTransformer: of_ar_transformer,
}


def save_stages(rows: Rows, path: Path, title: str) -> None:
    """Write the panels as a PNG, seen from below: the patient's left is on the right.

    The first panel is the input; all are cut to its foreground. Beside each panel whose scale is its own there is its
    colour bar; maps of a row of nothing but maps have one scale, and so do signed pictures.
    """
    first = rows[0][0].picture
    box = foreground_box(first)
    width, height = first.shape[0] * (box[1] - box[0]), first.shape[1] * (box[3] - box[2])
    cell = WIDTH_IN + BAR_IN, WIDTH_IN * height / width + NAME_IN
    size = max(map(len, rows)) * cell[0] + 0.1, len(rows) * cell[1] + TITLE_IN
    figure = Figure(figsize=size, dpi=DPI, facecolor="black")
    figure.text(0.1 / size[0], 1 - TITLE_IN / 2 / size[1], title, color=TEXT, fontsize=11, va="center")
    for row, panels in enumerate(rows):
        is_series = len(panels) > 1 and len({panel.kind for panel in panels}) == 1
        tops = [float(panel.picture.abs().max()) for panel in panels]
        for column, (panel, own) in enumerate(zip(panels, tops, strict=True)):
            left, bottom = 0.1 + column * cell[0], size[1] - TITLE_IN - (row + 1) * cell[1]
            place = left / size[0], bottom / size[1], WIDTH_IN / size[0], (cell[1] - NAME_IN) / size[1]
            axes = figure.add_axes(place)
            show(axes, panel, box, max(tops) if is_series else own)
            if panel.kind in ("map", "signed") and (panel is panels[-1] or not is_series):
                colour_bar(axes)
            if panel is rows[0][0]:
                mark_sides(axes)
    FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})


def foreground_box(picture: Tensor) -> tuple[float, float, float, float]:
    """Left, right, bottom, top of the foreground of a picture (H, W) as it is shown, with a margin, in shares of it."""
    ends = []
    for axis, size in enumerate(picture.shape):
        used = (picture > 0).any(1 - axis).nonzero().flatten().tolist() or [0, size - 1]
        ends.append((max(0.0, used[0] / size - MARGIN), min(1.0, (used[-1] + 1) / size + MARGIN)))
    (x_first, x_last), (bottom, top) = ends
    return 1 - x_last, 1 - x_first, bottom, top  # the first axis runs to the left


def show(axes: Axes, panel: Panel, box: tuple[float, float, float, float], top: float) -> None:
    """A panel, cut to the box, in colours up to `top` where its kind has a scale; an empty mask is not black."""
    low, high = {"map": (0.0, top), "signed": (-top, top), "mask": (-0.2, 1.0)}.get(panel.kind, (0.0, 1.0))
    picture = panel.picture.float().cpu().numpy().T[::-1, ::-1]
    colours: dict[str, Any] = {"cmap": COLOURS[panel.kind], "vmin": low, "vmax": high}
    axes.imshow(picture, extent=(0, 1, 0, 1), aspect="auto", interpolation="nearest", **colours)
    axes.set_xlim(box[0], box[1])
    axes.set_ylim(box[2], box[3])
    axes.set_axis_off()
    axes.set_title(panel.name, color=TEXT, fontsize=9, pad=3)


def colour_bar(axes: Axes) -> None:
    """Of the picture in axes, to the right of it."""
    (image,) = axes.images
    bar = axes.figure.colorbar(image, cax=axes.inset_axes((1.02, 0.1, 0.05, 0.8)), ticks=image.get_clim())
    labels = [f"{end:.2g}" if abs(end) < 100 else f"{end:.0f}" for end in image.get_clim()]
    bar.ax.set_yticklabels(labels, color=TEXT, fontsize=7.5)
    bar.ax.tick_params(length=0, pad=2)
    bar.outline.set_visible(False)


def mark_sides(axes: Axes) -> None:
    """The patient's right and left."""
    for x, side in ((0.0, "R"), (0.94, "L")):
        axes.text(x, 0.98, side, transform=axes.transAxes, color=SIDE, fontsize=9, va="top")
