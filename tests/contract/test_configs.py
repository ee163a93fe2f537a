"""Configs hold values, Python holds behaviour: every JSON of every bundle is linted, and the lint itself is tested."""

from __future__ import annotations

import ast
import json
import re
from pydoc import locate

import pytest
from monai.bundle import ConfigParser
from monai.bundle.config_item import ComponentLocator

from common.sharing.new_bundle import json_layout

PACKAGES = ("monai.", "torch.", "common.")
IMPORT = "$import torch"
PURE = {"bool", "dict", "float", "int", "len", "list", "max", "min", "range", "round", "str", "sum", "tuple"}
ACTIONS = re.compile(r"^_|^(load|save|hub|open|mkdir|makedirs|write.*|read.*|unlink|remove.*|rename|system|compile)$")
REFERENCE = re.compile(r"[@%][\w:#]+")
POSITION = re.compile(r"(::|#)\d")
TRAINER = "common.workflows.training.ObjectiveTrainer"
EVALUATOR = "common.workflows.training.ObjectiveEvaluator"


@pytest.fixture(scope="session")
def is_short_name():
    """Whether MONAI finds a class by its bare name."""
    locator = ComponentLocator()
    return lambda name: locator.get_component_module_name(name) is not None


def lint(item, is_short_name, at=""):
    """What is wrong in a config, one line each."""
    if isinstance(item, dict):
        faults = [fault for key, value in item.items() for fault in lint(value, is_short_name, f"{at}::{key}")]
        target = item.get("_target_")
        return faults if target is None else faults + lint_target(target, is_short_name, at)
    if isinstance(item, list):
        return [fault for i, value in enumerate(item) for fault in lint(value, is_short_name, f"{at}::{i}")]
    if not isinstance(item, str):
        return []
    if item[:1] in "@$%" and POSITION.search(item):
        return [f"{at}: refers to an item by its position in a list: {item!r}"]
    if at.startswith("::imports::"):
        return [] if item == IMPORT else [f"{at}: only {IMPORT!r} may be imported: {item!r}"]
    if item.startswith("$"):
        return lint_expression(item, at)
    return [f"{at}: an absolute path: {item!r}"] if re.match(r"[/~]|[A-Za-z]:\\|file:", item) else []


def lint_target(target, is_short_name, at):
    if "." not in target:
        return [] if is_short_name(target) else [f"{at}: MONAI knows no {target!r}"]
    if not target.startswith(PACKAGES):
        return [f"{at}: {target!r} is of none of {', '.join(PACKAGES)}"]
    return [] if locate(target) else [f"{at}: there is no {target!r}"]


def lint_expression(item, at):
    """Only references, torch, arithmetic and pure functions; no lambdas, no imports, no input or output."""
    expression = REFERENCE.sub("_reference", item[1:].strip())
    try:
        tree = ast.parse(expression, mode="eval")
    except SyntaxError:
        return [f"{at}: not an expression: {item!r}"]
    faults = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Lambda, ast.NamedExpr, ast.Await, ast.Yield, ast.YieldFrom)):
            faults.append(f"{at}: {type(node).__name__} in {item!r}")
        if isinstance(node, ast.Attribute) and ACTIONS.match(node.attr):
            faults.append(f"{at}: {node.attr!r} in {item!r}")
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id not in {"_reference", "torch"}:
            local = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            if node.id not in PURE | local:
                faults.append(f"{at}: {node.id!r} in {item!r}")
    return faults


@pytest.mark.parametrize(
    "config",
    [
        {"a": {"_target_": "os.system", "command": "ls"}},
        {"a": [{"_target_": "numpy.zeros", "shape": 3}]},
        {"a": {"_target_": "common.methods.nothing.Nothing"}},
        {"a": {"_target_": "NoSuchTransform"}},
        {"imports": ["$import os"]},
        {"imports": ["$import torch as t"]},
        {"imports": ["$__import__('os').mkdir('a')"]},
        {"a": "$lambda x: x"},
        {"a": "$open('file')"},
        {"a": "$os.path.join(@b, 'c')"},
        {"a": "$__import__('os')"},
        {"a": "$exec('1')"},
        {"a": "$eval('1')"},
        {"a": "$@folder.mkdir()"},
        {"a": "$torch.load(@weights)"},
        {"a": "$@b.__class__"},
        {"a": "$import os"},
        {"a": "/data/cohort.csv"},
        {"a": "~/cohort.csv"},
        {"a": "@train::handlers::0"},
        {"a": "$@train#handlers#0.module"},
    ],
)
def test_lint_finds(config, is_short_name):
    assert len(lint(config, is_short_name)) >= 1


@pytest.mark.parametrize(
    "config",
    [
        {"imports": ["$import torch"]},
        {"a": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')"},
        {"a": "$@output_dir + '/eval/open.pt'"},
        {"a": "$@train::trainer.run()"},
        {"a": "$@max_epochs * @epoch_length", "b": [0.5, None, True, "text", "@a"]},
        {"a": "$[2 * size for size in @sizes]"},
        {"a": {"_target_": "Invertd", "keys": "pred"}, "b": {"_target_": "torch.optim.AdamW"}},
        {"a": {"_target_": "common.transforms.pipeline.BrainPreprocessing"}, "b": "%train.json::unet"},
    ],
)
def test_lint_lets_pass(config, is_short_name):
    assert lint(config, is_short_name) == []


def test_configs_are_clean(configs, is_short_name):
    for name, config in configs.items():
        if name != "metadata.json":
            assert lint(config, is_short_name) == [], name


def with_references(config, name):
    """A config item with everything that it refers to, by id."""
    found, waiting = {}, [name]
    while waiting:
        key = waiting.pop()
        if key not in found:
            found[key] = config.get(key)
            waiting += [r[1:].split("::")[0] for r in re.findall(r"@[\w:]+", str(found[key]))]
    return found


@pytest.mark.parametrize("name", ["network_def", "preprocessing"])
def test_training_and_inference_share(name, configs):
    assert name in configs["inference.json"]
    assert with_references(configs["train.json"], name) == with_references(configs["inference.json"], name)


def test_map_is_normalised_as_it_is_calibrated(configs):
    """The threshold is of the network's normalisation, which post-processing does."""
    inference = configs["inference.json"]
    assert inference["postprocessing"].get("normalisation") == inference["network_def"].get("normalisation")


def test_papers_prepare_the_images_in_their_own_way(bundle):
    for path in (bundle / "configs").glob("paper*.json"):
        parser = ConfigParser()
        parser.read_config([path.with_name("train.json"), path])
        parser["network_def::detector"] = None  # a large one
        network, preprocessing = map(parser.get_parsed_content, ("network_def", "preprocessing"))
        numbers = {name: value for name, value in parser["preprocessing"].items() if name != "_target_"}
        assert preprocessing.preparation == numbers, path.name
        assert network.preparation_names == sorted(numbers), path.name


PAPERS = ("paper*.json", "brats2020.json", "oct2017.json")


def test_papers_train_as_they_say(bundle):
    """Where a paper's config names average, clipping and precision, every stage is trained with these."""
    for path in (path for name in PAPERS for path in (bundle / "configs").glob(name)):
        paper = json.loads(path.read_text(encoding="utf-8"))
        for stage in (bundle / "configs").glob("train*.json"):
            parser = ConfigParser()
            parser.read_config([stage.with_name("train.json"), stage, path])
            for item, name in (("trainer", "ema_decay"), ("trainer", "max_norm"), ("inferer", "bfloat16")):
                if name not in paper:
                    continue
                given = parser["train"][item]["enabled" if name == "bfloat16" else name]
                assert parser.get_parsed_content(given[1:]) == paper[name], (stage.name, path.name)


def test_workflows_name_this_bundle(configs, bundle):
    for name in ("inference.json", "train.json"):
        assert configs[name]["bundle_root"] == {"_target_": "common.bundle.bundle_root", "name": bundle.name}


def test_what_is_initialised_is_of_no_module_of_the_bundle(configs):
    """MONAI puts the folder of a bundle, with the modules of an exported one, on the path of imports after that."""
    for name, config in configs.items():
        assert '"common.' not in json.dumps(config.get("initialize", [])), name


def test_every_stage_is_trained_by_the_common_engines(configs, bundle):
    stages = [name for name in configs if name.startswith("train_")]
    for name in [*stages, "train.json"]:
        config = ConfigParser()
        config.read_config([f"{bundle}/configs/train.json", f"{bundle}/configs/{name}"])
        assert config["train"]["trainer"]["_target_"] == TRAINER, name
        assert config["train"]["trainer"]["evaluator"] == "@validate::evaluator", name
        assert config["validate"]["evaluator"]["_target_"] == EVALUATOR, name


def test_every_json_has_one_layout(bundle):
    for path in (bundle / "configs").glob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert text == json_layout(json.loads(text)) + "\n", path.name
