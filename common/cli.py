"""The command `uad`: thin, everything happens in the bundles' own workflows.

torch and MONAI take seconds to import, so a command imports what it needs when it runs: `uad --help` and `uad list`
answer at once.
"""

from __future__ import annotations

import functools
import io
import json
import sys
from collections.abc import Callable, MutableMapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from . import __version__
from .bids_app import AnalysisLevel, BidsAppCommand, BidsDir, Labels, OutputDir
from .bundle import (
    bundle_folders,
    checked_items,
    load_workflow,
    metadata,
    run_inference,
    run_training,
)
from .cli_bundles import bundles
from .console import FAILED, SpeakingGroup, advise_options, one_line_errors
from .options import (
    BatchSize,
    Cohort,
    Device,
    Engine,
    Items,
    Jobs,
    Method,
    MethodArgument,
    Part,
    Participants,
    Register,
    Scheduler,
    Seed,
    Series,
    StripHow,
    Weights,
)
from .outputs import check_result, input_files, replicates_path
from .papers import figures, reproduce

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, cls=SpeakingGroup)


class Format(StrEnum):
    """What `detect` writes."""

    NIFTI = "nifti"
    DICOM_SEG = "dicom-seg"


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"uad {__version__}")
        raise typer.Exit


@app.callback()
def main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Find what is abnormal in a brain scan, with methods trained on healthy images only."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files may be of any bytes
    advise_options(context)


class _Kinds(TyperGroup):
    """The kinds of cohorts, each a command with options of its own: imported when one is asked for."""

    @property
    def commands(self) -> MutableMapping[str, Any]:  # type: ignore[override]
        return _kinds()

    @commands.setter
    def commands(self, none: object) -> None:
        """What typer has found while this module was imported."""


@functools.cache
def _kinds() -> MutableMapping[str, Any]:
    from .cohorts.kinds import KINDS

    kinds = typer.Typer(cls=SpeakingGroup)
    for kind, make in KINDS.items():
        kinds.command(kind)(_in_one_line(make, "{output}/cohort.csv: the cohort"))
    return typer.main.get_group(kinds).commands


cohorts = typer.Typer(no_args_is_help=True, cls=_Kinds)
app.add_typer(cohorts, name="cohort")
app.add_typer(bundles)


@cohorts.callback()
def cohort_kind(context: typer.Context) -> None:
    """Build a labelled test cohort from a folder of public images."""
    advise_options(context)


@app.command()
def detect(
    image: Annotated[
        list[Path],
        typer.Argument(
            help="NIfTI, NRRD, MetaImage files; a folder of them; a DICOM folder, zip; BIDS; a cohort CSV. "
            "`uad sample` writes scans to try."
        ),
    ],
    method: Method,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the results, one folder a case.")],
    brain_mask: Annotated[Path | None, typer.Option(help="Mask of the brain, on the grid of the image.")] = None,
    strip: StripHow = None,
    register: Register = None,
    series: Series = None,
    participant_label: Participants = None,
    seed: Seed = 0,
    device: Device = "auto",
    batch_size: BatchSize = 16,
    weights: Weights = None,
    part: Part = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Do finished cases again.")] = False,
    output_format: Annotated[
        Format, typer.Option("--format", help="dicom-seg: for DICOM input write DICOM objects too.")
    ] = Format.NIFTI,
    force: Annotated[bool, typer.Option("--force", help="DICOM objects of unreliable results too.")] = False,
    items: Items = None,
    jobs: Jobs = None,
    scheduler: Scheduler = None,
    engine: Engine = "torch",
) -> None:
    """Write an anomaly map, a segmentation and a pseudo-healthy reconstruction of each scan, on its own grid.

    Finished cases are skipped, a bad case does not stop the others; OUTPUT/status.tsv says what became of each.
    """
    with one_line_errors():
        from .cohorts.cases import find_cases
        from .workflows.batch import check_detection, chosen_part, detect_cases

        mask = None if brain_mask is None else str(brain_mask)
        cases = find_cases(image, metadata(method)["modalities"], mask, series, participant_label or ())
        own_part = chosen_part(part)
        others = [path for path in (*image, weights) if path and path.is_file()]
        check_detection(output, cases, method, others, own_part)
        override = checked_items(method, items or ()) | _override(seed, device, weights, strip, register)
        override |= {
            "network_def::batch_size": batch_size,
            "task::dicom": output_format is Format.DICOM_SEG,
            "task::force": force,
            **({} if engine == "torch" else {"evaluator::engine": engine}),
        }
        if jobs is not None or scheduler is not None:
            from .workflows.cluster import detect_by_workers

            failed = detect_by_workers(method, override, output, cases, own_part, overwrite, jobs, scheduler)
        else:
            workflow = load_workflow(method, ["inference.json"], output_dir=str(output.resolve()), **override)
            workflow.initialize()
            failed = detect_cases(workflow, cases, own_part, overwrite)
    if failed:
        raise typer.Exit(FAILED)


@app.command(cls=BidsAppCommand)
def bids(
    bids_dir: BidsDir,
    output_dir: OutputDir,
    analysis_level: AnalysisLevel,
    method: Method,
    participant_label: Labels = None,
    strip: StripHow = None,
    register: Register = None,
    seed: Seed = 0,
    device: Device = "auto",
    batch_size: BatchSize = 16,
    weights: Weights = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Do finished cases again.")] = False,
    items: Items = None,
) -> None:
    """The BIDS App: detect in every scan of a dataset that the bundle can read, and write a derivative dataset."""
    with one_line_errors():
        from .cohorts.bids import check_dataset

        check_dataset(bids_dir)
    how = functools.partial(detect, strip=strip, register=register, seed=seed, device=device, batch_size=batch_size)
    which = functools.partial(how, participant_label=participant_label, overwrite=overwrite)
    which([bids_dir], method, output_dir, weights=weights, items=items)


@app.command()
def prepare(
    cohort: Cohort,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the prepared cohort.")],
    spacing_mm: Annotated[float, typer.Option(min=0.5, max=10, help="Of the grid of the bundles to be trained.")] = 2.0,
    strip: StripHow = None,
    register: Annotated[bool, typer.Option("--register/--no-register", help="Bring everything to MNI152.")] = False,
    jobs: Jobs = None,
    scheduler: Scheduler = None,
) -> None:
    """Check, strip, register, resample and scale a cohort once, so that training reads it fast. Resumable."""
    with one_line_errors():
        from .workflows.prepare import preparation_of, prepare_cohort

        how = (cohort, output, spacing_mm, register, strip)
        if jobs is not None or scheduler is not None:
            from .workflows.cluster import prepare_by_workers

            failed = prepare_by_workers(*preparation_of(*how), jobs, scheduler)
        else:
            failed = prepare_cohort(*how)
    if failed:
        raise typer.Exit(FAILED)


@app.command()
def train(
    method: MethodArgument,
    cohort: Cohort,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for checkpoints, logs and model.pt.")],
    cache: Annotated[Path | None, typer.Option(help="Folder for prepared slices, in place of the memory.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="That prepare slices for --cache at the same time.")] = 1,
) -> None:
    """Train a bundle on the healthy subjects of a cohort, stage by stage, and calibrate it. Resumable."""
    with one_line_errors():
        weights = run_training(method, cohort, output, cache, processes)
    print(f"{weights}: trained and calibrated; use it with --weights")


@app.command()
def calibrate(
    healthy: Annotated[list[Path], typer.Argument(help="Scans as of detect; of a cohort CSV the healthy ones count.")],
    method: Method,
    output: Annotated[Path, typer.Option("-o", "--output", help="The calibrated weights, for --weights.")],
    strip: StripHow = None,
    register: Register = None,
    series: Series = None,
    participant_label: Participants = None,
    seed: Seed = 0,
    device: Device = "auto",
    weights: Weights = None,
    items: Items = None,
) -> None:
    """Fit the threshold of a method to your scanner, on the scans of healthy subjects: from 4, better 12 or more."""
    with one_line_errors():
        from .cohorts.cases import find_cases
        from .workflows.calibrate import check_calibrated, healthy_cases

        cases = find_cases(healthy, metadata(method)["modalities"], None, series, participant_label or ())
        chosen, said = healthy_cases(cases)
        others = [path for path in (*healthy, weights) if path and path.is_file()]
        check_calibrated(output, [*input_files(cases), *others, *bundle_folders()])
        override = checked_items(method, items or ()) | _override(seed, device, weights, strip, register)
        # a tuple: MONAI looks into lists, and would evaluate text that begins with "$"
        override |= {"dataset::data": tuple(chosen), "task::output": str(output.absolute())}
        print(f"calibrating on {said}")
        run_inference(method, ["inference.json", "calibrate.json"], **override)
    print(f"{output}: use it with --weights")


@app.command()
def evaluate(
    cohort: Cohort,
    method: Method,
    output: Annotated[Path, typer.Option("-o", "--output", help="The result, a JSON file.")],
    strip: StripHow = None,
    register: Register = None,
    seed: Seed = 0,
    device: Device = "auto",
    weights: Weights = None,
    baselines: Annotated[bool, typer.Option("--baselines/--no-baselines", help="Measure these too.")] = True,
    items: Items = None,
    jobs: Jobs = None,
    scheduler: Scheduler = None,
) -> None:
    """Measure a method on the test subjects of a labelled cohort, beside the baselines that cost nothing: a table."""
    with one_line_errors():
        from .cohorts.table import cohort_files
        from .report.evaluation_table import evaluation_table

        inputs = [*cohort_files(cohort), *([weights] if weights else [])]
        check_result(output, inputs, "bundle", "weights_sha256")
        check_result(replicates_path(output), inputs, "replicates")
        override = checked_items(method, items or ()) | _override(seed, device, weights, strip, register)
        if not baselines:
            override |= {"task::baselines": False}
        override |= {"cohort": str(cohort.resolve()), "result": str(output.resolve())}
        if jobs is not None or scheduler is not None:
            from .workflows.cluster import evaluate_by_workers

            evaluate_by_workers(method, override, jobs, scheduler)
        else:
            run_inference(method, ["inference.json", "evaluate.json"], **override)
    print(evaluation_table(json.loads(output.read_text(encoding="utf-8"))))
    print(f"\n{output}: all of it")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="What detect or benchmark wrote, or the folder of one case.")],
    scan: Annotated[Path | None, typer.Option(help="The scan of the case, if it is no longer where it was.")] = None,
) -> None:
    """Write FOLDER/report.html: pictures, tables and a viewer in one file that opens without a network."""
    with one_line_errors():
        from .report.html import write_report

        print(write_report(folder, scan))


@app.command()
def benchmark(
    cohort: Cohort,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the results and the tables.")],
    method: Annotated[
        list[str] | None,
        typer.Option("-m", "--method", help="METHOD[:ITEM=VALUE,...]; may be repeated. Default: all that fit."),
    ] = None,
    strip: StripHow = None,
    register: Register = None,
    seed: Seed = 0,
    device: Device = "auto",
    no_healthy: Annotated[
        bool, typer.Option("--no-healthy", help="Accept a cohort without healthy test subjects.")
    ] = False,
) -> None:
    """Measure every bundle that fits the modalities of a labelled cohort, and the baselines: one table. Resumable."""
    with one_line_errors():
        from .devices import checked_device
        from .workflows.benchmark import run_benchmark

        if device != "auto":
            checked_device(device)
        options = {"device": device, "strip": strip, "register": register}
        given = {name: value for name, value in options.items() if value is not None}
        failed = run_benchmark(cohort, output, method or (), seed, not no_healthy, given)
    print(f"{output / 'benchmark.md'}: the tables")
    if failed:
        raise typer.Exit(FAILED)


def _override(seed: int, device: str, weights: Path | None, strip: str | None, register: bool | None) -> dict[str, Any]:
    """Config items for options that several commands share; what is not given stays as the bundle has it.

    Raises SettingError where this machine has no such device.
    """
    from .devices import checked_device

    given = {
        "device": None if device == "auto" else f"$torch.device('{checked_device(device)}')",
        "weights": weights and str(weights.resolve()),  # resolved, so that MONAI takes no file name for an expression
        "preprocessing::strip": strip,
        "preprocessing::register": register,
    }
    return {"network_def::seed": seed, **{name: value for name, value in given.items() if value is not None}}


def _in_one_line(make: Callable[..., None], said: str | None = None) -> Callable[..., None]:
    @functools.wraps(make)
    def command(**options: Any) -> None:
        with one_line_errors():
            make(**options)
        if said is not None:
            print(said.format(**options))

    return command


app.command("reproduce")(_in_one_line(reproduce))
app.command("figures")(_in_one_line(figures))
