"""What of the instructions for MONAI Label can be checked without its server."""

from __future__ import annotations

import json
import re
from pathlib import Path

from common.bundle import BUNDLES_DIR
from common.transforms.postprocess import shipped_threshold

README = Path(__file__).parents[2] / "apps" / "monai_label" / "README.md"


def test_threshold_of_the_example_is_above_the_calibrated_one():
    """The unit of a map may change with its method: a number that marked less would mark the whole brain."""
    found = re.findall(
        r"infer/(\w+)\?\S+ -F 'params=(\{[^']*\"threshold\"[^']*\})'", README.read_text(encoding="utf-8")
    )
    assert found
    for key, params in found:
        assert json.loads(params)["threshold"] > shipped_threshold(BUNDLES_DIR / key / "models" / "model.pt")
