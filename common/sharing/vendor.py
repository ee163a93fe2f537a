"""The part of this package that a bundle's configs need, as `scripts/_common` of a bundle that stands alone.

MONAI puts the folder of the bundle that it runs on `sys.path`, so its `scripts` are importable. MONAI Label serves
several bundles in one process and forgets only `scripts` between them: hence no package `_common` beside it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from pydoc import locate

from ..bundle import INSTALLED
from ..errors import BundleError

PACKAGE = Path(__file__).resolve().parents[1]
STANDALONE = "scripts._common"

NAMED = re.compile(r"(?<![\w.@])common(?=\.[A-Za-z_])|(?<=\bfrom )common(?= import\b)|(?<=\bimport )common\b")
DOTTED = re.compile(rf"(?:{NAMED.pattern})((?:\.\w+)*)")
IMPORTED = re.compile(r"\bfrom common([\w.]*) import ([\w ,]+)")

Module = tuple[str, ...]  # its name below the package: ("methods", "dae"), () for the package itself


def is_config(place: str) -> bool:
    """Whether a file of a bundle, by its path in it, may name Python."""
    is_text = place.startswith("configs/") and place.endswith((".json", ".yaml", ".yml"))
    return is_text and place != "configs/metadata.json"


def standalone_config(config: bytes) -> bytes:
    """The text of a config with `scripts._common` for `common`: in `_target_`, in expressions and in imports."""
    return NAMED.sub(STANDALONE, config.decode()).encode()


def bundle_config(config: bytes) -> bytes:
    """The inverse of `standalone_config`."""
    return config.decode().replace(STANDALONE, "common").encode()


def named_modules(config: bytes, source: object) -> set[Module]:
    """What a config names of this package, (package, ..., module, class). Raises BundleError where there is no such.

    source: for the message.
    """
    text = config.decode()
    names = {tuple(match[1].split(".")[1:]) for match in DOTTED.finditer(text)}
    for match in IMPORTED.finditer(text):
        names |= {(*match[1].split(".")[1:], name.split()[0]) for name in match[2].split(",")}
    for name in sorted(names):
        if locate(".".join((PACKAGE.name, *name))) is None:
            fact = f"names common.{'.'.join(name)}, which this version does not have"
            raise BundleError(source, fact, "correct it, or use the version that it was made with")
    return names


def vendored_files(configs: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files of this package that configs need, by their paths in it: modules, packages, and data.

    Relative imports are followed without running anything, those inside functions too. A file of data is needed if one
    of the configs or modules names it, and then its folder's licence. Raises BundleError.
    """
    waiting = [name for source, config in configs.items() for name in named_modules(config, source)]
    found: dict[Path, bytes] = {}
    while waiting:
        name = waiting.pop()
        for length in range(len(name) + 1):  # the packages that it is in, and itself
            path = _file(name[:length])
            if path is not None and path not in found:
                found[path] = path.read_bytes()
                waiting += _imports(ast.parse(found[path]), path.relative_to(PACKAGE).parent.parts)
    texts = b"\n".join([*configs.values(), *found.values()])
    for path in PACKAGE.rglob("*"):
        if INSTALLED in path.parents:  # the bundles of a wheel are no part of the code
            continue
        if path.suffix not in {"", ".py", ".pyc"} and path.name.encode() in texts:
            for needed in (path, *path.parent.glob("LICENSE*")):
                found[needed] = needed.read_bytes()
    return {path.relative_to(PACKAGE).as_posix(): content for path, content in found.items()}


def _file(name: Module) -> Path | None:
    base = PACKAGE.joinpath(*name)
    candidates = (base / "__init__.py", base.with_name(f"{base.name}.py"))
    return next((path for path in candidates if path.is_file()), None)


def _imports(tree: ast.Module, package: Module) -> Iterator[Module]:
    """What a module of a package imports from this one; names of classes and functions are among them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            for alias in node.names:
                yield (*base, *(node.module.split(".") if node.module else ()), alias.name)
