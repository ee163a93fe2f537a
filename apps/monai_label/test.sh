#!/usr/bin/env bash
# Runs what README.md says, in the folder build/monai_label (or another, the argument), then the checks of test_server.py.
# To be called in the environment of the repository; that of MONAI Label is made where it is missing.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."
root=$PWD
command -v uad >/dev/null || { echo "test.sh: no command uad; activate the environment of the repository (README.md, Install)" >&2; exit 1; }
work=$(realpath -m "${1:-build/monai_label}")
port=$(python -c "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); print(s.getsockname()[1])")

block() { # the n-th block of commands in README.md
    awk -v n="$1" '/^```sh$/ { count++; inside = 1; next } /^```/ { inside = 0 } inside && count == n' "$here/README.md" |
        sed -E "s#(^| )label(/|\$)#\1$work\2#g; s#--port 8000#--port $port#"
}

if [ ! -x "$work/environment/bin/pytest" ]; then
    rm -rf "$work/environment"
    eval "$(block 1)"
    "$work/environment/bin/python" -m pip install pytest
fi
# PyPI builds torchvision for CUDA; beside a torch for the CPU it lacks two operators
"$work/environment/bin/python" -c "import torchvision" 2>/dev/null || "$work/environment/bin/python" - <<'END'
from importlib.util import find_spec
from pathlib import Path

init = Path(find_spec("torchvision").origin)
lines = """import torch
library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
init.write_text(lines + init.read_text())
END

rm -rf "$work"/{app,studies,expected}
eval "$(block 2)"
# modules of the same names that say something else: they must not be mixed with those of the other bundles
cp -r "$work/app/model/dae" "$work/app/model/negated"
sed -i 's/return float(top_mean/return -float(top_mean/' "$work/app/model/negated/scripts/_common/detection/calibration.py"
for key in dae mad_ad; do
    python -m monai.bundle run --config_file "bundles/$key/configs/inference.json" --output_dir "$work/expected/$key"
done

eval "$(block 3) >server.log 2>&1 &" # the last line is the server's
server=$!
trap 'kill "$server" 2>/dev/null; wait "$server" || true' EXIT
for _ in {1..300}; do
    if curl -sf "http://127.0.0.1:$port/info/" >/dev/null; then break; fi
    kill -0 "$server" || { cat server.log; exit 1; }
    sleep 1
done
LABEL_SERVER="http://127.0.0.1:$port" LABEL_WORK="$work" LABEL_SAMPLE="$root/common/cohorts/sample" \
    python -m pytest -vv --durations=5 -p no:cacheprovider "$here/test_server.py"
