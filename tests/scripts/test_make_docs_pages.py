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
    """The folder of the pages; as in `mkdocs build`, without the site."""
    config = pytest.importorskip("mkdocs.config").load_config(str(ROOT / "mkdocs.yml"))
    editor = pytest.importorskip("mkdocs_gen_files").FilesEditor
    files = pytest.importorskip("mkdocs.structure.files").Files([])
    folder = tmp_path_factory.mktemp("pages")
    with editor(files, config, str(folder)):
        runpy.run_path(str(ROOT / "scripts" / "make_docs_pages.py"))
    return folder


@pytest.mark.parametrize("key", available_bundles())
def test_page_of_a_method_has_its_picture_and_its_code(key, made):
    page = (made / "methods" / f"{key}.md").read_text(encoding="utf-8")
    (picture,) = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page)
    assert (ROOT / "docs" / "methods" / picture).is_file()
    assert f"uad figures {key} sample/" in page
    assert "(../reference/methods.md#common.methods." in page
