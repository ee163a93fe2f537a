"""Memory of the metrics for 10 and for 100 subjects: `python scripts/measure_metrics_memory.py`.

Printed: what is kept (tracemalloc, after the subjects' volumes are gone), and the peak while metrics with intervals are
made of it. A subject is a made-up map of 1 mm, 182 x 218 x 182 voxels, of which a quarter is brain and 1 % of that
lesion.
"""

from __future__ import annotations

import tracemalloc

import numpy as np

from common.metrics import DetectionMetrics

SHAPE = (182, 218, 182)
COUNTS = (10, 100)


def main() -> None:
    """Print a table in Markdown."""
    rng = np.random.default_rng(0)
    brain = np.zeros(SHAPE, dtype=bool)
    brain[30:150, 30:180, 30:130] = True
    metrics = DetectionMetrics()
    print("| subjects | kept, MB | peak of the evaluation, MB |\n|---|---|---|", flush=True)
    tracemalloc.start()
    for subject in range(COUNTS[-1]):
        lesion = brain & (rng.random(SHAPE, dtype=np.float32) < 0.01)
        anomaly_map = (rng.random(SHAPE, dtype=np.float32) + lesion) * brain
        metrics.update(str(subject), anomaly_map, lesion, brain, threshold=0.5)
        del lesion, anomaly_map
        if subject + 1 in COUNTS:
            kept, _ = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
            metrics.compute()
            _, peak = tracemalloc.get_traced_memory()
            print(f"| {subject + 1} | {kept / 1e6:.0f} | {peak / 1e6:.0f} |", flush=True)


if __name__ == "__main__":
    main()
