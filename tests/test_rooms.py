"""The rooms of the package, folders and the modules beside them, import from lower ones only: none is in a circle."""

from __future__ import annotations

import ast
from pathlib import Path

import common

ROOT = Path(common.__file__).parent
ORDER = (  # from the lowest to the highest
    *("__init__", "errors", "progress", "devices", "files", "outputs", "type_check", "recorded", "locks", "images"),
    *("weights", "networks"),
    *("diffusion", "detection", "methods", "transforms", "cohorts", "metrics", "results", "report", "bundle"),
    *("workflows", "sharing", "api", "options", "papers", "bids_app", "console", "cli_bundles", "cli", "__main__"),
)


def imports(path, root):
    """(line, room) of each import from this package in one of its files."""
    package = [root.name, *path.relative_to(root).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        above = []
        if isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            above += node.module.split(".") if node.module else []
        for alias in node.names if isinstance(node, (ast.Import, ast.ImportFrom)) else ():
            first, room, *_ = [*above, *alias.name.split("."), "__init__"]
            if first == root.name:
                yield node.lineno, room if room in ORDER else "__init__"


def upward(root):
    """The imports that go up, one line each. The package's own `__init__` shows what others hold."""
    for path in sorted(root.rglob("*.py")):
        room = path.relative_to(root).with_suffix("").parts[0]
        for line, target in imports(path, root) if room != "__init__" else ():
            if ORDER.index(target) > ORDER.index(room):
                yield f"{path.relative_to(root)}:{line} imports {target}"


def test_every_room_has_its_place():
    assert {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/*.py")} == {*ORDER}


def test_no_import_goes_up():
    assert list(upward(ROOT)) == []


def test_an_import_that_goes_up_is_found(tmp_path):
    room = tmp_path / "common" / "images"
    room.mkdir(parents=True)
    (tmp_path / "common" / "cli.py").write_text("from .errors import UADError\nfrom common.images import check\n")
    lines = [
        "from ..errors import UADError",
        "from .. import cli",
        "from ..bundle import a",
        "import common.cli",
        "import os",
    ]
    (room / "a.py").write_text("\n".join([*lines, "def f():", "    from common.cli import app"]))
    found = [2, 3, 4, 7]
    assert [int(line.split(":")[1].split()[0]) for line in upward(tmp_path / "common")] == found
