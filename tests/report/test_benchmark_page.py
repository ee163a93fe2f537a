"""The page of a benchmark: its tables and plots, and results that are broken."""

from __future__ import annotations

import json
import re

import pytest
from pages import Page, assert_asks_for_nothing

from common.errors import ResultError
from common.report.benchmark_page import benchmark_content
from common.report.benchmark_table import cell
from common.report.html import write_report


def test_benchmark_has_tables_and_plots(benchmark_folder):
    write_report(benchmark_folder)
    page = Page(benchmark_folder / "report.html")
    result = json.loads((benchmark_folder / "seer" / "result.json").read_text(encoding="utf-8"))
    assert page.cells[0][0] == "seer"
    assert page.cells[0][1] == re.sub("[ ()]", "", cell(result["auprc"]))
    assert sum(tag == "svg" for tag, _ in page.elements) == 4
    for text in ("recall", "precision", "threshold / shipped threshold", "seconds a slice", "healthy", "intensity_T1"):
        assert text in page.text
    assert "vae failed: no </script> weights" in page.text
    assert "north: worst healthy subject" in page.text
    south = result["sites"][1]["healthy_worst_share"]["value"]
    assert any(cells[0] == "seer" and cells[5] == f"{south:.3f}" for cells in page.cells if len(cells) == 7)
    assert not [a for tag, a in page.elements if tag == "img"]
    assert_asks_for_nothing(page)
    assert len(page.source) < 500_000


def test_numbers_of_few_subjects_are_grey(benchmark_folder):
    """Four of the six subjects have a lesion; three are of each site."""
    content = benchmark_content(benchmark_folder)
    few = {table["title"]: [cell[3] for cell in table["rows"][0][1]] for table in content["tables"]}
    assert all(few["Voxels"]) and all(few["Lesions"])
    sites = next(table["rows"][0][1] for table in content["tables"] if table["title"] == "Sites")
    assert few["Sites"] == [bool(interval) for _, _, interval, _ in sites]  # what has none is of one subject, the worst
    assert any(few["Sites"])
    headings = next(table["headings"] for table in content["tables"] if table["title"] == "Slices and healthy subjects")
    grey = {heading for heading, is_few in zip(headings, few["Slices and healthy subjects"], strict=True) if is_few}
    assert grey == {"healthy voxels above threshold", "components in a healthy subject"}
    assert not any(few["Run time"])
    write_report(benchmark_folder)
    page = Page(benchmark_folder / "report.html")
    assert page.text.count("Grey and slanted") == 4
    cells = [attributes["class"] for tag, attributes in page.elements if tag == "td" and "class" in attributes]
    flags = [cell[3] for table in content["tables"] for _, row in table["rows"] for cell in row]
    assert cells.count("number few") == sum(flags)


def test_scores_of_a_method_stand_beside_those_of_its_map(benchmark_folder):
    """In the table for people, with a dash where a method has no score of its own, and in the one to compute with."""
    table = json.loads((benchmark_folder / "benchmark.json").read_text(encoding="utf-8"))
    lines = (benchmark_folder / "benchmark.md").read_text(encoding="utf-8").splitlines()
    header = next(line for line in lines if "slice AUROC, method's score" in line).split(" | ")
    numbers = (benchmark_folder / "benchmark.csv").read_text(encoding="utf-8").splitlines()
    for method in table["methods"]:
        (row,) = [line.split(" | ") for line in lines[lines.index(" | ".join(header)) :][:6] if method["key"] in line]
        for title, name in (("slice AUROC", "image_auroc"), ("volume AUROC", "volume_auroc")):
            assert row[header.index(title)] == cell(method[name])
            own = row[header.index(f"{title}, method's score")]
            assert own == ("1.000 (1.000-1.000)" if method["key"] == "seer" else "-")
            value = "1.0,1.0,1.0" if method["key"] == "seer" else ",,"
            assert any(line.endswith(f",{name}_method,{value}") and method["key"] in line for line in numbers)


@pytest.mark.parametrize("content", ["{", '{"methods": 3}', '{"methods": [{"key": "seer"}]}', '{"methods": ["seer"]}'])
def test_broken_benchmark(content, tmp_path):
    (tmp_path / "benchmark.json").write_text(content, encoding="utf-8")
    (tmp_path / "seer").mkdir()
    (tmp_path / "seer" / "result.json").write_text('{"auprc": 1, "curves": []}', encoding="utf-8")
    with pytest.raises(ResultError):
        write_report(tmp_path)
