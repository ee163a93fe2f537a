"""Every method that fits a cohort, measured on the same subjects with the same resamples, one process each."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..bundle import PACKAGE, available_bundles, checked_items, folder_of, load_workflow, metadata, weights_place
from ..cohorts.labelled import check_labelled_cohort
from ..cohorts.table import cohort_files, cohort_modalities, read_cohort
from ..detection.fingerprint import Fingerprint
from ..errors import CohortError, UADError
from ..files import replacing
from ..images.check import typed_errors
from ..metrics.baselines import QUANTITIES
from ..metrics.bootstrap import PAIRED, paired_difference
from ..outputs import Inputs, check_file, is_result, replicates_path
from ..report.benchmark_table import LESIONS, SUBJECTS, VOXELS, csv_table, markdown_tables
from ..results.case import versions
from ..weights import digest
from .evaluation import (
    BaselineMetrics,
    fit_healthy_baselines,
    healthy_training_subjects,
    labelled_case,
    read_result,
    write_result,
)
from .variants import Variant

RESULT = "result.json"
Options = Mapping[str, str | bool]
LONG = ("curves", "slice_scores", "replicates")  # for pictures and comparisons: in the method's result.json only


class MethodFailedError(Exception):
    """A method could not be measured; the others can."""


def run_benchmark(
    cohort: Path,
    output: Path,
    methods: Sequence[str] = (),
    seed: int = 0,
    needs_healthy: bool = True,
    options: Options | None = None,
) -> int:
    """Write `<key>/result.json` of each method and baseline, benchmark.json, .csv and .md; return how many failed.

    A method whose result of the same weights, configs, cohort, seed and options is there already is not run again; one
    that fails stops none of the others. The cohort is checked before the first runs.

    Args:
        methods: keys of bundles, with other settings after a colon, see `Variant.parse`; by default all bundles whose
            modalities are columns of the cohort.
        needs_healthy: whether a cohort without healthy test subjects is refused.
        options: of `uad evaluate`, by their names: `device`, `strip`, `register`; those left out are its defaults.
    Raises CohortError, BundleError, SettingError, or OutputError where something else would be written over.
    """
    chosen = [Variant.parse(method) for method in methods]
    keys = fitting_bundles(cohort, sorted({variant.bundle for variant in chosen}))
    variants = sorted(chosen or map(Variant, keys), key=lambda variant: variant.key)
    used = sorted({modality for key in keys for modality in metadata(key)["modalities"]})
    check_output(cohort, output, variants)
    check_labelled_cohort(cohort, used, needs_healthy)
    options = dict(options or {})
    settings = {name: value for name, value in options.items() if name != "device"}  # results depend on these
    identity = {"cohort_sha256": cohort_digest(cohort, used), "seed": seed, "options": settings}
    failed: dict[str, str] = {}
    results = measure_baselines(cohort, output, keys, identity, failed)
    for variant in variants:
        key, own = variant.key, {**identity, "bundle": variant.bundle, "items": list(variant.items)}
        own["config_sha256"] = config_digest(variant.bundle)
        try:
            own["fingerprint"] = fingerprint(variant, seed, settings)
            results[key] = finished(output / key, own) or evaluate_apart(variant, cohort, output / key, own, options)
        except MethodFailedError as error:
            failed[key] = str(error)
    if not results:
        fact = f"no method could be measured; {', '.join(failed)}: {next(iter(failed.values()))}"
        raise CohortError(cohort, fact, "correct the cause, and start again")
    write_benchmark(output, cohort.name, identity, results, failed)
    return len(failed)


def fitting_bundles(cohort: Path, methods: Sequence[str] = ()) -> list[str]:
    """Keys of the bundles whose modalities are all columns of a cohort; of the chosen ones all must be.

    Raises CohortError.
    """
    columns = set(cohort_modalities(cohort))
    missing = {key: sorted(set(metadata(key)["modalities"]) - columns) for key in methods or available_bundles()}
    fitting = sorted(key for key, lacking in missing.items() if not lacking)
    lacking = next((key for key in methods if missing[key]), None)
    if lacking:
        fact = f"no column {', '.join(missing[lacking])}, which {lacking} needs"
        raise CohortError(cohort, fact, "add it, or choose other methods")
    if not fitting:
        raise CohortError(cohort, f"no bundle works on {', '.join(sorted(columns))} alone", "see uad list")
    return fitting


def check_output(cohort: Path, output: Path, variants: Iterable[Variant]) -> None:
    """Raises OutputError where an input would be written over, or what is no earlier result of a benchmark."""
    tables = [output / f"benchmark.{suffix}" for suffix in ("json", "csv", "md")]
    results = {output / variant.key / RESULT for variant in variants}
    baselines = ("intensity", "mean_healthy_image", *QUANTITIES)
    results |= {path for name in baselines for path in output.glob(f"{name}_*/{RESULT}")}
    weights = [weights_place(variant.bundle) for variant in variants]
    beside = [replicates_path(result) for result in sorted(results)]
    Inputs([*cohort_files(cohort), *weights]).check([*tables, *sorted(results), *beside])
    for table in tables:
        check_file(table, is_result(tables[0], "cohort", "methods"), "of an earlier benchmark")
    for result in sorted(results):
        check_file(result, is_result(result, "key", "kind"), "an earlier result of a benchmark")
    for path in beside:
        check_file(path, is_result(path, "replicates"), "of an earlier result of a benchmark")


def cohort_digest(cohort: Path, modalities: Sequence[str]) -> str:
    """Of the CSV and of the files of its test subjects, which may change while their names stay."""
    items = read_cohort(cohort, modalities, split="test")
    files: list[Any] = [item[key] for item in items for key in ("image", "brain", "lesion") if key in item]
    return digest([cohort, *(path for entry in files for path in ([entry] if isinstance(entry, str) else entry))])


def config_digest(bundle: str) -> str:
    """Of the configs that its results depend on."""
    return digest([folder_of(bundle) / "configs" / name for name in ("inference.json", "evaluate.json")])


def fingerprint(variant: Variant, seed: int, options: Options) -> str:
    """The digest of what its maps depend on, weights and settings. Raises MethodFailedError."""
    override = checked_items(variant.bundle, variant.items) | {"network_def::seed": seed}
    override |= {f"preprocessing::{name}": value for name, value in options.items()}
    try:
        with typed_errors():
            workflow = load_workflow(variant.bundle, ["inference.json"], **override)
            workflow.initialize()
            parts = map(workflow.parser.get_parsed_content, ("network_def", "preprocessing", "weights"))
            return Fingerprint.of(*parts).digest
    except UADError as error:
        message = f"{type(error).__name__}: {error}"
        say(f"{variant.key}: failed: {message}")
        raise MethodFailedError(message) from error


def finished(folder: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The result in a folder, if it is that of these weights and settings, this cohort, seed and options."""
    try:
        result = read_result(folder / RESULT)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not isinstance(result, dict) or any(result.get(name) != value for name, value in identity.items()):
        return None
    if any(
        name not in result for name in (*VOXELS, *SUBJECTS, *LESIONS, "sites", "replicates")
    ):  # of an earlier version
        return None
    say(f"{folder.name}: was finished before")
    return result


def measure_baselines(
    cohort: Path, output: Path, keys: Iterable[str], identity: Mapping[str, Any], failed: dict[str, str]
) -> dict[str, dict[str, Any]]:
    """Results of the baselines for each set of modalities, prepared as the first bundle of these modalities does.

    Where its preprocessing refuses the images, `failed` gets the reason.
    """
    results: dict[str, dict[str, Any]] = {}
    first = {"+".join(metadata(key)["modalities"]): key for key in reversed(list(keys))}
    for modalities, key in sorted(first.items()):
        own = {**identity, "prepared_as": key, "config_sha256": config_digest(key)}
        there = {path.name: finished(path, own) for path in output.glob(f"*_{modalities}")}
        found = {name: result for name, result in there.items() if result}
        if not found:
            try:
                measured = run_baselines(cohort, key, own)
            except UADError as error:
                failed[f"baselines_{modalities}"] = f"{type(error).__name__}: {error}"
                say(f"baselines on {modalities}: failed: {error}")
                continue
            for name, result in measured.items():
                found[f"{name}_{modalities}"] = {**result, "key": f"{name}_{modalities}", "kind": "baseline", **own}
                write_result(found[f"{name}_{modalities}"], output / f"{name}_{modalities}" / RESULT)
        results |= found
    return results


def run_baselines(cohort: Path, key: str, identity: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Metrics of the baselines on the images that a bundle's preprocessing makes. Raises UADError."""
    override = {f"preprocessing::{name}": value for name, value in identity["options"].items()}
    with typed_errors():
        workflow = load_workflow(key, ["inference.json", "evaluate.json"], cohort=str(cohort.resolve()), **override)
        workflow.initialize()
        content, started = workflow.parser.get_parsed_content, time.perf_counter()
        modalities = metadata(key)["modalities"]
        healthy = fit_healthy_baselines(healthy_training_subjects(cohort, modalities), content("preprocessing"))
        baselines = BaselineMetrics(modalities, healthy)
        for item in content("dataset"):
            baselines.update(labelled_case(item))
    say(f"baselines on {', '.join(modalities)}: {time.perf_counter() - started:.0f} s")
    return baselines.compute(identity["seed"])


def evaluate_apart(
    variant: Variant, cohort: Path, folder: Path, identity: Mapping[str, Any], options: Options
) -> dict[str, Any]:
    """`uad evaluate` in a process of its own: neither memory nor a crash is shared. Raises MethodFailedError."""
    evaluation, started = folder.resolve() / ".evaluation.json", time.perf_counter()
    flags = []
    for name, value in options.items():
        flags += [f"--{name}", value] if isinstance(value, str) else [f"--{name}" if value else f"--no-{name}"]
    program = str(__package__).rpartition(".")[0]
    command = [sys.executable, "-m", program, "evaluate", str(cohort.resolve()), "-o", str(evaluation)]
    command += ["-m", variant.bundle, "--seed", str(identity["seed"]), "--no-baselines", "-q", *flags]
    command += [f"--set={item}" for item in variant.items]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULT).unlink(missing_ok=True)  # of other weights, of another cohort
    done = subprocess.run(  # noqa: S603 - this program
        command, cwd=PACKAGE.parent, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False
    )
    seconds = time.perf_counter() - started
    if done.returncode or not evaluation.is_file():
        message = (done.stderr.strip().splitlines() or [f"ended with exit code {done.returncode}"])[-1]
        say(f"{variant.key}: failed after {seconds:.0f} s: {message}")
        raise MethodFailedError(message)
    result = read_result(evaluation)
    modalities = metadata(variant.bundle)["modalities"]
    result |= {"key": variant.key, "kind": "method", "modalities": modalities, **identity}
    write_result(result, folder / RESULT)
    evaluation.unlink()
    replicates_path(evaluation).unlink()
    say(f"{variant.key}: {seconds:.0f} s")
    return result


def write_benchmark(
    output: Path,
    cohort: str,
    identity: Mapping[str, Any],
    results: Mapping[str, dict[str, Any]],
    failed: Mapping[str, str],
) -> None:
    """Write the tables, the best method first, each with its differences to the best."""
    best = {}
    for metric in PAIRED:
        known = [key for key in sorted(results) if results[key][metric]["value"] is not None]
        if known:
            best[metric] = max(known, key=lambda key: results[key][metric]["value"])
    methods = []
    for key, result in sorted(results.items(), key=lambda item: (-(item[1]["auprc"]["value"] or 0), item[0])):
        differences = {
            metric: {"best": other, **paired_difference(result, results[other], metric)}
            for metric, other in best.items()
            if key != other and result[metric]["value"] is not None
        }
        short = {name: value for name, value in result.items() if name not in LONG}
        methods.append({**short, "difference_to_best": differences})
    benchmark = {
        "cohort": cohort,
        **identity,
        "methods": methods,
        "failed": dict(failed),
        "machine": machine(),
        "versions": versions(),
    }
    write_result(benchmark, output / "benchmark.json")
    for name, text in {"benchmark.csv": csv_table(benchmark), "benchmark.md": markdown_tables(benchmark)}.items():
        with replacing(output / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def machine() -> dict[str, Any]:
    """What the run times depend on, without the name of the computer."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file() and (found := re.search(r"model name\s*: (.+)", cpuinfo.read_text(encoding="utf-8"))):
        model = found[1]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"system": platform.system(), "cpu": model, "cores": os.cpu_count(), "gpu": gpu}


def say(message: str) -> None:
    """Progress, on stderr."""
    print(message, file=sys.stderr, flush=True)
