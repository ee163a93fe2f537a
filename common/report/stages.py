"""What a method does with a slice, step by step, as pictures: for talks, papers and doubts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from ..detection.method import AnomalyDetector, Detection, seeded_generators
from ..methods.auto_ddpm import AutoDDPM
from ..methods.berdiff import BerDiff
from ..methods.ddpm import DDPM, sampling_steps
from ..methods.latent_ddpm import LatentDDPM
from ..methods.mad_ad import MADAD
from ..methods.thor import THOR

LEVELS = (50, 100, 150, 200, 250, 300)  # of AutoDDPM's table
MOST = 6  # panels of a walk
Kind = Literal["image", "map", "mask", "latent"]
COLOURS = {"image": "gray", "map": "hot", "mask": "gray", "latent": "coolwarm"}


@dataclass(frozen=True)
class Panel:
    """A picture (H, W) with its name. Images and masks are in [0, 1]; maps from 0, latents about 0, of any scale."""

    name: str
    picture: Tensor
    kind: Kind = "image"


Rows = list[list[Panel]]


def stages(detector: AnomalyDetector, image: Tensor, seeds: Tensor) -> Rows:
    """The rows of panels of one slice, (1, C, H, W) in [0, 1] with its seed (1,); the first is input to map.

    Of several modalities the first is shown. Methods that have nothing between input and map have one row.
    """
    with torch.no_grad():
        for kind, show in SHOWN.items():
            if isinstance(detector, kind):
                return show(detector, image, seeds)
        return [result(image, detector.detect(image, seeds=seeds))]


def result(image: Tensor, found: Detection, *between: Panel) -> list[Panel]:
    """Input, what lies between, reconstruction and map."""
    ends = [Panel("reconstruction", found.reconstruction[0, 0]), Panel("anomaly map", found.anomaly_map[0, 0], "map")]
    return [Panel("input", image[0, 0]), *between, *ends]


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
    """The steps of the reverse process; below them reconstruction and map by noise level."""
    with calls_of(detector, "step") as calls:
        found = detector.detect(image, seeds=seeds)
    walk = [Panel(f"after t = {args[1]}", detector.to_image(x)[0, 0].clamp(0, 1)) for args, x in some(calls)]
    levels = [level for level in LEVELS if level < detector.scheduler.num_train_timesteps]
    by_level = [at_level(detector, level, image, seeds) for level in levels]
    pairs = list(zip(levels, by_level, strict=True))
    return [
        result(image, found, *walk),
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
    walk = [Panel(f"resampled at t = {args[3]}", detector.to_image(x)[0, 0].clamp(0, 1)) for args, x in some(steps)]
    return [result(image, found, *between), walk]


def of_thor(detector: THOR, image: Tensor, seeds: Tensor) -> Rows:
    """By step the predicted clean image, and where it disagrees with the slice."""
    with calls_of(detector, "clean") as clean, calls_of(detector, "scaled") as scaled:
        found = detector.detect(image, seeds=seeds)
    return [
        result(image, found),
        [Panel(f"x0 at t = {args[1]}", detector.to_image(x)[0, 0].clamp(0, 1)) for args, x in some(clean)],
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
        [Panel(f"z after t = {args[3]}", z[0, 0], "latent") for args, z in chosen],
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
        Panel("z", z0[0, 0], "latent"),
    ]
    walk = [Panel(f"z after t = {args[2]}", z[0, 0], "latent") for args, z in some(calls)]
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


SHOWN: dict[type[AnomalyDetector], Any] = {
    AutoDDPM: of_auto_ddpm,
    THOR: of_thor,
    DDPM: of_ddpm,  # after those that are one
    MADAD: of_mad_ad,
    LatentDDPM: of_latent_ddpm,
    BerDiff: of_berdiff,
}


def save_stages(rows: Rows, path: Path, title: str) -> None:
    """Write the panels as a PNG, seen from below: the patient's left is on the right.

    Maps of a row of nothing but maps have one scale; any other has its own.
    """
    width = max(map(len, rows))
    figure = Figure(figsize=(1.9 * width, 2.1 * len(rows) + 0.4), facecolor="black", layout="constrained")
    figure.suptitle(title, color="white", fontsize=11)
    axes = figure.subplots(len(rows), width, squeeze=False)
    for line, panels in zip(axes, rows, strict=True):
        is_series = all(panel.kind == "map" for panel in panels)
        tops = [float(panel.picture.max()) for panel in panels]
        for axis in line:
            axis.set_axis_off()
        for axis, panel, own in zip(line, panels, tops, strict=False):
            picture = panel.picture.float().cpu().numpy().T[::-1, ::-1]
            if panel.kind == "map":
                low, end = 0.0, max(tops) if is_series else own
            else:
                low, end = (-abs(picture).max(), abs(picture).max()) if panel.kind == "latent" else (0.0, 1.0)
            axis.imshow(picture, cmap=COLOURS[panel.kind], vmin=low, vmax=end, interpolation="nearest")
            axis.set_title(panel.name, color="white", fontsize=8)
    FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})
