"""A benchmark as Markdown tables to read and as one long CSV to compute with."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

VOXELS = {
    "auprc": "AUPRC",
    "auroc": "AUROC",
    "dice_at_threshold": "Dice at the healthy threshold",
    "voxel_recall_at_threshold": "lesion voxels found at it",
    "max_dice_pooled": "best Dice (oracle)",
    "max_dice_mean": "best mean Dice of slices (oracle)",
}
SUBJECTS = {
    "image_auroc": "slice AUROC",
    "image_auprc": "slice AUPRC",
    "image_auroc_method": "slice AUROC, method's score",
    "image_auprc_method": "slice AUPRC, method's score",
    "volume_auroc": "volume AUROC",
    "volume_auroc_cluster": "volume AUROC, largest component",
    "volume_auroc_method": "volume AUROC, method's score",
    "healthy_fp_share": "healthy voxels above threshold",
    "healthy_worst_share": "worst healthy subject",
    "healthy_false_lesions": "components in a healthy subject",
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
}
SITES = {
    "healthy_share": "healthy voxels above threshold",
    "healthy_worst_share": "worst healthy subject",
    "voxel_recall_at_threshold": "lesion voxels found",
}
LESIONS = {
    "lesion_recall": "recall",
    "lesion_precision": "precision",
    "lesion_f1": "F1",
    "lesion_recall_iou": "recall, IoU > 0.1",
    "lesion_precision_iou": "precision, IoU > 0.1",
    "lesion_f1_iou": "F1, IoU > 0.1",
}
PROTOCOLS = {  # (protocol, number or group and number) -> column
    ("masked_bernoulli", "dice"): "Masked Bernoulli: Dice",
    ("masked_bernoulli", "auprc"): "AUPRC",
    ("masked_bernoulli", "psnr"): "PSNR (dB)",
    ("mad_ad_s1", "max_dice"): "MAD-AD S1: best Dice",
    ("mad_ad_s2", "max_dice"): "MAD-AD S2: best mean Dice",
    ("auto_ddpm", "auprc"): "AutoDDPM: AUPRC",
    ("auto_ddpm", "max_dice"): "best Dice of 101",
    ("auto_ddpm", "max_dice_exact"): "best Dice",
    ("auto_ddpm", "healthy_ssim"): "SSIM of healthy slices",
}
TIMES = {
    "seconds_per_volume": "s a volume, reading included",
    "network_seconds_per_slice": "s a slice, network alone",
    "slices_per_volume": "slices a volume",
    "peak_memory_mb": "peak memory (MB)",
    "device": "device",
    "threads": "threads",
}
FEW = "†"
FEW_EXPLAINED = f"{FEW} marks an interval over fewer than 5 subjects, who say little about others."
EXPLAINED = {
    "Voxels": "Pooled over the foreground of the subjects with a lesion. Oracle: the labels choose the threshold. "
    f"Here and below {FEW_EXPLAINED}",
    "Slices and healthy subjects": "A slice is abnormal where it holds lesion; slices are ranked by the mean of the "
    "highest 1 % of the map, and by the method's own score where it has one. Whole volumes with a lesion against those "
    "without: likewise, the method's own score being the mean over the slices, and by the largest component of the "
    "segmentation. PSNR and SSIM outside lesions.",
    "Sites": "Share of a healthy brain above the healthy threshold, mean over the subjects and in the worst one; share "
    "of the lesion voxels above it.",
    "Lesions": "26-connected components of the segmentation at the healthy threshold against those of the annotation: "
    "found or true by any overlap, and paired one to one by IoU.",
    "Lesions by size": "Share of the lesions that the segmentation touches, and of their voxels that it holds.",
    "Difference to the best": "The method minus the best, in the same resamples of the subjects.",
    "Protocols of the papers": "Their rules on this cohort's slices, see `common/metrics/paper_slices.py`. Best: an "
    "oracle, the labels choose the threshold. Masked Bernoulli: mean and standard deviation over slices with lesion; "
    "MAD-AD S1 and AutoDDPM: the middle slices; S2: the slice of the largest lesion of each subject.",
    "Run time": "Each method in a process of its own; memory is the highest resident set while a case is read, "
    "detected and brought back to its grid.",
}


def cell(metric: Mapping[str, Any]) -> str:
    """`0.123 (0.100-0.140)`, with `FEW` behind an interval over fewer than 5 subjects; undefined is a dash."""
    value, (low, high) = metric["value"], metric["ci95"]
    if value is None:
        return "-"
    separator = " to " if low is not None and low < 0 else "-"
    mark = FEW if "few_subjects" in metric else ""
    return f"{value:.3f}" + ("" if low is None else f" ({low:.3f}{separator}{high:.3f}){mark}")


def protocol_cell(number: float | Mapping[str, float] | None) -> str:
    """`0.123`, or mean and standard deviation, `0.123 ± 0.045`; undefined is a dash."""
    if number is None:
        return "-"
    return f"{number['mean']:.3f} ± {number['std']:.3f}" if isinstance(number, Mapping) else f"{number:.3f}"


def size_label(bounds_ml: Sequence[float | None]) -> str:
    """Of a group of lesions: `< 0.1 ml`, `0.1-1 ml`, `> 10 ml`."""
    low, high = bounds_ml
    if high is None:
        return f"> {low:g} ml"
    return f"{low:g}-{high:g} ml" if low else f"< {high:g} ml"


def site_cell(site: Mapping[str, Any]) -> str:
    """`healthy 0.012 (0.008-0.016), worst 0.056; found 0.850 (0.800-0.900)` of one site."""
    share, worst, recall = (cell(site[name]) for name in SITES)
    return f"healthy {share}, worst {worst}; found {recall}"


def markdown_tables(benchmark: Mapping[str, Any]) -> str:
    """All tables, with 95 % intervals by bootstrap over subjects."""
    methods = benchmark["methods"]
    measured = [m for m in methods if m["kind"] == "method"]
    first = methods[0]
    lines = [
        f"{first['n_subjects']} subjects, {first['n_lesion_subjects']} of them with {first['n_lesions']} lesions in "
        f"{first['n_lesion_slices']} slices; seed {benchmark['seed']}; cohort `{benchmark['cohort_sha256'][:12]}`. "
        "95 % intervals by bootstrap over subjects.",
        "",
    ]
    lines += _section("Voxels", VOXELS.values(), [[m["key"], *(cell(m[n]) for n in VOXELS)] for m in methods])
    rows = [[m["key"], *(cell(m[n]) for n in SUBJECTS)] for m in methods]
    lines += _section("Slices and healthy subjects", SUBJECTS.values(), rows)
    sites = [
        f"{s['site'] or 'all'} ({s['n_healthy']} healthy, {s['n_lesion_subjects']} with lesion)" for s in first["sites"]
    ]
    lines += _section("Sites", sites, [[m["key"], *map(site_cell, m["sites"])] for m in measured])
    lines += _section("Lesions", LESIONS.values(), [[m["key"], *(cell(m[n]) for n in LESIONS)] for m in measured])
    sizes = [f"{size_label(group['ml'])} (n = {group['n_lesions']})" for group in first["lesion_sizes"]]
    rows = [
        [m["key"], *(f"{cell(g['lesion_recall'])}; voxels {cell(g['voxel_recall'])}" for g in m["lesion_sizes"])]
        for m in measured
    ]
    lines += _section("Lesions by size", sizes, rows)
    differences = {"auprc": "AUPRC", "dice_at_threshold": "Dice at the healthy threshold"}
    rows = [[m["key"], *(_difference(m, metric) for metric in differences)] for m in methods]
    lines += _section("Difference to the best", differences.values(), rows)
    rows = [[m["key"], *(protocol_cell(m["protocols"][name][number]) for name, number in PROTOCOLS)] for m in measured]
    lines += _section("Protocols of the papers", PROTOCOLS.values(), rows)
    rows = [
        [m["key"], *(str(m["run_time"][n] if m["run_time"][n] is not None else "-") for n in TIMES)] for m in measured
    ]
    lines += _section("Run time", TIMES.values(), rows)
    about = benchmark["machine"]
    lines += [f"{about['cpu']}, {about['cores']} cores, {about['gpu'] or 'no GPU'}.", ""]
    lines += [f"{key} failed: {message}\n" for key, message in benchmark["failed"].items()]
    return "\n".join(lines)


def _difference(method: Mapping[str, Any], metric: str) -> str:
    difference = method["difference_to_best"].get(metric)
    if difference is None:
        return "best" if method[metric]["value"] is not None else "-"
    return cell(difference)


def _section(title: str, header: Any, rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    columns = ["", *header]
    lines = [columns, ["---"] * len(columns), *rows]
    return [f"## {title}", "", EXPLAINED[title], "", *(f"| {' | '.join(line)} |" for line in lines), ""]


def csv_table(benchmark: Mapping[str, Any]) -> str:
    """One line a method and number: `method,metric,value,ci95_low,ci95_high`; empty where undefined."""
    lines: list[list[Any]] = []
    for method in benchmark["methods"]:
        numbers: dict[str, Any] = {name: method[name] for name in (*VOXELS, *SUBJECTS, *LESIONS)}
        for group in method["lesion_sizes"]:
            label = size_label(group["ml"])
            numbers |= {f"{name} {label}": group[name] for name in ("lesion_recall", "voxel_recall")}
        for site in method["sites"]:
            label = site["site"] or "all"
            numbers |= {f"{name} {label}": site[name] for name in SITES}
        for metric, difference in method["difference_to_best"].items():
            numbers[f"{metric} minus {difference['best']}"] = difference
        lines += [[method["key"], name, n["value"], *n["ci95"]] for name, n in numbers.items()]
        lines += [[method["key"], name, value, None, None] for name, value in method.get("run_time", {}).items()]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([["method", "metric", "value", "ci95_low", "ci95_high"], *lines])
    return text.getvalue()
