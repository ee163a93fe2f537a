"""The template that registration goes to is the one that its script makes."""

from __future__ import annotations

import sys

import nibabel as nib
import numpy as np
import pytest

from common.images.mni import TEMPLATE


def test_make_template_makes_the_shipped_template(load_script, tmp_path, monkeypatch):
    pytest.importorskip("nilearn", reason="the template comes with nilearn (requirements-dev.txt)")
    monkeypatch.delitem(sys.modules, "make_sample", raising=False)
    load_script("make_template").make_template(tmp_path)
    made, kept = nib.load(tmp_path / TEMPLATE.name), nib.load(TEMPLATE)
    np.testing.assert_array_equal(made.affine, kept.affine)
    np.testing.assert_array_equal(np.asarray(made.dataobj), np.asarray(kept.dataobj))
    assert (tmp_path / "LICENSE").read_bytes() == (TEMPLATE.parent / "LICENSE").read_bytes()
