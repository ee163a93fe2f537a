"""What several tests of the workflows share."""

from __future__ import annotations

import pytest


@pytest.fixture
def no_picture(monkeypatch):
    """Drawing takes seconds."""
    monkeypatch.setattr("common.results.case.save_preview", lambda case, threshold, path, *others: path.touch())


@pytest.fixture(scope="session")
def thin_brain(phantom):
    """A brain of four slices, which are too thick for a result to be relied on, and its affine."""
    (height, width, depth), affine = phantom.grid(spacing_mm=(4, 4, 4))
    affine[:3, 3] += affine[:3, :3] @ (0, 0, depth // 2 - 2)
    return phantom.on_grid((height, width, 4), affine)[0], affine
