"""The pages of the documentation that are made of what stands elsewhere."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from common.bundle import available_bundles

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of the pages, and the navigation; as in `mkdocs build`, without the site."""
    config = pytest.importorskip("mkdocs.config").load_config(str(ROOT / "mkdocs.yml"))
    editor = pytest.importorskip("mkdocs_gen_files").FilesEditor
    files = pytest.importorskip("mkdocs.structure.files").Files([])
    folder = tmp_path_factory.mktemp("pages")
    with editor(files, config, str(folder)):
        runpy.run_path(str(ROOT / "scripts" / "make_docs_pages.py"))
    return folder, config["nav"]


def pages_of(entries):
    """The pages of a navigation."""
    for entry in entries:
        for value in entry.values():
            yield from pages_of(value) if isinstance(value, list) else [value]


def test_navigation_leads_to_all_pages(made):
    folder, navigation = made
    there = {path.relative_to(place).as_posix() for place in (folder, ROOT / "docs") for path in place.rglob("*.md")}
    assert set(pages_of(navigation)) == there


@pytest.mark.parametrize("key", available_bundles())
def test_page_of_a_method_has_its_picture_and_its_code(key, made):
    page = (made[0] / "methods" / f"{key}.md").read_text(encoding="utf-8")
    (picture,) = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page)
    assert (ROOT / "docs" / "methods" / picture).resolve() == ROOT / "docs" / "methods" / f"{key}.png"
    assert (ROOT / "docs" / "methods" / picture).is_file()
    headings = re.findall("^## (.+)$", page, re.MULTILINE)
    assert headings[:3] == ["Overview", "Its stages", "Data"] and headings[-1] == "In the code"
    assert f"uad figures {key} sample/" in page
    assert "(../reference/methods.md#common.methods." in page
