"""The commands of `uad` that deal with bundles as such: list, fetch, export, import, begin a new one."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .bundle import available_bundles, bundle_folders, describe_bundle, own_folder
from .console import one_line_errors
from .errors import BundleError
from .options import KEY_HELP, MethodArgument, known_bundle

bundles = typer.Typer()


class ExportFormat(StrEnum):
    """What `export` writes."""

    BUNDLE = "bundle"
    TORCHSCRIPT = "torchscript"
    ONNX = "onnx"


@bundles.command()
def export(
    method: MethodArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the bundle, and for its zip archive.")],
    output_format: Annotated[
        ExportFormat,
        typer.Option("--format", help="torchscript, onnx: the network on slices alone, if it is one pass."),
    ] = ExportFormat.BUNDLE,
) -> None:
    """Write a bundle that runs without this repository: for MONAI's tools, and for machines with nothing but MONAI."""
    with one_line_errors():
        from .sharing.export import export_bundle, export_onnx, export_torchscript
        from .weights import sha256

        write = {ExportFormat.TORCHSCRIPT: export_torchscript, ExportFormat.ONNX: export_onnx}
        path = write.get(output_format, export_bundle)(method, output)
    print(f"{path}: sha256 {sha256(path)}")


@bundles.command("import")
def import_(
    path: Annotated[Path, typer.Argument(help="What export wrote: the zip archive, or the folder.")],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Folder for it, to be named by UAD_BUNDLES. Default: where -m looks."),
    ] = None,
) -> None:
    """Check an exported bundle and add it to those that -m takes. Import only what you would also run."""
    with one_line_errors():
        from .sharing.archive import import_bundle

        folder = own_folder() if output is None else output.absolute()
        name = import_bundle(path, folder, [] if output else bundle_folders())
    where = "" if folder in bundle_folders() else f"UAD_BUNDLES={folder} and "
    print(f"{folder / name}: use it with {where}-m {name}")


@bundles.command()
def fetch(
    method: Annotated[
        str | None, typer.Argument(help=KEY_HELP, callback=known_bundle, autocompletion=available_bundles)
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Those of all bundles.")] = False,
    from_: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="FOLDER_OR_URL",
            envvar="UAD_WEIGHTS_URL",
            help="Where this project's files are: a clone, or the address of one.",
        ),
    ] = None,
) -> None:
    """Fetch weights that the installed package leaves out, once; they are checked, and used without a network."""
    if every == (method is not None):
        raise typer.BadParameter("give the key of a bundle, or --all")
    with one_line_errors():
        from .sharing.fetch import fetch_weights

        for name in available_bundles() if method is None else [method]:
            print(f"{fetch_weights(name, from_)}: the weights of {name}")


@bundles.command()
def sample(
    folder: Annotated[Path, typer.Argument(help="Is made if it is not there.")] = Path("sample"),
) -> None:
    """Write the scans that come with the package, to try the commands on: simulated lesions, and their masks."""
    with one_line_errors():
        from .cohorts.table import write_sample

        paths = write_sample(folder)
    print(*paths, sep="\n")


@bundles.command("import-weights")
def import_weights_(
    weights: Annotated[Path, typer.Argument(help="Old .pt file: a state dict, bare or under 'model' or 'state_dict'.")],
    config: Annotated[Path, typer.Option(help="Config of a bundle that has the network.")],
    network: Annotated[str, typer.Option(help="Id of the network in the config, such as unet.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="File for the converted weights.")],
) -> None:
    """Convert weights that were trained with monai-generative for a network of a bundle: its state dict alone."""
    with one_line_errors():
        from .sharing.import_weights import import_weights

        import_weights(weights, config, network, output)
    print(f"{output}: the converted weights")


@bundles.command("new-bundle")
def new_bundle_(
    key: Annotated[str, typer.Argument(help="Of the method: small letters, digits and _.")],
    like: Annotated[str, typer.Option(help="The nearest bundle that is there, see `uad list`.", callback=known_bundle)],
) -> None:
    """Begin the bundle of a new method: a copy of another one without its weights, with TODO where yours differs."""
    with one_line_errors():
        from .sharing.new_bundle import new_bundle

        print(f"{new_bundle(key, like, own_folder())}: docs/adding_a_method.md says what is next")


@bundles.command("list")
def list_bundles(as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False) -> None:
    """The bundles, with modality, size and licence of the weights, and run time."""
    with one_line_errors():
        found = [describe_bundle(name) for name in available_bundles()]
        if not found:
            where = " or ".join(map(str, bundle_folders()))
            raise BundleError(
                where, "no bundles", "install the package again, or set UAD_BUNDLES to a folder of bundles"
            )
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for bundle in found:
        print(f"{bundle['key']}: {bundle['title']}")
        print(f"    {', '.join(bundle['modalities'])}, {bundle['space']} space; {bundle['run_time']}")
        size = (
            f"{bundle['weights_mb']} MB"
            if bundle["weights_mb"] is not None
            else f"to be fetched (uad fetch {bundle['key']})"
        )
        print(f"    weights {size}, {bundle['weights_license']}")
