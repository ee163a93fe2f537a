"""Print results of `uad evaluate` as a Markdown table.

python scripts/make_table.py NAME=result.json [NAME=result.json ...]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from common.report.benchmark_table import cell

METRICS = {
    "auprc": "AUPRC",
    "max_dice_pooled": "best Dice (oracle)",
    "dice_at_threshold": "Dice at threshold",
    "image_auroc": "slice AUROC",
    "healthy_fp_share": "healthy voxels above threshold",
}


def row(name: str, result: dict[str, Any]) -> str:
    """One line of the table; an undefined metric is a dash."""
    return f"| {name} | {' | '.join(cell(result[metric]) for metric in METRICS)} |"


def main(arguments: list[str]) -> None:
    """Print the table: each result, and below it the baselines that were measured with it."""
    print(f"| | {' | '.join(METRICS.values())} |\n|---|{'---|' * len(METRICS)}")
    for argument in arguments:
        name, path = argument.split("=", 1)
        result = json.loads(Path(path).read_text(encoding="utf-8"))
        print(row(f"**{name}**", result))
        for baseline, values in result.get("baselines", {}).items():
            print(row(f"{name}: {baseline}", values))


if __name__ == "__main__":
    main(sys.argv[1:])
