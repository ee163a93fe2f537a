"""Bundles as folders of data: where they are, and how one is run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from monai.bundle import ConfigWorkflow

from .errors import BundleError
from .transforms.check import root_cause

BUNDLES_DIR = Path(__file__).resolve().parent.parent / "bundles"


def bundle_root(name: str) -> str:
    """The folder of a bundle, from wherever one of its configs is run.

    Looks at the working directory, its parent and `sys.path` (where `monai.bundle run` puts the folder of the config it
    was given), then at this repository. Raises BundleError.
    """
    candidates = [Path.cwd(), Path.cwd().parent, *map(Path, sys.path), BUNDLES_DIR / name]
    for folder in candidates:
        if _is_bundle(folder, name):
            return str(folder.resolve())
    raise BundleError(name, "no such bundle here", "run from the bundle's folder or give --bundle_root")


def _is_bundle(folder: Path, name: str) -> bool:
    metadata = folder / "configs" / "metadata.json"
    try:
        return json.loads(metadata.read_text(encoding="utf-8")).get("name") == name
    except (OSError, ValueError, AttributeError):
        return False


def available_bundles() -> list[str]:
    """Keys of the bundles of this repository."""
    return sorted(path.parent.parent.name for path in BUNDLES_DIR.glob("*/configs/metadata.json"))


def run_inference(name: str, configs: list[str], **override: Any) -> None:
    """Run the evaluator of a bundle's configs, in this process. Raises UADError where an input is to blame.

    Args:
        configs: names in the bundle's `configs`, merged in this order.
        override: config items by their id.
    """
    if name not in available_bundles():
        raise BundleError(name, "no such bundle", f"choose one of {', '.join(available_bundles())}")
    root = BUNDLES_DIR / name
    try:
        workflow = ConfigWorkflow(
            config_file=[str(root / "configs" / config) for config in configs],
            meta_file=str(root / "configs" / "metadata.json"),
            logging_file=False,
            workflow_type="infer",
            bundle_root=str(root),
            **override,
        )
        workflow.initialize()
        workflow.parser.get_parsed_content("evaluator").run()
    except Exception as error:
        cause = root_cause(error)
        if cause is error:
            raise
        raise cause from None
