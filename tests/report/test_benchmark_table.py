"""A benchmark as tables and as one long CSV."""

from __future__ import annotations

import csv
import io
import json

import pytest

from common.report.benchmark_table import VOXELS, cell, csv_table, markdown_tables, protocol_cell, size_label

OF_ALL = ("Voxels", "Slices and healthy subjects", "Difference to the best")  # sections that need no threshold


@pytest.mark.parametrize(
    ("metric", "text"),
    [
        ({"value": 0.25, "ci95": [0.2, 0.3]}, "0.250 (0.200-0.300)"),
        ({"value": -0.25, "ci95": [-0.3, -0.2]}, "-0.250 (-0.300 to -0.200)"),
        ({"value": 0.25, "ci95": [0.2, 0.3], "few_subjects": 4}, "0.250 (0.200-0.300)†"),
        ({"value": 0.25, "ci95": [None, None]}, "0.250"),
        ({"value": None, "ci95": [None, None]}, "-"),
    ],
)
def test_cells(metric, text):
    assert cell(metric) == text


def test_labels_of_sizes():
    labels = [size_label(bounds) for bounds in ([0.0, 0.1], [0.1, 1.0], [1.0, 10.0], [10.0, None])]
    assert labels == ["< 0.1 ml", "0.1-1 ml", "1-10 ml", "> 10 ml"]


def test_cells_of_a_protocol():
    assert [protocol_cell(x) for x in (None, 0.25, {"mean": 0.5, "std": 0.125})] == ["-", "0.250", "0.500 ± 0.125"]


@pytest.fixture(scope="module")
def benchmark(benchmark_folder):
    return json.loads((benchmark_folder / "benchmark.json").read_text(encoding="utf-8"))


def test_every_number_of_the_csv_is_that_of_the_benchmark(benchmark):
    rows = list(csv.DictReader(io.StringIO(csv_table(benchmark))))
    of_seer = {row["metric"]: row for row in rows if row["method"] == "seer"}
    seer = next(method for method in benchmark["methods"] if method["key"] == "seer")
    for name in VOXELS:
        assert [of_seer[name][column] for column in ("value", "ci95_low", "ci95_high")] == [
            "" if x is None else str(x) for x in (seer[name]["value"], *seer[name]["ci95"])
        ]
    assert float(of_seer["seconds_per_volume"]["value"]) == seer["run_time"]["seconds_per_volume"]
    worst = seer["sites"][1]["healthy_worst_share"]["value"]
    assert float(of_seer["healthy_worst_share south"]["value"]) == worst
    assert {row["method"] for row in rows} == {method["key"] for method in benchmark["methods"]}


def test_tables_have_as_many_cells_as_columns(benchmark):
    """And a row a method; baselines stand in those that need no threshold."""
    sections = markdown_tables(benchmark).split("## ")[1:]
    assert [section.splitlines()[0] for section in sections][:3] == ["Voxels", "Slices and healthy subjects", "Sites"]
    for section in sections:
        table = [line for line in section.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in table}) == 1, section
        has_baseline = any(line.startswith("| intensity_T1 ") for line in table)
        assert has_baseline == (section.splitlines()[0] in OF_ALL), section
    assert "vae failed: no </script> weights" in markdown_tables(benchmark)
