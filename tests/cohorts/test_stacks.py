"""The record of which image is which slice of a stack."""

from __future__ import annotations

import csv

from common.cohorts.stacks import write_places


def test_places_are_written_in_their_order(tmp_path):
    names = {"b": ["two, too.jpeg", "one.jpeg"], "a": ["three.jpeg"]}
    write_places(tmp_path / "places.csv", names)
    with (tmp_path / "places.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["subject", "slice", "name"],
        ["b", "0", "two, too.jpeg"],
        ["b", "1", "one.jpeg"],
        ["a", "0", "three.jpeg"],
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["places.csv"]
