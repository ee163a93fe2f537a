"""The papers' configs against a table of the papers' numbers, and the page that says whose each of them is."""

from __future__ import annotations

import csv
import json
from functools import cache
from itertools import groupby
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser

from common.bundle import BUNDLES_DIR

TABLE = Path(__file__).with_name("paper_numbers.csv")
PAGE = Path(__file__).parents[2] / "docs" / "paper_configs.md"
FILES = ("paper*.json", "brats2020.json", "oct2017.json")
WHOSE = {"paper", "code", "group", "ours"}
OF_THE_IMAGES = {"spatial_dims", "in_channels", "out_channels"}  # numbers that the images leave no choice of
STAGE_1 = {"train_autoencoder", "train_gan"}


def rows():
    with TABLE.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


BY_CONFIG = {name: list(group) for name, group in groupby(rows(), key=lambda row: row["config"])}
CONFIGS = sorted(
    f"{path.parents[1].name}/{path.name}" for name in FILES for path in BUNDLES_DIR.glob(f"*/configs/{name}")
)


@cache
def parser_of(config, stage):
    bundle, name = config.split("/")
    folder = BUNDLES_DIR / bundle / "configs"
    stages = ["train.json"] if stage == "train" else ["train.json", f"{stage}.json"]
    parser = ConfigParser()
    parser.read_config([folder / file for file in (*stages, name)])
    return parser


def value_of(parser, item, expected):
    """What a config says; the formula itself where the table has one."""
    if item.endswith(" parameters"):
        with torch.device("meta"):
            return sum(p.numel() for p in parser.get_parsed_content(item.split()[0]).parameters())
    value = parser[item]
    is_reference = isinstance(value, str) and value[:1] in "$@"
    if not is_reference or str(expected).startswith("$"):
        return value
    return parser.get_parsed_content(item) if item != "lr_scheduler" else value


def numbers(config, at=""):
    """The ids of all numbers, switches and nothings of a config."""
    if isinstance(config, dict):
        return [found for key, value in config.items() for found in numbers(value, f"{at}::{key}")]
    if isinstance(config, list) and not all(isinstance(value, str) for value in config):
        return [found for index, value in enumerate(config) for found in numbers(value, f"{at}::{index}")]
    return [] if isinstance(config, (str, list)) else [at.removeprefix("::")]


def is_said(number, items):
    """Whether an item of the table is the number or holds it; stages are looked at as what they set."""
    parts = number.split("::")
    heads = {"::".join(parts[: i + 1]) for i in range(len(parts))}
    return parts[0] == "stages" or parts[-1] in OF_THE_IMAGES or bool(heads & items)


@pytest.mark.parametrize("config", CONFIGS)
def test_numbers_are_those_of_the_paper(config):
    for row in BY_CONFIG[config]:
        expected = json.loads(row["value"])
        found = value_of(parser_of(config, row["stage"]), row["item"], expected)
        assert found == expected, (row["stage"], row["item"])


@pytest.mark.parametrize("config", CONFIGS)
def test_every_number_of_a_config_is_in_the_table(config):
    bundle, name = config.split("/")
    content = json.loads((BUNDLES_DIR / bundle / "configs" / name).read_text(encoding="utf-8"))
    items = {row["item"].removesuffix(" parameters") for row in BY_CONFIG[config]}
    assert [number for number in numbers(content) if not is_said(number, items)] == []


def test_the_page_says_the_same():
    sections = {s.split("`")[1]: s for s in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]}
    assert sorted(sections) == sorted(BY_CONFIG) == CONFIGS
    for name, lines in BY_CONFIG.items():
        stage = {"train": ""} | dict.fromkeys(STAGE_1, ", stage 1")
        said = [f"| `{r['item']}`{stage[r['stage']]} | {r['value']} | {r['whose']} | {r['note']} |" for r in lines]
        assert [line for line in sections[name].splitlines() if line.startswith("| `")] == said, name
        assert {row["whose"] for row in lines} <= WHOSE


def test_a_number_that_nobody_vouches_for_is_found():
    config = {
        "level": 3,
        "unet": {"channels": [1, 2], "in_channels": 4},
        "stages": {"a": {"b": 1}},
        "name": ["T1"],
        "eta": None,
    }
    assert [n for n in numbers(config) if not is_said(n, {"level"})] == [
        "unet::channels::0",
        "unet::channels::1",
        "eta",
    ]
    assert [n for n in numbers(config) if not is_said(n, {"level", "unet", "eta"})] == []
