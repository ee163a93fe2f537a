"""The tutorials run from top to bottom, in an empty folder, and hold no outputs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

TUTORIALS = Path(__file__).parents[1] / "docs" / "tutorials"
QUICK = "reading_a_map"  # the others take a minute and more
NOTEBOOKS = sorted(path.stem for path in TUTORIALS.glob("*.ipynb"))
MAX_CELLS = 12


def read(name):
    return nbformat.read(TUTORIALS / f"{name}.ipynb", as_version=4)


def run(notebook, folder, monkeypatch):
    """In a process of its own that has this package and its command. Raises CellExecutionError."""
    programs = Path(sys.executable).parent
    monkeypatch.setenv("PATH", os.pathsep.join([str(programs), os.environ["PATH"]]))
    monkeypatch.setenv("PYTHONPATH", str(TUTORIALS.parents[1]))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == QUICK else pytest.mark.slow) for name in NOTEBOOKS]
)
def test_it_runs(name, tmp_path, monkeypatch):
    notebook = run(read(name), tmp_path, monkeypatch)
    said = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    assert said.strip()
    assert "Traceback" not in said and "Error" not in said.replace("ImageFileError", "")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_is_short_and_holds_no_outputs(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert len(notebook.cells) <= MAX_CELLS
    assert notebook.cells[0].source.startswith("# ")
    for cell in notebook.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None


def test_a_cell_that_fails_is_seen(tmp_path, monkeypatch):
    """Of the shell too."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("%%bash\nfalse")])
    with pytest.raises(CellExecutionError, match="CalledProcessError"):
        run(notebook, tmp_path, monkeypatch)
