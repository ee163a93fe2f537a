"""Unsupervised anomaly detection as MONAI bundles: the code that all bundles share.

From Python: `detect(image, "dae")`, or `load_detector("dae")`, which is loaded once and called with many scans.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["Detection", "Detector", "detect", "load_detector"]


def __getattr__(name: str) -> Any:
    """The public names, imported at first use: `import common` alone costs nothing, and exported bundles go without."""
    if name in __all__:
        return getattr(importlib.import_module(f"{__name__}.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
