"""What an error advises is what its reader can do: the same error names the settings of each road in its own words."""

from __future__ import annotations

import ast
import inspect
import pickle
import re
from pathlib import Path
from pydoc import locate

import pytest
import typer
from monai.bundle import ConfigParser

import common
from common import cli
from common.bundle import BUNDLES_DIR
from common.errors import ITEMS, BundleError, SkullStripError, first_few, one_line, settings_said_as

PACKAGE = Path(common.__file__).parent
OPTION = re.compile(r"\s--[a-z]")


def head():
    return SkullStripError("head.nii.gz", "not stripped", "skull-strip it first", strip="atlas", brain_mask="MASK")


def test_each_road_says_what_it_has():
    assert str(head()).endswith("first, or give --preprocessing::strip atlas, or give --dataset::data::brain MASK")
    with settings_said_as({"strip": "set strip: {} in app.yaml"}):
        assert str(head()) == "head.nii.gz: not stripped; skull-strip it first, or set strip: atlas in app.yaml"
    with settings_said_as({}):
        assert head().remedy == "skull-strip it first"
    assert str(pickle.loads(pickle.dumps(head()))) == str(head())  # noqa: S301 - ours


@pytest.mark.parametrize(
    ("count", "said"), [(1, "a"), (3, "a, b, c"), (4, "a, b, c and 1 more"), (9, "a, b, c and 6 more")]
)
def test_of_many_names_the_first_few_are_said(count, said):
    assert first_few(list("abcdefghi")[:count]) == said


ROOT = typer.main.get_command(cli.app)


def commands(group=ROOT, names=()):
    """All commands of `uad`, each with what is typed."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*names, name))
        else:
            yield pytest.param((*names, name), command, id="-".join((*names, name)))


@pytest.mark.parametrize(("typed", "command"), commands())
def test_command_advises_its_own_options(typed, command, monkeypatch):
    """`uad evaluate`, for example, strips skulls, but takes no mask."""
    said = []
    options = {option for parameter in command.params for option in parameter.opts}
    monkeypatch.setattr(command, "callback", lambda **_: said.append(head().remedy))
    monkeypatch.setattr(command, "params", [parameter for parameter in command.params if not parameter.required])
    ROOT.main(list(typed), standalone_mode=False)
    advice = ["skull-strip it first"]
    advice += ["give --strip atlas"] * ("--strip" in options) + ["give --brain-mask MASK"] * ("--brain-mask" in options)
    assert said == [", or ".join(advice)]


def test_items_are_arguments_of_what_the_configs_make():
    config = ConfigParser()
    config.read_config(BUNDLES_DIR / "dae" / "configs" / "inference.json")
    for words in (words for setting, words in ITEMS.items() if setting != "items"):
        place, _, name = words.split()[1].removeprefix("--").rpartition("::")
        known = inspect.signature(locate(config[place]["_target_"])).parameters if place else config
        assert name in known


def sentences(path):
    """Texts of a module that are no docstrings and no help of a command."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("typer."):
            node.keywords = []
        is_doc = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).endswith("__doc__")
        if is_doc or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            node.value = ast.Constant(None)
    return [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_error_names_an_option(path):
    if path.name in ("cli.py", "cli_bundles.py", "papers.py", "errors.py"):
        pytest.skip("where options are named")
    assert [text for text in sentences(path) if OPTION.search(f" {text}") and " " in text] == []


def test_one_line_ends_with_the_message_of_a_typed_error_and_lets_others_pass():
    @one_line
    def command(error):
        """What it does."""
        if error is not None:
            raise error
        return 3

    assert (command(None), command.__doc__) == (3, "What it does.")
    with pytest.raises(SystemExit) as end:
        command(BundleError("dae", "no weights", "train it"))
    assert end.value.code == "BundleError: dae: no weights; train it"
    with pytest.raises(KeyError):
        command(KeyError("a"))
