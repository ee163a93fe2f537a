"""Bundles as folders of data: where they are, and how one is run."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cohorts.table import cohort_files
from .errors import BundleError, SettingError
from .outputs import Inputs, check_file
from .progress import Progress

if TYPE_CHECKING:  # torch and MONAI take seconds to import: only what runs a bundle does so
    from monai.bundle import ConfigParser, ConfigWorkflow

PACKAGE = Path(__file__).resolve().parent
INSTALLED = PACKAGE / "_bundles"  # where a wheel has them; in a clone they lie beside the package
BUNDLES_DIR = INSTALLED if INSTALLED.is_dir() else PACKAGE.parent / "bundles"
LARGE_FILES = "large_files.json"  # as in MONAI's model zoo: what is not in a wheel, with its sha256
WEIGHTS = "models/model.pt"


def own_folder() -> Path:
    """Where bundles and weights of the user are kept: `UAD_BUNDLES`, else the repository, else the platform's cache."""
    if given := os.environ.get("UAD_BUNDLES"):
        return Path(given).expanduser().absolute()
    if BUNDLES_DIR != INSTALLED:
        return BUNDLES_DIR
    return importlib.import_module("platformdirs").user_cache_path("uad-bundles", appauthor=False)  # exports go without


def bundle_folders() -> list[Path]:
    """The folders that bundles lie in; of two bundles of a name that in the first counts, the user's own."""
    return list(dict.fromkeys([own_folder(), BUNDLES_DIR]))


def folder_of(name: str) -> Path:
    """The folder of a bundle. Raises BundleError."""
    for folder in bundle_folders():
        if (folder / name / "configs" / "metadata.json").is_file():
            return folder / name
    raise BundleError(name, "no such bundle", f"choose one of {', '.join(available_bundles())}")


def weights_place(name: str) -> Path:
    """Where the weights of a bundle are, or belong: in its folder, or beside those of the user. Raises BundleError.

    Fetched weights are named by their sha256, so that those of another version are never taken for them.
    """
    folder, large = folder_of(name), large_file(name)
    if large is None or folder.parent == own_folder() or (folder / WEIGHTS).is_file():
        return folder / WEIGHTS
    return own_folder() / "weights" / f"{name}-{large['hash_val']}.pt"


def weights_of(name: str) -> Path:
    """`weights_place`. Raises BundleError, too, where they have to be fetched first."""
    place = weights_place(name)
    if not place.is_file() and large_file(name):
        raise BundleError(name, "its weights are not on this machine", f"fetch them once, with `uad fetch {name}`")
    return place


def large_file(name: str) -> dict[str, str] | None:
    """What is said of weights that a wheel leaves out: path, url, hash_val (sha256), hash_type. Raises BundleError."""
    place = folder_of(name) / LARGE_FILES
    if not place.is_file():
        return None
    try:
        (file,) = json.loads(place.read_text(encoding="utf-8"))["large_files"]
        if (file["path"], file["hash_type"]) != (WEIGHTS, "sha256") or not re.fullmatch(
            "[0-9a-f]{64}", file["hash_val"]
        ):
            raise ValueError(file)
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(place, "does not say which weights belong here", "install the bundle again") from error
    return file


def bundle_root(name: str) -> str:
    """The folder of a bundle, from wherever one of its configs is run.

    Looks at the bundle that this package was exported into, at the working directory, its parent and `sys.path` (where
    `monai.bundle run` puts the folder of the config it was given), then at `bundle_folders`. Raises BundleError.
    """
    candidates = [
        Path(__file__).resolve().parents[2],
        Path.cwd(),
        Path.cwd().parent,
        *map(Path, sys.path),
        *(folder / name for folder in bundle_folders()),
    ]
    for folder in candidates:
        if _is_bundle(folder, name):
            return str(folder.resolve())
    raise BundleError(name, "no such bundle here", "run from the bundle's folder", bundle_root="FOLDER")


def _is_bundle(folder: Path, name: str) -> bool:
    metadata = folder / "configs" / "metadata.json"
    try:
        return json.loads(metadata.read_text(encoding="utf-8")).get("name") == name
    except (OSError, ValueError, AttributeError):
        return False


def available_bundles() -> list[str]:
    """Keys of the bundles of the user and of this repository, or of the wheel that it was installed from."""
    places = (place for folder in bundle_folders() for place in folder.glob("*/configs/metadata.json"))
    return sorted({place.parent.parent.name for place in places})


def metadata(name: str) -> dict[str, Any]:
    """The `metadata.json` of a bundle. Raises BundleError."""
    return json.loads((folder_of(name) / "configs" / "metadata.json").read_text(encoding="utf-8"))


def describe_bundle(name: str) -> dict[str, Any]:
    """What a user chooses a bundle by. Raises BundleError."""
    about, weights = metadata(name), weights_place(name)
    keys = ("title", "modalities", "space", "run_time", "weights_license", "version")
    size = {"weights_mb": round(weights.stat().st_size / 1e6, 1) if weights.is_file() else None}
    return {"key": name, **{key: about[key] for key in keys}, **size}


def load_workflow(name: str, configs: list[str], workflow_type: str = "infer", **override: Any) -> ConfigWorkflow:
    """A bundle's configs as MONAI's workflow, not yet initialised. Raises BundleError.

    Args:
        configs: names in the bundle's `configs`, merged in this order.
        override: config items by their id. MONAI evaluates text that begins with "$": never pass a file name as it is.
    """
    from monai.bundle import ConfigWorkflow

    root = folder_of(name)
    if workflow_type == "infer":
        override.setdefault("weights", str(weights_of(name)))
    return ConfigWorkflow(
        config_file=[str(root / "configs" / config) for config in configs],
        meta_file=str(root / "configs" / "metadata.json"),
        logging_file=False,
        workflow_type=workflow_type,
        bundle_root=str(root),
        **override,
    )


def split_settings(text: str) -> tuple[str, list[str]]:
    """`NAME[:ITEM=VALUE,...]` as the name and its ITEM=VALUE parts, for `parse_items`."""
    name, _, rest = text.partition(":")
    return name, [part for part in re.split(r",(?![^\[]*\])", rest) if part]


def parse_items(texts: Iterable[str]) -> dict[str, Any]:
    """Config items from `id=value`; a value is JSON, or else text. Raises SettingError."""
    items = {}
    for text in texts:
        item, equals, value = text.partition("=")
        if not (item and equals):
            raise SettingError(text, "is not ITEM=VALUE", "write, for example, network_def::smoothing_vox=1")
        try:
            items[item] = json.loads(value)
        except ValueError:
            items[item] = value
    return items


def check_items(parser: ConfigParser, items: Iterable[str]) -> None:
    """Raises SettingError for an item that neither is in a config nor can be a new argument of an object there."""
    for item in items:
        if not _has_place(parser, item):
            raise SettingError(item, "the bundle's configs have no such item", "see its configs/inference.json")


def _has_place(parser: ConfigParser, item: str) -> bool:
    """Whether a config has an item, or the object that it would be a new argument of."""
    try:
        return (item.rpartition("::")[0] or item) in parser
    except ValueError:  # below an item that is no object but refers to one
        return False


def checked_items(name: str, texts: Iterable[str]) -> dict[str, Any]:
    """`parse_items` for the inference of a bundle. Raises SettingError or BundleError."""
    items = parse_items(texts)
    check_inference_items(name, items)
    return items


def check_inference_items(name: str, items: Iterable[str]) -> None:
    """`check_items` for the inference of a bundle. Raises SettingError or BundleError."""
    from monai.bundle import ConfigParser

    parser = ConfigParser()
    parser.read_config(str(folder_of(name) / "configs" / "inference.json"))
    check_items(parser, items)


def run_inference(name: str, configs: list[str], **override: Any) -> None:
    """Run the evaluator of a bundle's configs, in this process. Raises UADError where an input is to blame."""
    from ignite.engine import Events

    from .images.check import typed_errors

    with typed_errors():
        workflow = load_workflow(name, configs, **override)
        workflow.initialize()
        evaluator = workflow.parser.get_parsed_content("evaluator")
        with Progress(len(evaluator.data_loader)) as progress:
            evaluator.add_event_handler(Events.GET_BATCH_COMPLETED, lambda: progress.begin(f"case {progress.done + 1}"))
            evaluator.add_event_handler(Events.ITERATION_COMPLETED, progress.end)
            evaluator.run()


def fitting_items(name: str, configs: Sequence[str], items: Mapping[str, Any] | Iterable[str]) -> dict[str, Any]:
    """Those of some items that `check_items` lets pass for a bundle's configs. Raises BundleError."""
    from monai.bundle import ConfigParser

    parser = ConfigParser()
    parser.read_config([str(folder_of(name) / "configs" / config) for config in configs])
    given = dict(items) if isinstance(items, Mapping) else dict.fromkeys(items)
    return {item: value for item, value in given.items() if _has_place(parser, item)}


def run_training(
    name: str,
    cohort: Path,
    output_dir: Path,
    cache: Path | None = None,
    processes: int = 1,
    overlays: Sequence[str] = (),
    items: Mapping[str, Any] | None = None,
) -> Path:
    """Run the stages of a bundle's training in their order, then its calibration; return the weights.

    A stage that was interrupted goes on from its last epoch; one that is finished is not run again.

    Raises UADError where an input is to blame.

    Args:
        cache, processes: `cache_dir` and `processes` of the datasets, see `SliceDataset`.
        overlays: configs of the bundle that are read over the others in all stages, such as `paper.json`.
        items: other values of items, in those stages whose configs have them.
    """
    from .images.check import typed_errors

    paths = {"cohort": str(cohort.resolve()), "output_dir": str(output_dir.resolve())}
    cached = {}
    if cache is not None:
        Inputs(cohort_files(cohort)).check([cache])
        given = {"cache_dir": str(cache.resolve()), "processes": processes}
        cached = {f"{part}::dataset::{key}": value for part in ("train", "validate") for key, value in given.items()}
    weights = output_dir / "model.pt"
    stages = {
        ("train.json", "train_autoencoder.json"): output_dir / "model_autoencoder.pt",
        ("train.json", "train_gan.json"): output_dir / "model_gan.pt",
        ("train.json",): weights,
    }
    checkpoints = [output_dir / "autoencoder", output_dir / "gan", output_dir / "checkpoints"]
    Inputs(cohort_files(cohort)).check([*checkpoints, *stages.values()])
    for result, folder in zip(stages.values(), checkpoints, strict=True):
        check_file(result, any(folder.glob("checkpoint_epoch=*.pt")), f"of a training with checkpoints in {folder}")
    with typed_errors():
        for configs, result in stages.items():
            if (folder_of(name) / "configs" / configs[-1]).is_file() and not result.is_file():
                chosen = [*configs, *overlays]
                changed = fitting_items(name, chosen, items or {})
                workflow = load_workflow(name, chosen, "train", **paths, **cached, **changed)
                workflow.initialize()
                workflow.run()
    chosen = ["inference.json", "calibrate.json", *overlays]
    changed = fitting_items(name, chosen, items or {})
    run_inference(name, chosen, weights=str(weights.resolve()), **paths, **changed)
    return weights
