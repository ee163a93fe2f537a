"""Print results of `uad evaluate` as a Markdown table.

python scripts/make_table.py NAME=result.json [NAME=result.json ...]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

METRICS = {
    "auprc": "AUPRC",
    "max_dice_pooled": "best Dice (oracle)",
    "dice_at_threshold": "Dice at threshold",
    "image_auroc": "slice AUROC",
    "healthy_fp_share": "healthy voxels above threshold",
}


def row(name: str, result: dict[str, Any]) -> str:
    """One line of the table; an undefined metric is a dash."""
    cells = []
    for metric in METRICS:
        value, (low, high) = result[metric]["value"], result[metric]["ci95"]
        interval = "" if low is None else f" ({low:.3f}-{high:.3f})"
        cells.append("-" if value is None else f"{value:.3f}{interval}")
    return f"| {name} | {' | '.join(cells)} |"


def main(arguments: list[str]) -> None:
    """Print the table: each result, and below it the baselines that were measured with it."""
    print(f"| | {' | '.join(METRICS.values())} |\n|---|{'---|' * len(METRICS)}")
    for argument in arguments:
        name, path = argument.split("=", 1)
        result = json.loads(Path(path).read_text(encoding="utf-8"))
        print(row(f"**{name}**", result))
        for baseline, values in result["baselines"].items():
            print(row(f"{name}: {baseline}", values))


if __name__ == "__main__":
    main(sys.argv[1:])
