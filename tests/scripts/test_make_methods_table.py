import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "make_methods_table.py"


def test_readme_says_what_the_benchmarks_say_of_the_weights_that_are_shipped():
    done = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr or "run scripts/make_methods_table.py"


@pytest.fixture
def copied(tmp_path):
    """A copy of what the script reads and writes, and a run of it there that only compares."""
    for part in ("README.md", "scripts/make_methods_table.py", "docs/benchmarks"):
        (tmp_path / part).parent.mkdir(exist_ok=True, parents=True)
        (shutil.copytree if (ROOT / part).is_dir() else shutil.copy)(ROOT / part, tmp_path / part)

    def check():
        command = [sys.executable, tmp_path / "scripts" / SCRIPT.name, "--check"]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    return tmp_path, check


def test_other_numbers_and_other_weights_are_noticed(copied):
    folder, check = copied
    path = next(folder.glob("docs/benchmarks/*/benchmark.json"))
    benchmark = json.loads(path.read_text(encoding="utf-8"))
    method = next(m for m in benchmark["methods"] if m["kind"] == "method" and not m["items"])
    assert check().returncode == 0
    method["auprc"]["value"] = 0.9876
    path.write_text(json.dumps(benchmark), encoding="utf-8")
    assert check().returncode == 1
    method["weights_sha256"] = "0" * 64
    path.write_text(json.dumps(benchmark), encoding="utf-8")
    assert f"{method['key']} was measured with other weights; run the benchmark again" in check().stderr


def test_a_bundle_that_was_measured_on_fewer_subjects_says_so(copied):
    folder, check = copied
    path = folder / "docs" / "benchmarks" / "sites" / "vae.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    assert check().returncode == 0
    result["tested"]["novosibirsk"].pop()
    path.write_text(json.dumps(result), encoding="utf-8")
    assert check().returncode == 1


@pytest.mark.parametrize(
    ("ci95", "said"), [([0.01, 0.2], "more than"), ([-0.1, 0.1], "neither surely more"), ([-0.2, -0.01], "less than")]
)
def test_the_verdict_is_that_of_the_interval(load_script, ci95, said):
    assert load_script("make_methods_table").verdict({"value": 0.0, "ci95": ci95}).startswith(said)
