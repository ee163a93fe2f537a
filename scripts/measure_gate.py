"""Say which images of a cohort a bundle holds to be unreliable, and by which sign.

    python scripts/measure_gate.py COHORT.csv -m KEY -o OUT.json [--kept DIR]

COHORT has the columns site, split and T1; its rows of the splits `val` and `test` without a lesion are measured. Those
of `val` are the healthy subjects of the calibration. Printed: by site how many of the others are unreliable with the
shipped calibration, and with one of the other sites alone.
"""

from __future__ import annotations

from typing import Any

import torch
import typer
from prepared import Cohort, Kept, Method, Output, PreparedBrains
from torch import Tensor

from common.detection.normalisation import robust_z
from common.detection.reliability import SCALE_FACTOR, doubts
from common.errors import one_line
from common.results.case import versions
from common.workflows.evaluation import write_result

SIGNS = ("contrast_order", "vessel_share")


def main(cohort: Cohort, method: Method, output: Output, kept: Kept = None) -> None:
    """Print a line a site, and write the signs of each subject as JSON."""

    prepared = PreparedBrains(method, kept)
    items = [item for item in prepared.cohort(cohort) if "lesion" not in item]
    subjects = [measured(prepared, item) for item in items]
    scales = prepared.network.normalisation.scale_quantiles
    sites = {}
    for site in dict.fromkeys(subject["site"] for subject in subjects):
        tested = [subject for subject in subjects if subject["site"] == site and subject["split"] == "test"]
        others = [s["signs"]["map_scale"] for s in subjects if s["split"] == "val" and s["site"] != site]
        sites[site] = row(tested, scales) | {"left_out": row(tested, torch.tensor(others))}
        print(site, sites[site])
    about = {"key": method, "weights_sha256": prepared.weights_sha256, "versions": versions()}
    write_result(about | {"sites": sites, "subjects": subjects}, output)


def measured(prepared: PreparedBrains, item: dict[str, Any]) -> dict[str, Any]:
    """What is known of an image: its signs, None where one could not be measured, and the modes of its tissues."""
    brain = prepared(item)
    data = prepared.standardise({"image": brain.image})
    anomaly_map, _ = prepared.raw_map("standardised", brain.subject, data["image"].as_tensor())
    _, scale = robust_z(anomaly_map[0].numpy(), brain.inside[0].numpy())
    signs = {"map_scale": scale} | {name: finite(data[name]) for name in SIGNS}
    modes = [finite(mode) for mode in data["tissue_modes"]]
    return {"subject": brain.subject, "site": brain.site, "split": brain.split, "signs": signs, "tissue_modes": modes}


def row(tested: list[dict[str, Any]], scales: Tensor) -> dict[str, Any]:
    """How many are unreliable with a calibration of these scales, and by which reasons."""
    reasons = {subject["subject"]: doubts_of(subject, scales) for subject in tested}
    unreliable = {subject: said for subject, said in reasons.items() if said}
    limit = SCALE_FACTOR * float(scales.max()) if len(scales) else None
    return {"tested": len(tested), "unreliable": len(unreliable), "limit_of_scale": limit, "reasons": unreliable}


def doubts_of(subject: dict[str, Any], scales: Tensor) -> list[str]:
    """The reasons of the product; without scales, those of the image alone."""
    signs = {name: float("nan") if value is None else value for name, value in subject["signs"].items()}
    modes = [float("nan") if mode is None else mode for mode in subject["tissue_modes"]]
    return doubts(signs, scales.sort().values if len(scales) else None, modes)


def finite(value: Any) -> float | None:
    """A number that JSON can hold."""
    return float(value) if value == value else None


if __name__ == "__main__":
    typer.run(one_line(main))
