"""Folders as `uad detect` and `uad benchmark` leave them, made without a network."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from common.detection.calibration import Calibration
from common.detection.reliability import verdict
from common.metrics import DetectionMetrics
from common.metrics.paper_slices import PaperSlices
from common.results.case import Case, write_case
from common.results.preview import save_preview
from common.weights import sha256
from common.workflows.benchmark import write_benchmark
from common.workflows.evaluation import write_result

THRESHOLD = 0.1
MARKUP = "<img src=x onerror=document.title='broken'>"  # a name that a careless page would run


@pytest.fixture(scope="session")
def make_case(phantom, save_nifti):
    """Write a case of the phantom, whose lesion is found, and its scan; the folder of the case."""

    pictures = []

    def draw_once(case, threshold, path, *others):  # drawing takes seconds
        if not pictures:
            save_preview(case, threshold, path, *others)
            pictures.append(path.read_bytes())
        path.write_bytes(pictures[0])

    def make(
        out,
        name="scan",
        spacing_mm=4.0,
        strength=0.2,
        to_mni=None,
        entities=None,
        scan_dir=None,
        result=None,
        **run,
    ):
        shape, affine = phantom.grid(spacing_mm=(spacing_mm,) * 3)
        image, brain, lesion = phantom.on_grid(shape, affine)
        scans = scan_dir or out.parent
        scans.mkdir(parents=True, exist_ok=True)
        path = save_nifti(scans / "scan.nii.gz", image, affine)
        maps = {
            "image": image,
            "brain": brain,
            "anomaly_map": (0.01 * brain + strength * lesion).astype(np.float32),
            "reconstruction": (300 * brain).astype(np.float32),
            "segmentation": (lesion & (strength > THRESHOLD)).astype(np.uint8),
        }
        volumes = {key: MetaTensor(torch.from_numpy(volume)[None], affine=affine) for key, volume in maps.items()}
        calibration = Calibration()
        calibration.fit(THRESHOLD, 0.01, torch.linspace(0, 0.3, 50))
        record = {
            "bundle": "dae",
            "weights_sha256": "ab" * 32,
            "input_sha256": {"image": sha256(path)},
            "image": str(path),
            "seed": 0,
            "settings": {"channels": 1},
            "brain_mask": "stripped",
            "device": "cpu",
            "seconds": 1.5,
        }
        folder = out / name
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("common.results.case.save_preview", draw_once)
            case = Case(name, **volumes, to_mni=to_mni)
            numbers = calibration.describe(case.anomaly_map.as_tensor(), case.brain.as_tensor(), THRESHOLD)
            write_case(folder, entities, case, numbers | verdict([]) | (result or {}), record | run)
        return folder

    return make


@pytest.fixture(scope="session")
def cohort_folder(make_case, tmp_path_factory):
    """Three cases and one that failed."""
    out = tmp_path_factory.mktemp("cohort") / "out"
    for name, strength in (("low", 0.05), ("high", 0.5), (MARKUP, 0.2)):
        make_case(out, name, strength=strength)
    lines = ["case\tstatus\tseconds\tmessage", "low\tok\t1.00\t", "high\tok\t1.00\t", f"{MARKUP}\tok\t1.00\t"]
    lines += [
        "bad\tImageShapeError\t0.10\tbad.nii.gz: </script><script>document.title='broken'</script>; \"repair\" it"
    ]
    (out / "status.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return out


@pytest.fixture(scope="session")
def benchmark_folder(tmp_path_factory):
    """A method that sees lesions, also by a score of its own, one that does not, and a baseline; of six subjects."""
    out = tmp_path_factory.mktemp("benchmark")
    results = {}
    for key, contrast, kind in (("seer", 2.0, "method"), (MARKUP, 0.0, "method"), ("intensity_T1", 0.5, "baseline")):
        rng, metrics = np.random.default_rng(0), DetectionMetrics()
        for subject in range(6):
            brain, lesion = np.ones((8, 8, 8), bool), np.zeros((8, 8, 8), bool)
            lesion[2:5, 2:5, 2:5] = subject < 4
            values = rng.random((8, 8, 8)) + contrast * lesion
            site, threshold = ("north", "south")[subject % 2], None if kind == "baseline" else 0.9
            own = {"method_slice_scores": lesion.any((0, 1)) * 1.0, "method_score": float(subject < 4)}
            own = own if key == "seer" else {}
            metrics.update(str(subject), values, lesion, brain, threshold=threshold, site=site, **own)
        results[key] = metrics.compute(n_bootstrap=50) | {"key": key, "kind": kind}
        if kind == "method":
            time = {"seconds_per_volume": 2.0, "network_seconds_per_slice": 0.01, "slices_per_volume": 8.0}
            time |= {"peak_memory_mb": 500, "device": "cpu", "threads": 1}
            protocols = PaperSlices().compute()
            results[key] |= {"protocols": protocols, "threshold": 0.9, "run_time": time, "weights_sha256": "cd" * 32}
        write_result(results[key], out / key / "result.json")
    write_benchmark(
        out, "cohort.csv", {"cohort_sha256": "ef" * 32, "seed": 0}, results, {"vae": "no </script> weights"}
    )
    return out
