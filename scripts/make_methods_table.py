"""Write the tables of the README and of the model cards from the benchmarks under docs/benchmarks.

    python scripts/make_methods_table.py [--check]

`sites` holds what `scripts/measure_sites.py` wrote of the bundles for brain T1, the folders of `COHORTS` what
`uad benchmark` wrote, and `normalisation/heads` what `scripts/measure_heads.py` wrote: it says how much is marked of
healthy slices where every test subject has a lesion. A method that was not measured has a dash; one that was measured
with other weights than are shipped now is refused. With --check nothing is written, and the exit code is 1 where the
README or a card says something else.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from common.bundle import BUNDLES_DIR, available_bundles, describe_bundle
from common.errors import BundleError, one_line
from common.files import replacing
from common.report.benchmark_table import cell
from common.weights import sha256

ROOT = Path(__file__).resolve().parents[1]
METHODS = "<!-- methods: scripts/make_methods_table.py -->", "<!-- methods end -->"
PERFORMANCE = "<!-- performance: scripts/make_methods_table.py -->", "<!-- performance end -->"  # of cards that have it
SITES = {"novosibirsk": "another scanner", "ixi": "home"}  # of brain T1, in the order of the tables
UNKNOWN: dict[str, Any] = {"value": None, "ci95": [None, None]}
FREE = """Minus the better free baseline: on the same volumes. It needs no network: darkness, or what is darker than the
mirrored place, each minus its healthy atlas."""
BASELINES = ("darkness_minus_atlas", "mirrored_minus_atlas")
OF_A_SITE = {  # of the cards
    "healthy_share": "healthy brain above the threshold",
    "healthy_worst_share": "the worst brain",
    "recall_strokes": "stroke voxels found",
    "auprc_strokes": "AUPRC, strokes",
    "minus_baseline": "minus that of the better free baseline",
    "auprc_chronic_stroke": "chronic",
    "auprc_acute_stroke": "acute",
    "auprc_atlas": "MS shapes",
}
COHORTS = {  # folder under docs/benchmarks: column
    "glioma": "glioma",
    "glioma-flair": "glioma, FLAIR alone",
    "headct-sprites": "head CT, sprites",
}
METRICS = {  # of the cards
    "auprc": "AUPRC",
    "max_dice_pooled": "best Dice (oracle)",
    "dice_at_threshold": "Dice at the healthy threshold",
    "image_auroc": "slice AUROC",
    "voxel_recall_at_threshold": "lesion voxels above threshold",
    "healthy_fp_share": "healthy voxels above threshold",
}
OF_README = ("auprc", "voxel_recall_at_threshold", "healthy_fp_share")  # those of the README


def main(check: Annotated[bool, typer.Option("--check", help="Only compare.")] = False) -> None:
    """Put the tables between their markers."""
    readme, new = ROOT / "README.md", {}
    benchmarks = read_benchmarks(ROOT / "docs" / "benchmarks")
    sites = read_sites(ROOT / "docs" / "benchmarks" / "sites")
    new[readme] = with_table(readme, METHODS, f"{sites_table(sites)}\n\n{table(benchmarks)}")
    for key in available_bundles():
        card = BUNDLES_DIR / key / "docs" / "README.md"
        if PERFORMANCE[0] in card.read_text(encoding="utf-8"):
            of_key = card_of_sites(sites[key]) if key in sites else card_table(key, benchmarks)
            new[card] = with_table(card, PERFORMANCE, of_key)
    if check:
        sys.exit(int(any(path.read_text(encoding="utf-8") != text for path, text in new.items())))
    for path, text in new.items():
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


def read_sites(folder: Path) -> dict[str, dict[str, Any]]:
    """By bundle or baseline, the figures of each site as it is shipped, and of how many subjects.

    `minus_baseline`: the AUPRC of strokes minus that of the baseline that is better there, on the same volumes.
    """
    found = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["standardised"]:
            found[result["key"]] = result["variants"][result["shipped"]]
            for site, subjects in result["tested"].items():
                found[result["key"]][site]["subjects"] = len(subjects)
            if result["key"] in available_bundles():
                check_weights(result["key"], result["weights_sha256"], path)
    for site in SITES:
        better = max(BASELINES, key=lambda key: found[key][site]["auprc_strokes"]["value"])
        for row in (sites[site] for sites in found.values()):
            row["minus_baseline"] = row.get(f"auprc_strokes_minus_{better}", UNKNOWN)
    return found


def sites_table(sites: dict[str, dict[str, Any]]) -> str:
    """A row a bundle for brain T1, and the free baselines below; another scanner first."""
    names = ("healthy brain above the threshold (worst)", "stroke voxels found", "AUPRC, strokes")
    names = (*names, "minus that of the better baseline")
    header = ["key", "method", "weights", f"subjects ({', '.join(SITES.values())})"]
    header += [f"{site}: {name}" for site in SITES.values() for name in names]
    rows = []
    for key in available_bundles():
        about = describe_bundle(key)
        if about["modalities"] == ["T1"]:
            weights = f"{about['weights_mb']} MB, {about['weights_license']}"
            rows.append([f"`{key}`", about["title"], weights, *site_cells(sites.get(key, {}))])
    for key in BASELINES:
        rows.append([key.replace("_", " "), "free baseline", "none", *site_cells(sites.get(key, {}))])
    return lines_of(header, rows)


def site_cells(of_site: dict[str, Any]) -> list[str]:
    """The number of subjects, and the four cells of each site; dashes where nothing was measured."""
    cells = [", ".join(str(of_site[site]["subjects"]) for site in SITES if site in of_site) or "-"]
    for site in SITES:
        row = of_site.get(site)
        if row is None:
            cells += ["-"] * 4
            continue
        mean, worst = row["healthy_share"]["value"], row["healthy_worst_share"]["value"]
        cells += [f"{mean:.1%} ({worst:.1%})", f"{row['recall_strokes']['value']:.2f}", cell(row["auprc_strokes"])]
        cells.append(cell(row["minus_baseline"]))
    return cells


def card_of_sites(of_site: dict[str, Any]) -> str:
    """A row a site, and what the comparison with the free baselines says."""
    header = ["", *OF_A_SITE.values()]
    rows = [
        [name, *(cell(of_site[site][metric]) if metric in of_site[site] else "-" for metric in OF_A_SITE)]
        for site, name in SITES.items()
        if site in of_site
    ]
    differences = {name: of_site[site]["minus_baseline"] for site, name in SITES.items() if site in of_site}
    found = [f"{verdict(metric)} ({name})" for name, metric in differences.items() if metric["value"] is not None]
    said = ["", FREE, f"Of the strokes this bundle finds {', '.join(found)}."] if found else []
    return "\n".join([lines_of(header, rows), *said])


def verdict(difference: dict[str, Any]) -> str:
    """In words whether the 95 % interval of a bundle's AUPRC minus that of the better free baseline holds 0."""
    low, high = difference["ci95"]
    if low > 0:
        return "more than the better one"
    return "less than the better one" if high < 0 else "neither surely more nor surely less than the better one"


def lines_of(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows))


def read_benchmarks(folder: Path) -> dict[str, dict[str, Any]]:
    """Of each cohort that was measured, the results by key; only those of bundles as they are shipped."""
    found = {}
    for cohort in COHORTS:
        path = folder / cohort / "benchmark.json"
        if path.is_file():
            methods = json.loads(path.read_text(encoding="utf-8"))["methods"]
            found[cohort] = {m["key"]: m for m in methods if m["kind"] == "baseline" or not m["items"]}
            for method in found[cohort].values():
                if method["kind"] == "method":
                    check_weights(method["bundle"], method["weights_sha256"], path)
                    if method["healthy_fp_share"]["value"] is None:
                        method["healthy_fp_share"] = healthy_slices(folder, method["bundle"])
    return found


def healthy_slices(folder: Path, key: str) -> dict[str, Any]:
    """The share of the healthy slices of test subjects with lesion that a bundle marks, as it is shipped."""
    path = folder / "normalisation" / "heads" / f"{key}.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    check_weights(key, result["weights_sha256"], path)
    return result["variants"][result["shipped"]]["test"]["healthy_fp_share"]


def check_weights(key: str, weights_sha256: str, path: Path) -> None:
    """Raises BundleError for a result of weights that were replaced since."""
    if weights_sha256 != sha256(BUNDLES_DIR / key / "models" / "model.pt"):
        raise BundleError(path, f"{key} was measured with other weights", "run the benchmark again")


def table(benchmarks: dict[str, dict[str, Any]]) -> str:
    """A row a bundle and cohort, of those that are not for brain T1."""
    metrics = [METRICS[name] for name in OF_README]
    header = ["key", "method", "weights", "s a volume", "measured on", *metrics, "best free baseline, AUPRC"]
    rows = []
    for key in available_bundles():
        about = describe_bundle(key)
        if about["modalities"] == ["T1"]:
            continue
        first = [f"`{key}`", about["title"], f"{about['weights_mb']} MB, {about['weights_license']}"]
        measured = {COHORTS[cohort]: results for cohort, results in benchmarks.items() if key in results}
        for name, results in measured.items():
            seconds = f"{results[key]['run_time']['seconds_per_volume']:.2g}"
            figures = [cell(results[key][metric]) for metric in OF_README]
            rows.append([*first, seconds, name, *figures, best_baseline(results)])
        if not measured:
            rows.append([*first, *["-"] * (len(header) - len(first))])
    return lines_of(header, rows)


def card_table(key: str, benchmarks: dict[str, dict[str, Any]]) -> str:
    """A row a cohort that the bundle was measured on, and what a volume of the first costs."""
    results = {cohort: benchmarks[cohort][key] for cohort in COHORTS if key in benchmarks.get(cohort, {})}
    header = ["", *METRICS.values(), "best free baseline, AUPRC"]
    rows = [
        [COHORTS[cohort], *(cell(result[name]) for name in METRICS), best_baseline(benchmarks[cohort])]
        for cohort, result in results.items()
    ]
    run = next(iter(results.values()))["run_time"]
    cost = f"{run['seconds_per_volume']:.2g} s on one busy CPU core, {run['peak_memory_mb'] / 1e3:.1f} GB"
    return "\n".join([lines_of(header, rows), "", f"A volume of {run['slices_per_volume']:.0f} slices: {cost}."])


def best_baseline(results: dict[str, Any]) -> str:
    """Its AUPRC, and which it is."""
    baselines = [result for result in results.values() if result["kind"] == "baseline"]
    best = max(baselines, key=lambda result: result["auprc"]["value"] or 0)
    return f"{cell(best['auprc'])} {best['key'].rpartition('_')[0].replace('_', ' ')}"


def with_table(path: Path, markers: tuple[str, str], content: str) -> str:
    """The text of a file with what is between its markers replaced."""
    before, begin, rest = path.read_text(encoding="utf-8").partition(markers[0])
    _, end, after = rest.partition(markers[1])
    if not (begin and end):
        raise ValueError(f"{path} lacks {markers[0]} or {markers[1]}")
    return f"{before}{begin}\n{content}\n{end}{after}"


if __name__ == "__main__":
    typer.run(one_line(main))
