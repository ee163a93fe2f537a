#!/usr/bin/env bash
# An environment with the oldest versions of what can change a bit of a map:   oldest.sh ENVIRONMENT [TORCH PIP-OPTIONS]
# The versions are the lower bounds of pyproject.toml; TORCH, for example torch==2.13.0, is installed instead of its own.
set -euo pipefail
environment=$(realpath -m "${1:?usage: oldest.sh ENVIRONMENT [TORCH PIP-OPTIONS]}")
cd "$(dirname "$0")/.."

python3 -m venv "$environment"
"$environment/bin/python" - >"$environment/oldest.txt" <<'END'
import re
import tomllib
from pathlib import Path

for line in tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]:
    name, version = re.match(r"([\w-]+)(?:\[.*\])?>=([0-9.]+)", line).groups()
    if name in ("numpy", "scipy", "SimpleITK", "monai", "torch"):
        print(f"{name}=={version}")
END
if [ $# -gt 1 ]; then
    sed -i '/^torch==/d' "$environment/oldest.txt"
    "$environment/bin/python" -m pip install --quiet "${@:2}"
fi
"$environment/bin/python" -m pip install --quiet --constraint "$environment/oldest.txt" -e .
