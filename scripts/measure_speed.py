"""CPU seconds and peak memory of a case, of two states of this repository in turn, and whether their results agree.

    git worktree add --detach /tmp/before COMMIT
    python scripts/measure_speed.py SCAN... --before /tmp/before -o docs/benchmarks/speed

Each measurement is a process of its own on one thread, which loads a bundle and then takes the scan through it once, as
`uad detect` does. The two states take turns, so that whatever else runs on the machine slows both alike; the figures
are medians. Beside them stands what `import torch, monai` costs in the same processes, by which figures of other
machines can be compared. Written: speed.json, and the table as speed.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import nibabel as nib
import numpy as np
import typer

from common.bundle import BUNDLES_DIR
from common.errors import ImageFileError, one_line
from common.files import replacing
from common.results.case import versions
from common.weights import sha256

HERE = Path(__file__).resolve().parents[1]
MEASURED = ("imports_s", "start_s", "case_s", "peak_mb")
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"), "1")
CHILD = """
import json, sys, time
import torch, monai
imports = time.process_time()
from common.bundle import load_workflow
from common.weights import load_into
from common.workflows.batch import CaseRunner
from common.workflows.run_time import peak_memory_mb
method, scan, output = sys.argv[1:]
workflow = load_workflow(method, ["inference.json"], output_dir=output)
workflow.initialize()
runner = CaseRunner(workflow)
load_into(*map(workflow.parser.get_parsed_content, ("network_def", "weights")))
start = time.process_time()
runner({"subject": "case", "image": scan})
case = time.process_time() - start
peak = peak_memory_mb(torch.device("cpu"))
print(json.dumps({"imports_s": imports, "start_s": start, "case_s": case, "peak_mb": peak}))
"""


def main(
    scan: Annotated[list[Path], typer.Argument(help="Skull-stripped scans, for example of 1 mm and of 2 mm.")],
    before: Annotated[Path, typer.Option(help="A checkout of the earlier state, with its bundles.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of speed.json and speed.md.")],
    method: Annotated[str, typer.Option("-m", "--method", help="Key of a bundle.")] = "dae",
    repeats: Annotated[int, typer.Option(min=1, help="Of each measurement.")] = 5,
) -> None:
    """Measure each scan."""
    trees = {"before": before.resolve(), "after": HERE}
    rows = [row_of(path.resolve(), method, trees, repeats) for path in scan]
    weights = sha256(BUNDLES_DIR / method / "models" / "model.pt")
    commits = {state: commit_of(tree) for state, tree in trees.items()}
    result = {"method": method, "weights_sha256": weights, "commits": commits, "repeats": repeats, "threads": 1}
    result |= {"rows": rows, "versions": versions()}
    write_both(output, "speed", result, table(rows))
    print(table(rows))


def write_both(folder: Path, name: str, result: dict[str, Any], markdown: str) -> None:
    """Figures as `name`.json, and their table as `name`.md."""
    for suffix, text in {".json": json.dumps(result, indent=2), ".md": markdown}.items():
        with replacing(folder / f"{name}{suffix}") as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")


def row_of(scan: Path, method: str, trees: dict[str, Path], repeats: int) -> dict[str, Any]:
    """Figures of a scan in both states, and how their results differ. Raises ImageFileError."""
    if not scan.is_file():
        raise ImageFileError(scan, "no such file", "check the path")
    found: dict[str, list[dict[str, float]]] = {state: [] for state in trees}
    with TemporaryDirectory() as folder:
        for _ in range(repeats):
            for state, tree in trees.items():
                found[state].append(measure(tree, method, scan, Path(folder) / state))
        difference = difference_of(*(Path(folder) / state / "case" for state in trees))
    spacing = [round(float(size), 2) for size in nib.load(scan).header.get_zooms()[:3]]
    figures = {
        state: {name: round(median(run[name] for run in runs), 3) for name in MEASURED} for state, runs in found.items()
    }
    return {"scan": scan.name, "spacing_mm": spacing, **figures, "runs": found, "difference": difference}


def measure(tree: Path, method: str, scan: Path, output: Path) -> dict[str, float]:
    """Of one process: CPU seconds of the imports, until the bundle is ready, and of the case; peak memory in MB."""
    command = [sys.executable, "-c", CHILD, method, str(scan), str(output)]
    environment = os.environ | ONE_THREAD | {"PYTHONPATH": str(tree)}
    done = subprocess.run(command, env=environment, cwd=tree, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        fact = f"cannot be measured ({done.stderr.strip().splitlines()[-1]})"
        raise ImageFileError(scan, fact, "try uad detect with it")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def difference_of(one: Path, other: Path) -> dict[str, Any]:
    """Of the results of a case: the largest differences of voxels, voxels that are segmented in one, and lesions."""
    volumes = {
        name: [np.asanyarray(nib.load(folder / f"{name}.nii.gz").dataobj) for folder in (one, other)]
        for name in ("anomaly_map", "reconstruction", "segmentation")
    }
    found: dict[str, Any] = {}
    for name in ("anomaly_map", "reconstruction"):
        a, b = (volume.astype(np.float64) for volume in volumes[name])
        found[f"{name}_share_of_maximum"] = float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-30))
    found["segmented_otherwise"] = int((volumes["segmentation"][0] != volumes["segmentation"][1]).sum())
    tables = [(folder / "lesions.csv").read_text(encoding="utf-8") for folder in (one, other)]
    found["lesions"] = len(tables[0].splitlines()) - 1
    found["same_lesions"] = tables[0] == tables[1]
    return found


def commit_of(tree: Path) -> str | None:
    """The commit of a checkout; None where git does not say."""
    command = ["git", "-C", str(tree), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    return done.stdout.strip() or None


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    head = [
        "scan",
        "mm",
        "state",
        "import torch, monai",
        "start-up",
        "case",
        "case / before",
        "case / import",
        "peak GB",
    ]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        for state in ("before", "after"):
            figures, first = row[state], row["before"]["case_s"]
            cells = [row["scan"], " x ".join(f"{size:g}" for size in row["spacing_mm"]), state]
            cells += [f"{figures[name]:.2f}" for name in ("imports_s", "start_s", "case_s")]
            ratios = (figures["case_s"] / first, figures["case_s"] / figures["imports_s"], figures["peak_mb"] / 1000)
            lines.append(f"| {' | '.join([*cells, *(f'{ratio:.2f}' for ratio in ratios)])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(one_line(main))
