"""Bundles as folders of data: where they are, and how one is run."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser, ConfigWorkflow

from .cohorts.table import cohort_files
from .errors import BundleError, SettingError
from .images.check import typed_errors
from .outputs import Inputs, check_file

BUNDLES_DIR = Path(__file__).resolve().parent.parent / "bundles"


def bundle_root(name: str) -> str:
    """The folder of a bundle, from wherever one of its configs is run.

    Looks at the bundle that this package was exported into, at the working directory, its parent and `sys.path` (where
    `monai.bundle run` puts the folder of the config it was given), then at this repository. Raises BundleError.
    """
    candidates = [
        Path(__file__).resolve().parents[2],
        Path.cwd(),
        Path.cwd().parent,
        *map(Path, sys.path),
        BUNDLES_DIR / name,
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
    """Keys of the bundles of this repository."""
    return sorted(path.parent.parent.name for path in BUNDLES_DIR.glob("*/configs/metadata.json"))


def metadata(name: str) -> dict[str, Any]:
    """The `metadata.json` of a bundle of this repository. Raises BundleError."""
    if name not in available_bundles():
        raise BundleError(name, "no such bundle", f"choose one of {', '.join(available_bundles())}")
    return json.loads((BUNDLES_DIR / name / "configs" / "metadata.json").read_text(encoding="utf-8"))


def describe_bundle(name: str) -> dict[str, Any]:
    """What a user chooses a bundle by. Raises BundleError."""
    about, weights = metadata(name), BUNDLES_DIR / name / "models" / "model.pt"
    keys = ("title", "modalities", "space", "run_time", "weights_license", "version")
    size = {"weights_mb": round(weights.stat().st_size / 1e6, 1) if weights.is_file() else None}
    return {"key": name, **{key: about[key] for key in keys}, **size}


def load_workflow(name: str, configs: list[str], workflow_type: str = "infer", **override: Any) -> ConfigWorkflow:
    """A bundle's configs as MONAI's workflow, not yet initialised. Raises BundleError.

    Args:
        configs: names in the bundle's `configs`, merged in this order.
        override: config items by their id. MONAI evaluates text that begins with "$": never pass a file name as it is.
    """
    metadata(name)
    root = BUNDLES_DIR / name
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
        if (item.rpartition("::")[0] or item) not in parser:
            raise SettingError(item, "the bundle's configs have no such item", "see its configs/inference.json")


def checked_items(name: str, texts: Iterable[str]) -> dict[str, Any]:
    """`parse_items` for the inference of a bundle. Raises SettingError or BundleError."""
    items = parse_items(texts)
    check_inference_items(name, items)
    return items


def check_inference_items(name: str, items: Iterable[str]) -> None:
    """`check_items` for the inference of a bundle. Raises SettingError or BundleError."""
    metadata(name)
    parser = ConfigParser()
    parser.read_config(str(BUNDLES_DIR / name / "configs" / "inference.json"))
    check_items(parser, items)


def run_inference(name: str, configs: list[str], **override: Any) -> None:
    """Run the evaluator of a bundle's configs, in this process. Raises UADError where an input is to blame."""
    with typed_errors():
        workflow = load_workflow(name, configs, **override)
        workflow.initialize()
        workflow.parser.get_parsed_content("evaluator").run()


def fitting_items(name: str, configs: Sequence[str], items: Mapping[str, Any] | Iterable[str]) -> dict[str, Any]:
    """Those of some items that `check_items` lets pass for a bundle's configs. Raises BundleError."""
    metadata(name)
    parser = ConfigParser()
    parser.read_config([str(BUNDLES_DIR / name / "configs" / config) for config in configs])
    given = dict(items) if isinstance(items, Mapping) else dict.fromkeys(items)
    return {item: value for item, value in given.items() if _has_place(parser, item)}


def _has_place(parser: ConfigParser, item: str) -> bool:
    """Whether a config has an item, or the object that it would be a new argument of."""
    try:
        return (item.rpartition("::")[0] or item) in parser
    except ValueError:  # below an item that is no object but refers to one
        return False


def run_training(
    name: str, cohort: Path, output_dir: Path, overlays: Sequence[str] = (), items: Mapping[str, Any] | None = None
) -> Path:
    """Run the stages of a bundle's training in their order, then its calibration; return the weights.

    A stage that was interrupted goes on from its last epoch; one that is finished is not run again.
    Raises UADError where an input is to blame.

    Args:
        overlays: configs of the bundle that are read over the others in all stages, such as `paper.json`.
        items: other values of items, in those stages whose configs have them.
    """
    paths = {"cohort": str(cohort.resolve()), "output_dir": str(output_dir.resolve())}
    weights = output_dir / "model.pt"
    stages = {
        ("train.json", "train_autoencoder.json"): output_dir / "model_autoencoder.pt",
        ("train.json",): weights,
    }
    checkpoints = [output_dir / "autoencoder", output_dir / "checkpoints"]
    Inputs(cohort_files(cohort)).check([*checkpoints, *stages.values()])
    for result, folder in zip(stages.values(), checkpoints, strict=True):
        check_file(result, any(folder.glob("checkpoint_epoch=*.pt")), f"of a training with checkpoints in {folder}")
    with typed_errors():
        for configs, result in stages.items():
            if (BUNDLES_DIR / name / "configs" / configs[-1]).is_file() and not result.is_file():
                chosen = [*configs, *overlays]
                changed = fitting_items(name, chosen, items or {})
                workflow = load_workflow(name, chosen, "train", **paths, **changed)
                workflow.initialize()
                workflow.run()
    chosen = ["inference.json", "calibrate.json", *overlays]
    changed = fitting_items(name, chosen, items or {})
    run_inference(name, chosen, weights=str(weights.resolve()), **paths, **changed)
    return weights
