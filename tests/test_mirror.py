"""Each module of the package has a file of tests of its own name, in the folder of its room."""

from __future__ import annotations

from pathlib import Path

import common

TESTS = Path(__file__).parent
ROOT = Path(common.__file__).parent
OTHERWISE = {  # tested elsewhere, and why
    "cohorts/options.py": "declares what the commands of all kinds of cohorts share: cohorts/test_kinds.py runs them",
}


def without_test(root, tests):
    """Modules, by their path in the package, that have no file of tests of their name."""
    modules = [path.relative_to(root) for path in root.rglob("*.py") if not path.name.startswith("__")]
    return {path.as_posix() for path in modules if not (tests / path.with_name(f"test_{path.name}")).exists()}


def test_every_module_has_its_tests():
    assert without_test(ROOT, TESTS) == OTHERWISE.keys()


def test_every_folder_of_tests_is_a_room_or_says_what_else_it_is():
    rooms = {path.parent.name for path in ROOT.glob("*/*.py")}
    others = {"apps", "bad_inputs", "contract", "scripts"}
    # of a folder that is gone a cache may be left
    assert {path.relative_to(TESTS).parts[0] for path in TESTS.glob("*/*.py")} == rooms | others


def test_a_module_without_tests_is_found(tmp_path):
    for name in ("common/room/a.py", "common/room/b.py", "common/c.py", "common/room/__init__.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name in ("tests/room/test_a.py", "tests/test_b.py"):  # the second is not in its room
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert without_test(tmp_path / "common", tmp_path / "tests") == {"room/b.py", "c.py"}
