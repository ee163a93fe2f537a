"""Compare ways to bring the intensities of another scanner to those of the training data, before a network.

    pip install intensity-normalization
    python scripts/measure_standardisation.py COHORT.csv -m KEY -o OUT.json [--ways nyul ...] [--kept DIR]

COHORT as for `measure_sites.py`. Besides no way and that of the bundle: Nyul, FCM and WhiteStripe of
`intensity-normalization`, and MONAI's `HistogramNormalize`. They are fitted on the healthy subjects of the split `val`
of the first site, that of the training data, and all but the last give units of their own, which one linear map, the
same for all images, brings to those of the training data. The last makes histograms flat; the mean histogram of these
subjects is what they are brought to. Threshold and atlas of each way are of the same subjects.

Printed: by site the mean distance of the modes of healthy brains from those of the training data, in how many brains
they were not found, the figures of strokes by the raw map and by the normalised one, and seconds a brain.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure_sites import SHARE
from monai.data import MetaTensor
from monai.transforms import HistogramNormalize
from monai.utils import optional_import
from prepared import Brain, PreparedBrains, evaluated, figures
from torch import Tensor

from common.report.benchmark_table import cell
from common.results.case import versions
from common.transforms.intensity import FOREGROUND_FLOOR
from common.transforms.tissue import tissue_modes
from common.workflows.calibrate import threshold_of
from common.workflows.evaluation import write_result

Way = Callable[[np.ndarray], np.ndarray]  # an image (H, W, D) to another, of whose background nothing is asked

AS_LEARNED, OWN = "as-learned", "standardised"
LIBRARY = {  # its LSQ, another single factor, fails with NumPy 2.4 (version 3.0.1)
    "nyul": "population.nyul.NyulNormalizer",
    "fcm": "individual.fcm.FCMNormalizer",
    "whitestripe": "individual.whitestripe.WhiteStripeNormalizer",
}
FLAT = "histogram"
BINS, GRID = 256, 1000
RAW, NORMALISED = "raw map", "1, 2, 3, 4"


def main() -> None:
    """Print a line a way and site, and write all figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cohort", type=Path)
    parser.add_argument("-m", "--method", required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--ways", nargs="+", choices=[*LIBRARY, FLAT], default=[*LIBRARY, FLAT], help="besides its own")
    parser.add_argument("--kept", type=Path, help="folder of prepared brains and raw maps")
    arguments = parser.parse_args()

    prepared = PreparedBrains(arguments.method, arguments.kept)
    brains = [prepared(item) for item in prepared.cohort(arguments.cohort)]
    healthy = [brain for brain in brains if brain.split == "val" and brain.site == brains[0].site]
    tested = [brain for brain in brains if brain.split == "test"]
    ways: dict[str, Way] = {AS_LEARNED: lambda image: image, OWN: own_way(prepared)}
    ways |= {name: flat_way(healthy) if name == FLAT else library_way(name, healthy) for name in arguments.ways}
    results = {name: measure(prepared, name, way, healthy, tested) for name, way in ways.items()}
    rows: dict[str, Any] = {}
    for name, (of_images, of_maps) in results.items():
        rows[name] = of_images
        for kind, sites in of_maps.items():
            for site, result in sites.items():
                rows[name][site][kind] = figures(result, results[OWN][1][kind][site])
        for site, row in rows[name].items():
            maps = {kind: {key: cell(value) for key, value in row[kind].items()} for kind in (RAW, NORMALISED)}
            print(name, site, row | maps)
    library_version = optional_import("importlib.metadata", name="version")[0]("intensity-normalization")
    about = {"key": arguments.method, "calibrated_on": len(healthy), "weights_sha256": prepared.weights_sha256}
    about |= {"seed": 0, "versions": versions() | {"intensity-normalization": library_version}}
    write_result(about | {"ways": rows}, arguments.output)


def own_way(prepared: PreparedBrains) -> Way:
    """That of the bundle."""

    def way(image: np.ndarray) -> np.ndarray:
        return prepared.standardise({"image": MetaTensor(torch.from_numpy(image)[None])})["image"].numpy()[0]

    return way


def library_way(name: str, healthy: list[Brain]) -> Way:
    """One of `intensity-normalization`, brought to the units of the training data. Its clustering draws: seeded."""
    module, _, kind = LIBRARY[name].rpartition(".")
    normaliser_of, _ = optional_import(f"intensity_normalization.normalizers.{module}", name=kind)
    adapter, _ = optional_import("intensity_normalization.adapters.images", name="NumpyImageAdapter")
    images = [adapter(brain.image.numpy()[0].astype(np.float64)) for brain in healthy]
    fitted = normaliser_of()
    if hasattr(fitted, "fit_population"):
        np.random.seed(0)
        fitted.fit_population(images)

    def in_own_units(image: np.ndarray) -> np.ndarray:
        np.random.seed(0)
        given = adapter(image.astype(np.float64))
        if hasattr(fitted, "fit_population"):
            return np.asarray(fitted.transform(given).get_data())
        return np.asarray(normaliser_of().fit_transform(given).get_data())

    inside = [image.get_data() > 0 for image in images]
    there = np.concatenate([image.get_data()[b] for image, b in zip(images, inside, strict=True)])
    here = np.concatenate([in_own_units(image.get_data())[b] for image, b in zip(images, inside, strict=True)])
    slope, offset = np.polyfit(here, there, 1)
    return lambda image: slope * in_own_units(image) + offset


def flat_way(healthy: list[Brain]) -> Way:
    """MONAI's equalisation of histograms, then the mean quantiles of the training data."""
    levels = np.linspace(0, 1, GRID)
    quantiles = np.mean([np.quantile(brain.image.numpy()[brain.inside.numpy()], levels) for brain in healthy], axis=0)

    def way(image: np.ndarray) -> np.ndarray:
        flat = HistogramNormalize(num_bins=BINS, min=0, max=1, mask=image > 0)(image)
        return np.interp(np.asarray(flat), levels, quantiles)

    return way


def measure(
    prepared: PreparedBrains, name: str, way: Way, healthy: list[Brain], tested: list[Brain]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of a way: by site the modes of healthy test brains and the seconds; by kind of map and site the results."""
    images = {brain.subject: changed(way, brain) for brain in (*healthy, *tested)}
    maps, given = {}, {}
    for brain in (*healthy, *tested):
        maps[brain.subject], change = prepared.raw_map(name, brain.subject, images[brain.subject][0])
        given[brain.subject] = maps[brain.subject], brain.inside, change
    shipped = prepared.network.normalisation
    normalised = type(shipped)(**shipped.settings)
    fitted = [normalised.healthy_map(*given[brain.subject]) for brain in healthy]
    thresholds = {NORMALISED: threshold_of(normalised.fit(fitted), SHARE)}
    thresholds[RAW] = threshold_of([maps[b.subject][b.inside].numpy() for b in healthy], SHARE)
    results = {
        RAW: evaluated(((b, maps[b.subject]) for b in tested), thresholds[RAW]),
        NORMALISED: evaluated(((b, normalised(*given[b.subject])[0]) for b in tested), thresholds[NORMALISED]),
    }
    of_images: dict[str, Any] = {}
    for site in sorted({brain.site for brain in tested}):
        here = [images[brain.subject] for brain in tested if brain.site == site and not brain.lesion.any()]
        modes = np.array([tissue_modes(image[image > 0].numpy()) for image, _ in here])
        distance = np.abs(modes - prepared.standardise.modes)
        of_images[site] = {
            "healthy": len(here),
            "modes_not_found": int(np.isnan(distance).any(axis=1).sum()),
            "modes": np.nanmean(modes, axis=0).tolist(),
            "mode_distance": float(np.nanmean(distance)),
            "seconds": float(np.mean([seconds for _, seconds in here])),
        }
    return of_images, results


def changed(way: Way, brain: Brain) -> tuple[Tensor, float]:
    """The image (1, H, W, D) in (0, 1], background 0, and the seconds."""
    started = time.perf_counter()
    image = torch.from_numpy(way(brain.image.numpy()[0]).astype(np.float32)).clamp(FOREGROUND_FLOOR, 1)[None]
    return image * brain.inside, time.perf_counter() - started


if __name__ == "__main__":
    main()
