"""The command `uad`: thin, everything happens in the bundles' own workflows."""

from __future__ import annotations

import functools
import io
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .bids_app import AnalysisLevel, BidsAppCommand, BidsDir, Labels, OutputDir
from .bundle import (
    BUNDLES_DIR,
    available_bundles,
    checked_items,
    describe_bundle,
    load_workflow,
    metadata,
    run_inference,
    run_training,
)
from .cohorts.bids import check_dataset
from .cohorts.cases import find_cases
from .cohorts.kinds import KINDS
from .cohorts.table import cohort_files
from .errors import UADError, settings_said_as
from .images.check import typed_errors
from .outputs import check_result, input_files
from .report.html import write_report
from .sharing.archive import import_bundle
from .sharing.export import export_bundle, export_onnx, export_torchscript
from .sharing.import_weights import import_weights
from .sharing.new_bundle import new_bundle
from .transforms.strip import Strip
from .weights import sha256
from .workflows.batch import check_detection, chosen_part, detect_cases
from .workflows.benchmark import run_benchmark
from .workflows.calibrate import check_calibrated, healthy_cases
from .workflows.prepare import prepare_cohort

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

cohorts = typer.Typer(no_args_is_help=True)
app.add_typer(cohorts, name="cohort")

FAILED = 3
KEY_HELP = "Key of a bundle, see `uad list`."


class Format(StrEnum):
    """What `detect` writes."""

    NIFTI = "nifti"
    DICOM_SEG = "dicom-seg"


class ExportFormat(StrEnum):
    """What `export` writes."""

    BUNDLE = "bundle"
    TORCHSCRIPT = "torchscript"
    ONNX = "onnx"


EXPORTS = {
    ExportFormat.BUNDLE: export_bundle,
    ExportFormat.TORCHSCRIPT: export_torchscript,
    ExportFormat.ONNX: export_onnx,
}


def _known(method: str) -> str:
    if method not in available_bundles():
        raise typer.BadParameter(f"{method!r} is none of {', '.join(available_bundles())}")
    return method


def _device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise typer.BadParameter(f"{name!r} is none of auto, cpu, cuda, cuda:0, ...")
    return name


def _part(text: str | None) -> str | None:
    if text is not None:
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise typer.BadParameter(f"{text!r} is not like 1/8, ..., 8/8")
    return text


Method = Annotated[str, typer.Option("-m", "--method", help=KEY_HELP, callback=_known)]
MethodArgument = Annotated[str, typer.Argument(help=KEY_HELP, callback=_known)]
Cohort = Annotated[Path, typer.Argument(help="CSV with the columns subject, split, the modalities, brain, lesion.")]
Seed = Annotated[int, typer.Option(help="Same seed, same result.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.", callback=_device)]
BatchSize = Annotated[int, typer.Option(min=1, help="Slices at a time; changes memory and speed only.")]
Weights = Annotated[Path | None, typer.Option(help="Your own weights instead of the bundle's.")]
StripHow = Annotated[
    Strip | None,
    typer.Option(help="Find the brain in a scan with the skull on: atlas (approximate), deepbet (T1), or hd-bet."),
]
Register = Annotated[
    bool | None, typer.Option("--register/--no-register", help="Work in MNI152 space. Default: what the bundle wants.")
]
Series = Annotated[str | None, typer.Option(help="UID or description of the DICOM series to take.")]
Participants = Annotated[list[str] | None, typer.Option(help="Of a BIDS dataset; may be repeated.")]
Items = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="ITEM=VALUE", help="Of the bundle's inference.json, such as L=300; may be repeated."),
]


@app.callback()
def main(context: typer.Context) -> None:
    """Find what is abnormal in a brain scan, with methods trained on healthy images only."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files may be of any bytes
    _advise_options(context)


@cohorts.callback()
def cohort_kind(context: typer.Context) -> None:
    """Build a labelled test cohort from a folder of public images."""
    _advise_options(context)


def _advise_options(context: typer.Context) -> None:
    """What an error advises are options of the command that runs, and no others."""
    command = context.command.commands[context.invoked_subcommand]  # type: ignore[attr-defined]
    options = (parameter for parameter in command.params if parameter.param_type_name == "option")
    words = {option.name: f"give {option.opts[-1]}{'' if option.is_flag else ' {}'}" for option in options}
    context.with_resource(settings_said_as(words))


@app.command()
def detect(
    image: Annotated[
        list[Path],
        typer.Argument(help="NIfTI, NRRD, MetaImage files; a folder of them; a DICOM folder, zip; BIDS; a cohort CSV."),
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
    part: Annotated[
        str | None, typer.Option(help="i/n: the i-th of n parts of the cases. SLURM's array is read.", callback=_part)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Do finished cases again.")] = False,
    output_format: Annotated[
        Format, typer.Option("--format", help="dicom-seg: for DICOM input write DICOM objects too.")
    ] = Format.NIFTI,
    force: Annotated[bool, typer.Option("--force", help="DICOM objects of unreliable results too.")] = False,
    items: Items = None,
) -> None:
    """Write an anomaly map, a segmentation and a pseudo-healthy reconstruction of each scan, on its own grid.

    Finished cases are skipped, a bad case does not stop the others; OUTPUT/status.tsv says what became of each.
    """
    with _one_line_errors():
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
        }
        with typed_errors():
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
    with _one_line_errors():
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
) -> None:
    """Check, strip, register, resample and scale a cohort once, so that training reads it fast. Resumable."""
    with _one_line_errors(), typed_errors():
        failed = prepare_cohort(cohort, output, spacing_mm, register, strip and strip.value)
    if failed:
        raise typer.Exit(FAILED)


@app.command()
def train(
    method: MethodArgument,
    cohort: Cohort,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for checkpoints, logs and model.pt.")],
) -> None:
    """Train a bundle on the healthy subjects of a cohort, stage by stage, and calibrate it. Resumable."""
    with _one_line_errors():
        weights = run_training(method, cohort, output)
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
    with _one_line_errors():
        cases = find_cases(healthy, metadata(method)["modalities"], None, series, participant_label or ())
        chosen, said = healthy_cases(cases)
        others = [path for path in (*healthy, weights) if path and path.is_file()]
        check_calibrated(output, [*input_files(cases), *others, BUNDLES_DIR])
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
) -> None:
    """Measure a method on the test subjects of a labelled cohort, beside the baselines that cost nothing."""
    with _one_line_errors():
        check_result(output, [*cohort_files(cohort), *([weights] if weights else [])], "bundle", "weights_sha256")
        override = checked_items(method, items or ()) | _override(seed, device, weights, strip, register)
        if not baselines:
            override |= {"task::baselines": False}
        paths = {"cohort": str(cohort.resolve()), "result": str(output.resolve())}
        run_inference(method, ["inference.json", "evaluate.json"], **paths, **override)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="What detect or benchmark wrote, or the folder of one case.")],
    scan: Annotated[Path | None, typer.Option(help="The scan of the case, if it is no longer where it was.")] = None,
) -> None:
    """Write FOLDER/report.html: pictures, tables and a viewer in one file that opens without a network."""
    with _one_line_errors():
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
    with _one_line_errors():
        options = {"device": device, "strip": strip and strip.value, "register": register}
        given = {name: value for name, value in options.items() if value is not None}
        failed = run_benchmark(cohort, output, method or (), seed, not no_healthy, given)
    print(f"{output / 'benchmark.md'}: the tables")
    if failed:
        raise typer.Exit(FAILED)


def _in_one_line(make: Callable[..., None], said: str) -> Callable[..., None]:
    @functools.wraps(make)
    def command(**options: Any) -> None:
        with _one_line_errors(), typed_errors():
            make(**options)
        print(said.format(**options))

    return command


@app.command()
def export(
    method: MethodArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the bundle, and for its zip archive.")],
    output_format: Annotated[
        ExportFormat,
        typer.Option("--format", help="torchscript, onnx: the network on slices alone, if it is one pass."),
    ] = ExportFormat.BUNDLE,
) -> None:
    """Write a bundle that runs without this repository: for MONAI's tools, and for machines with nothing but MONAI."""
    with _one_line_errors():
        path = EXPORTS[output_format](method, output)
    print(f"{path}: sha256 {sha256(path)}")


@app.command("import")
def import_(
    path: Annotated[Path, typer.Argument(help="What export wrote: the zip archive, or the folder.")],
) -> None:
    """Check an exported bundle and add it to those that -m takes. Import only what you would also run."""
    with _one_line_errors():
        name = import_bundle(path, BUNDLES_DIR)
    print(f"{BUNDLES_DIR / name}: use it with -m {name}")


@app.command("new-bundle")
def new_bundle_(
    key: Annotated[str, typer.Argument(help="Of the method: small letters, digits and _.")],
    like: Annotated[str, typer.Option(help="The nearest bundle that is there, see `uad list`.", callback=_known)],
) -> None:
    """Begin the bundle of a new method: a copy of another one without its weights, with TODO where yours differs."""
    with _one_line_errors():
        print(f"{new_bundle(key, like, BUNDLES_DIR)}: docs/adding_a_method.md says what is next")


@app.command("list")
def list_bundles(as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False) -> None:
    """The bundles, with modality, size and licence of the weights, and run time."""
    bundles = [describe_bundle(name) for name in available_bundles()]
    if as_json:
        print(json.dumps(bundles, indent=2))
        return
    for bundle in bundles:
        print(f"{bundle['key']}: {bundle['title']}")
        print(f"    {', '.join(bundle['modalities'])}, {bundle['space']} space; {bundle['run_time']}")
        print(f"    weights {bundle['weights_mb']} MB, {bundle['weights_license']}")


def _override(
    seed: int, device: str, weights: Path | None, strip: Strip | None, register: bool | None
) -> dict[str, Any]:
    """Config items for options that several commands share; what is not given stays as the bundle has it."""
    given = {
        "device": None if device == "auto" else f"$torch.device('{device}')",
        "weights": weights and str(weights.resolve()),  # resolved, so that MONAI takes no file name for an expression
        "preprocessing::strip": strip and strip.value,
        "preprocessing::register": register,
    }
    return {"network_def::seed": seed, **{name: value for name, value in given.items() if value is not None}}


@contextmanager
def _one_line_errors() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)  # what MONAI and ignite say of a failed case is said once, here
    try:
        yield
    except UADError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise typer.Exit(FAILED) from None
    finally:
        logging.disable(before)


app.command("import-weights")(_in_one_line(import_weights, "{output}: the converted weights"))
for _kind, _make in KINDS.items():
    cohorts.command(_kind)(_in_one_line(_make, "{output}/cohort.csv: the cohort"))
