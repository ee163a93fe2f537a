"""The papers' tables, one command each: cohorts, trainings, calibration, evaluation by the paper's own protocol.

Everything lies below the output folder under a name that says what it was made with, so that a run goes on where an
earlier one stopped, and tables that need the same networks share them.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import torch
from matplotlib.figure import Figure
from monai.bundle import ConfigParser

from ..bundle import BUNDLES_DIR, fitting_items, folder_of, metadata, run_inference, run_training, weights_of
from ..cohorts.joined import join_cohorts
from ..cohorts.kinds import KINDS
from ..errors import BundleError, CohortError, SettingError
from ..files import replacing
from ..outputs import Inputs, check_file
from ..recorded import digest_of
from ..weights import weights_sha256
from .evaluation import write_result
from .prepare import prepare_cohort
from .recipes import Networks, Part, Recipe, Training, recipe
from .variants import Variant

FIRST_LINE = "# {title}\n"
STAGE = ("train.json",)  # whose items may be set


@dataclass(frozen=True)
class Reproduction:
    """A recipe with where it reads and writes, and how its networks are made.

    Args:
        name: of the recipe.
        data: folder of the data sets, each in the folder that the recipe names.
        output: folder of everything that is made.
        networks: see `Networks`.
        strip: how brains are found in heads, see `BrainMaskd`.
        items: other values of items of the configs, where a config has them; `device` too.
    Raises SettingError for a recipe or items that there are not, CohortError for folders that are not there.
    """

    name: str
    data: Path
    output: Path
    networks: Networks = Networks.PAPER
    strip: str | None = None
    items: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for item in self.items:
            if not any(fitting_items(t.bundle, [*STAGE, *self.overlays(t)], {item}) for t in self.trainings.values()):
                raise SettingError(item, f"no config of {self.name} has such an item", "see the bundles' train.json")
        for training in self.trainings.values():
            if self.is_shipped and training.compact:
                shipped = ", ".join(metadata(training.bundle)["modalities"])
                fact = f"the weights that {training.bundle} ships, for {shipped}, do not fit this table"
                raise SettingError(self.name, fact, "train them: choose the networks paper or compact")

    @property
    def recipe(self) -> Recipe:
        """What the table needs."""
        return recipe(self.name)

    @property
    def trainings(self) -> Mapping[str, Training]:
        """Its networks by their keys."""
        return self.recipe.trainings

    @property
    def modalities(self) -> list[str]:
        """Of its cohorts."""
        return list(self.recipe.modalities)

    def check_data(self) -> None:
        """Raises CohortError where a folder is missing, OutputError where the output is in the data."""
        expected = f"expected in it: {', '.join(self.recipe.folders)}; see docs/data.md for the form of each"
        if not self.data.is_dir():
            raise CohortError(self.data, "no such folder", expected)
        for folder in self.recipe.folders:
            if not (self.data / folder).is_dir():
                raise CohortError(self.data / folder, "no such folder", expected)
        Inputs([self.data]).check([self.output / f"{self.name}.md"])
        is_ours = _first_line(self.output / f"{self.name}.md") == FIRST_LINE.format(title=self.recipe.title).strip()
        check_file(self.output / f"{self.name}.md", is_ours, "an earlier table")

    # --- cohorts ---

    def cohort(self, part: Part, **options: Any) -> Path:
        """The cohort CSV of a part, made where it is not there."""
        options = {**part.options, **options}
        folder = self.place("cohorts", part.kind, part.folder, kind=part.kind, folder=part.folder, options=options)
        if not (folder / "cohort.csv").is_file():
            KINDS[part.kind](data_dir=self.data / part.folder, output=folder, **_typed(part.kind, options))
        return folder / "cohort.csv"

    def joined(self, name: str, parts: Sequence[Part], splits: Sequence[str]) -> Path:
        """The cohort CSV of several parts, prepared where the recipe says so."""
        about = {"parts": [vars(part) for part in parts], "splits": splits, "prepare": self.recipe.prepare}
        path = self.place("cohorts", name, **about, strip=self.strip) / "cohort.csv"
        if self.recipe.prepare is None:
            if not path.is_file():
                join_cohorts([self.cohort(part) for part in parts], path, self.modalities, splits)
            return path
        source = path.parent / "source" / "cohort.csv"
        if not source.is_file():
            join_cohorts([self.cohort(part) for part in parts], source, self.modalities, splits)
        prepared = path.parent / "prepared"
        if failed := prepare_cohort(source, prepared, strip=self.strip, **self.recipe.prepare):
            print(f"{prepared}/status.tsv: {failed} could not be prepared and are left out")
        return prepared / "cohort.csv"

    def train_cohort(self) -> Path:
        """What is trained and calibrated on."""
        if self.recipe.sprites is not None:
            return self.sprites()[0]
        return self.joined("train", self.recipe.train, ("train", "val"))

    def test_cohorts(self) -> dict[str, Path]:
        """What is measured, by the names of the data sets."""
        return {name: self.joined(name, parts, ("test",)) for name, parts in self.recipe.tests.items()}

    def sprites(self) -> list[Path]:
        """The cohorts of the draws of the sprites, of which the first holds what is trained on, too."""
        about = self.recipe.sprites or {}
        part = Part(about["kind"], about["folder"])
        return [self.cohort(part, seed=s, test_only=bool(n or self.is_shipped)) for n, s in enumerate(about["seeds"])]

    # --- networks ---

    @property
    def is_shipped(self) -> bool:
        """Whether nothing is trained."""
        return self.networks is Networks.SHIPPED

    def overlays(self, training: Training) -> list[str]:
        """The papers' configs that are read over the bundle's."""
        return list(training.paper) if self.networks is Networks.PAPER else []

    def changes(self, training: Training) -> dict[str, Any]:
        """Items of the configs of a training."""
        by_size = training.set if self.networks is Networks.PAPER else training.compact
        return {**by_size, **self.items}

    def training_folder(self, key: str) -> Path:
        """Where a network is trained."""
        training = self.trainings[key]
        about = {"bundle": training.bundle, "overlays": self.overlays(training), "items": self.changes(training)}
        source = {
            "train": [vars(p) for p in self.recipe.train],
            "sprites": self.recipe.sprites,
            "prepare": self.recipe.prepare,
        }
        return self.place("trained", training.bundle, **about, **source, strip=self.strip)

    def is_trained(self, key: str) -> bool:
        """Whether a network and its calibration are there."""
        return self.is_shipped or (self.training_folder(key) / "trained.json").is_file()

    def weights(self, key: str) -> Path:
        """The weights of a training, which is run where it has not ended. Raises UADError."""
        training, folder = self.trainings[key], self.training_folder(key)
        if self.is_shipped:
            return weights_of(training.bundle)
        if not self.is_trained(key):
            cohort = self.train_cohort()
            overlays, items = self.overlays(training), self.changes(training)
            run_training(training.bundle, cohort, folder, overlays=overlays, items=items)
            write_result({"bundle": training.bundle, "items": self.changes(training)}, folder / "trained.json")
        return folder / "model.pt"

    # --- results ---

    def result(self, row: Mapping[str, Any], column: Mapping[str, str], tests: Mapping[str, Path]) -> Path:
        """The result of a row on the test set of a column, measured where it is not there."""
        key, test = column.get("training") or row["training"], column.get("test") or next(iter(tests))
        training, weights = self.trainings[key], self.weights(key)
        configs, items = ["inference.json", "evaluate.json"], {**self.changes(training), **row["set"]}
        made = weights_sha256(weights) if self.is_shipped else self.training_folder(key).name
        about = {"weights": made, "networks": self.networks, "test": test, "items": items}
        path = self.place("results", training.bundle, **about).with_suffix(".json")
        if not path.is_file():
            configs += self.overlays(training)
            path.parent.mkdir(parents=True, exist_ok=True)
            fitting = fitting_items(training.bundle, configs, items)
            paths = {
                "cohort": str(tests[test].resolve()),
                "result": str(path.resolve()),
                "weights": str(weights.resolve()),
            }
            run_inference(training.bundle, configs, **paths, **fitting, **{"task::baselines": False})
        return path

    def place(self, *names: str, **about: Any) -> Path:
        """A folder whose name ends in a digest of what its content depends on."""
        *folders, last = (name.replace(" ", "_") for name in names)
        said = json.loads(json.dumps({**about, "data": str(self.data.resolve())}, default=dict))
        return Path(self.output, *folders, f"{last}-{digest_of(said)}")

    def cells(self, tests: Mapping[str, Path]) -> dict[str, list[float | None]]:
        """The numbers of each row; None where a protocol has no slice to measure."""
        table = {}
        for name, row in self.recipe.rows.items():
            found = [
                number(self.result(row, column, tests), column["metric"]) for column in self.recipe.columns.values()
            ]
            values = [value if value is None or not self.recipe.percent else 100 * value for value in found]
            known = [value for value in values if value is not None]
            table[name] = [*values, float(np.mean(known)) if known else None] if self.recipe.mean else values
        return table


def reproduce(plan: Reproduction) -> Path:
    """Make a table, whatever of it is not there yet, and return its Markdown file. Raises UADError."""
    plan.check_data()
    path = plan.output / f"{plan.name}.md"
    if plan.recipe.sprites is not None:
        text = sprite_table(plan)
    else:
        tests = plan.test_cohorts()
        cells = plan.cells(tests)
        text = markdown(plan.recipe, cells)
        if plan.recipe.curve is not None:
            draw_curve(plan, cells)
    made = {"paper": "trained with the paper's configs", "compact": "trained compactly", "shipped": "as shipped"}
    about = f"{FIRST_LINE.format(title=plan.recipe.title)}\n{plan.recipe.note} Networks: {made[plan.networks]}.\n\n"
    with replacing(path) as temporary:
        temporary.write_text(about + text + "\n", encoding="utf-8")
    return path


def steps(plan: Reproduction) -> list[str]:
    """What would be done, a line each, and the rough hours on a GPU."""
    one = plan.recipe
    lines = [f"data: {plan.data / folder}" for folder in one.folders]
    if one.prepare:
        lines.append(f"prepare: {one.prepare['spacing_mm']} mm{', in MNI152' if one.prepare['register'] else ''}")
    for key, training in one.trainings.items():
        configs = " + ".join(["train.json", *plan.overlays(training)])
        hours = f", about {training.gpu_hours:g} h on a GPU" if plan.networks is Networks.PAPER else ""
        done = "done" if plan.is_trained(key) else f"{configs}{hours}"
        lines.append(f"train: {training.bundle} ({key}): {'weights as shipped' if plan.is_shipped else done}")
    lines += [f"measure: {row}" for row in one.rows]
    lines.append(f"table: {plan.output / plan.name}.md")
    if plan.networks is Networks.PAPER:
        lines.append(f"about {one.gpu_hours:g} h on a GPU in all, a rough estimate")
    return lines


def markdown(one: Recipe, cells: Mapping[str, Sequence[float | None]]) -> str:
    """Our rows, and below them the paper's."""
    columns = [*one.columns, *(["mean"] if one.mean else [])]

    def line(name: str, values: Sequence[float | None], form: str) -> str:
        return f"| {name} | {' | '.join('-' if value is None else f'{value:{form}}' for value in values)} |"

    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    lines += [line(name, values, ".1f" if one.percent else ".3f") for name, values in cells.items()]
    return "\n".join([*lines, *(line(f"paper: {name}", values, "g") for name, values in one.printed.items())])


def number(path: Path, metric: str) -> float | None:
    """A number of a result by its path. Raises BundleError where the result has none of this name."""
    value: Any = json.loads(path.read_text(encoding="utf-8"))
    for name in metric.split("::"):
        if value is None:
            return None
        if name not in value:
            raise BundleError(path, f"no {metric} in the result", "remove it and measure anew")
        value = value[name]
    return value


def sprite_table(plan: Reproduction) -> str:
    """The table of `scripts/evaluate_sprites.py`, whose rows are kept one by one; `NAME.json` holds its numbers."""
    sprites, device = script("evaluate_sprites"), "cuda" if torch.cuda.is_available() else "cpu"
    cohorts = [path.parent for path in plan.sprites()]

    def measured(row: Mapping[str, Any]) -> dict[str, Any]:
        path, variant = sprite_row(plan, row)
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_result(sprites.measure(variant, cohorts, device, with_score=row.get("score", True)), path)
        return dict(json.loads(path.read_text(encoding="utf-8")))

    result = sprites.record(cohorts, [measured(row) for row in plan.recipe.rows.values()], device)
    write_result(result, plan.output / f"{plan.name}.json")
    return str(sprites.table(result["rows"]))


def sprite_row(plan: Reproduction, row: Mapping[str, Any]) -> tuple[Path, Variant]:
    """Where a row of it is kept, and what is measured."""
    training, weights = plan.trainings[row["training"]], plan.weights(row["training"])
    config = merged_config(plan, training, row["training"])
    items = {"weights": str(weights.resolve()), **row["set"]}
    text = f"{config}:{','.join(f'{item}={value}' for item, value in items.items())}"
    about = {"row": row, "sprites": plan.recipe.sprites, "config": config.parts[-3], "made": weights_sha256(weights)}
    path = plan.place("results", training.bundle, **about).with_suffix(".json")
    return path, Variant.parse(text)


def merged_config(plan: Reproduction, training: Training, key: str) -> Path:
    """The bundle's inference.json with what the training changes, as a file of its own."""
    folder = folder_of(training.bundle) / "configs"
    configs = ["inference.json", *plan.overlays(training)]
    parser = ConfigParser()
    parser.read_config([str(folder / config) for config in configs])
    for item, value in fitting_items(training.bundle, configs, plan.changes(training)).items():
        parser[item] = value
    path = plan.place("configs", key, content=parser.config) / training.bundle / "inference.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(parser.config, indent=2), encoding="utf-8")
    return path


def draw_curve(plan: Reproduction, cells: Mapping[str, Sequence[float | None]]) -> None:
    """`NAME.png`: a column of the rows `masked, L = .., P = ..` over P, a line for each L."""
    index = list(plan.recipe.columns).index((plan.recipe.curve or {})["column"])
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.add_subplot(xlabel="P", ylabel=list(plan.recipe.columns)[index])
    points: dict[int, list[tuple[float, float]]] = {}
    for name, values in cells.items():
        setting, value = plan.recipe.rows[name]["set"], values[index]
        if {"L", "P"} <= setting.keys() and value is not None:
            points.setdefault(setting["L"], []).append((setting["P"], value))
    for level, pairs in points.items():
        axes.plot(*zip(*sorted(pairs), strict=True), marker="o", label=f"L = {level}")
    axes.legend()
    with replacing(plan.output / f"{plan.name}.png") as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def script(name: str) -> Any:
    """A measuring script of the repository as a module. Raises BundleError where this is not the repository."""
    path = BUNDLES_DIR.parent / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise BundleError(path, "no such script beside the bundles", "run from a copy of the repository")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _typed(kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a kind of cohort as its function takes them: names of layouts become what they name."""
    hints = get_type_hints(KINDS[kind].__wrapped__)  # type: ignore[attr-defined]
    return {name: hints[name](value) if isinstance(value, str) else value for name, value in options.items()}


def _first_line(path: Path) -> str:
    return path.read_text(encoding="utf-8").partition("\n")[0] if path.is_file() else ""
