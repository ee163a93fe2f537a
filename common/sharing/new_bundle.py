"""The folder of a new method's bundle, from the nearest one: what all bundles share is there, the rest says TODO."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from .. import bundle
from ..errors import SettingError
from .archive import PARTS, write_folder

TODO = "TODO"
OF_THE_METHOD = ("title", "description", "run_time", "references")  # of the metadata
SECTIONS = ("Input", "Commands", "License")  # of the model card, which are no claim about the method
END = "\n```\n"  # of the commands, after which more is said of the numbers of the method
CONFIG = re.compile(r"configs/(inference|(multi_gpu_)?train|train_(autoencoder|gan)|calibrate|evaluate|metadata)\.json")
COLUMNS = 120


def new_bundle(key: str, like: str, folder: Path) -> Path:
    """Copy the bundle `like` as `folder/key`, without its weights and without what it says of its method.

    Its configs, licences and the sections of its card that hold for the new one come along, with `key` for `like`; they
    still name the networks of `like`. Configs of its paper stay behind. Raises BundleError, SettingError, OutputError.
    """
    root = bundle.folder_of(like)
    if not re.fullmatch(r"[a-z][a-z0-9_]*", key):
        raise SettingError(key, "cannot name a bundle", "use small letters, digits and _")
    name = re.compile(rf"(?<![\w.]){re.escape(like)}(?!\w)")  # not common.methods.LIKE
    files = {}
    for path in sorted(root.rglob("*")):
        place = path.relative_to(root).as_posix()
        if path.is_dir() or place.split("/")[0] not in PARTS or path.suffix == ".pt":
            continue
        text = name.sub(key, path.read_text(encoding="utf-8"))
        if CONFIG.fullmatch(place):
            about = place.endswith("metadata.json")
            text = json_layout(_unclaimed(json.loads(text)) if about else json.loads(text)) + "\n"
        elif path.suffix == ".json":
            continue
        files[place] = (_card(text) if place == "docs/README.md" else text).encode()
    return write_folder(files, folder / key)


def _unclaimed(about: dict[str, Any]) -> dict[str, Any]:
    """Metadata without what is said of the method."""
    return about | {item: [TODO] if isinstance(about[item], list) else TODO for item in OF_THE_METHOD}


def _card(text: str) -> str:
    """A model card with all headings, and the sections that stay."""
    head, *sections = re.split(r"^## ", text, flags=re.MULTILINE)
    front = re.sub("^license: .*", f"license: {TODO}", head[: head.rindex("---\n") + 4], flags=re.MULTILINE)
    kept = [s if s.startswith(SECTIONS) else f"{s.splitlines()[0]}\n\n{TODO}\n\n" for s in sections]
    kept = [f"{s.partition(END)[0]}{END}\n" if END in s else s for s in kept]
    return "## ".join([f"{front}\n# {TODO}\n\n", *kept])


def json_layout(value: Any, indent: int = 0, lead: int = 0) -> str:
    """The one layout of the JSON of bundles, without the newline at the end.

    What fits in 120 columns is one line; else an item is, which short ones (at the top: plain values) share.
    """
    flat = json.dumps(value, ensure_ascii=False)
    if not value or not isinstance(value, (dict, list)) or (indent and indent + lead + len(flat) < COLUMNS):
        return flat
    lines: list[str] = []
    shared = False
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        name = f"{json.dumps(key)}: " if isinstance(value, dict) else ""
        text = f"{name}{json_layout(item, indent + 4, len(name))},"
        plain = not isinstance(item, (dict, list)) and str(item)[:1] not in "$@"
        short = len(json.dumps(item)) <= 40 if indent else plain
        if short and shared and len(f"{lines[-1]} {text}") <= COLUMNS:
            lines[-1] += f" {text}"
        else:
            lines.append(" " * (indent + 4) + text)
        shared = short
    brackets = "{}" if isinstance(value, dict) else "[]"
    return "\n".join([brackets[0], *lines])[:-1] + "\n" + " " * indent + brackets[1]
