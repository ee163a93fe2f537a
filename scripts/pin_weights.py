"""Write which weights belong to each bundle that a wheel carries without them: bundles/*/large_files.json.

Run it whenever the weights of a bundle have changed; a test says so otherwise. The addresses are relative to where the
files of this project are, see `uad fetch`.
"""

from __future__ import annotations

from pathlib import Path

from common.bundle import BUNDLES_DIR, LARGE_FILES, WEIGHTS
from common.sharing.new_bundle import json_layout
from common.weights import sha256

MAX_BYTES = 3_000_000  # of weights that a wheel carries


def large_files(bundle: Path) -> str | None:
    """The text of the file, or None for a bundle whose weights are in the wheel, or that has none."""
    weights = bundle / WEIGHTS
    if not weights.is_file() or weights.stat().st_size <= MAX_BYTES:
        return None
    url = f"{BUNDLES_DIR.name}/{bundle.name}/{WEIGHTS}"
    file = {"path": WEIGHTS, "url": url, "hash_val": sha256(weights), "hash_type": "sha256"}
    return json_layout({"large_files": [file]}) + "\n"


def main() -> None:
    """Write the files, and remove those that are no longer needed."""
    for metadata in sorted(BUNDLES_DIR.glob("*/configs/metadata.json")):
        bundle = metadata.parents[1]
        text = large_files(bundle)
        if text is None:
            (bundle / LARGE_FILES).unlink(missing_ok=True)
        else:
            (bundle / LARGE_FILES).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
