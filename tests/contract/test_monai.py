"""MONAI's own checks, of which `monai_checks.py` runs all for one bundle in one process."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize("check", ["metadata", "smallest input", "any input", "inference", "training"])
def test_monai_accepts(check, monai_says):
    assert monai_says[check] is None, monai_says[check]
