import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "make_methods_table.py"


def test_readme_says_what_the_benchmarks_say_of_the_weights_that_are_shipped():
    done = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr or "run scripts/make_methods_table.py"


def test_other_numbers_and_other_weights_are_noticed(tmp_path):
    for part in ("README.md", "scripts/make_methods_table.py", "docs/benchmarks"):
        (tmp_path / part).parent.mkdir(exist_ok=True, parents=True)
        (shutil.copytree if (ROOT / part).is_dir() else shutil.copy)(ROOT / part, tmp_path / part)
    path = next(tmp_path.glob("docs/benchmarks/*/benchmark.json"))
    benchmark = json.loads(path.read_text(encoding="utf-8"))
    method = next(m for m in benchmark["methods"] if m["kind"] == "method" and not m["items"])

    def check():
        path.write_text(json.dumps(benchmark), encoding="utf-8")
        command = [sys.executable, tmp_path / "scripts" / SCRIPT.name, "--check"]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert check().returncode == 0
    method["auprc"]["value"] = 0.9876
    assert check().returncode == 1
    method["weights_sha256"] = "0" * 64
    assert f"{method['key']} was measured with other weights; run the benchmark again" in check().stderr
