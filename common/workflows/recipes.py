"""What each of the papers' tables needs, as `recipes.json` says it: data, trainings, rows, columns, printed numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import SettingError

RECIPES = Path(__file__).with_name("recipes.json")


class Networks(StrEnum):
    """Which networks a table is made with."""

    PAPER = "paper"  # trained with the papers' configs
    COMPACT = "compact"  # trained with the bundles' own configs
    SHIPPED = "shipped"  # those of the bundles, nothing is trained


@dataclass(frozen=True)
class Part:
    """A cohort: its kind, the folder below the data that it is made of, and the options of the kind."""

    kind: str
    folder: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Training:
    """A network: its bundle, the configs of the paper, items that are always other than there, those of a compact one.

    gpu_hours: of the paper's training on one GPU, a rough estimate of ours.
    """

    bundle: str
    paper: Sequence[str]
    set: Mapping[str, Any]
    compact: Mapping[str, Any]
    gpu_hours: float


@dataclass(frozen=True)
class Recipe:
    """A table of a paper.

    Args:
        title, note: said above it.
        train: the cohorts whose splits train and val are trained and calibrated on.
        tests: the cohorts whose split test is measured, by the names of the data sets.
        sprites: instead of both: the cohort of a folder with several seeds.
        prepare: spacing in mm, and whether everything is brought to MNI152 first; None where it is not needed.
        rows: by name the key of a training, unless a column has it, and items of the inference; of sprites also
            `score`, whether images are ranked by the method's own score too where that takes passes of its own.
        columns: by name the path of a metric in a result; the key of a training or of a test where there are several.
        percent: whether numbers are in %.
        mean: whether a last column is the mean of the others.
        printed: the paper's numbers by row, in the order of the columns.
        curve: of which bundle and column a curve over L and P is drawn.
        evaluation_gpu_hours: as those of a training.
    """

    title: str
    note: str
    modalities: Sequence[str]
    trainings: Mapping[str, Training]
    rows: Mapping[str, Mapping[str, Any]]
    percent: bool
    evaluation_gpu_hours: float
    train: Sequence[Part] = ()
    tests: Mapping[str, Sequence[Part]] = field(default_factory=dict)
    sprites: Mapping[str, Any] | None = None
    prepare: Mapping[str, Any] | None = None
    columns: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    mean: bool = False
    printed: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    curve: Mapping[str, str] | None = None

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Recipe:
        """From its JSON."""
        made = {
            "trainings": {key: Training(**training) for key, training in content["trainings"].items()},
            "train": [Part(**part) for part in content.get("train", ())],
            "tests": {name: [Part(**part) for part in parts] for name, parts in content.get("tests", {}).items()},
        }
        return cls(**{**content, **made})

    @property
    def folders(self) -> list[str]:
        """The folders below the data that it reads."""
        if self.sprites is not None:
            return [self.sprites["folder"]]
        parts = [*self.train, *(part for parts in self.tests.values() for part in parts)]
        return list(dict.fromkeys(part.folder for part in parts))

    @property
    def gpu_hours(self) -> float:
        """Of all trainings and the evaluation."""
        return sum(training.gpu_hours for training in self.trainings.values()) + self.evaluation_gpu_hours


@cache
def recipes() -> dict[str, Recipe]:
    """All of them, by name."""
    content = json.loads(RECIPES.read_text(encoding="utf-8"))
    return {name: Recipe.of(one) for name, one in content.items()}


def recipe(name: str) -> Recipe:
    """One of them. Raises SettingError."""
    if name not in recipes():
        raise SettingError(name, "no such table", f"choose one of {', '.join(recipes())}")
    return recipes()[name]
