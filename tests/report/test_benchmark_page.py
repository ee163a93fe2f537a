"""The page of a benchmark: its tables and plots, and results that are broken."""

from __future__ import annotations

import json

import pytest
from pages import Page, assert_asks_for_nothing

from common.errors import ResultError
from common.report.html import write_report


def test_benchmark_has_tables_and_plots(benchmark_folder):
    write_report(benchmark_folder)
    page = Page(benchmark_folder / "report.html")
    result = json.loads((benchmark_folder / "seer" / "result.json").read_text(encoding="utf-8"))
    assert page.cells[0][0] == "seer"
    (low, high), value = result["auprc"]["ci95"], result["auprc"]["value"]
    assert page.cells[0][1] == f"{value:.3f}{low:.3f}-{high:.3f}"
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


@pytest.mark.parametrize("content", ["{", '{"methods": 3}', '{"methods": [{"key": "seer"}]}', '{"methods": ["seer"]}'])
def test_broken_benchmark(content, tmp_path):
    (tmp_path / "benchmark.json").write_text(content, encoding="utf-8")
    (tmp_path / "seer").mkdir()
    (tmp_path / "seer" / "result.json").write_text('{"auprc": 1, "curves": []}', encoding="utf-8")
    with pytest.raises(ResultError):
        write_report(tmp_path)
