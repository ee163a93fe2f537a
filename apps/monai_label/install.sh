#!/usr/bin/env bash
# MONAI Label in a new environment of its own:   install.sh ENVIRONMENT [PIP OPTIONS FOR TORCH]
set -euo pipefail
environment=${1:?usage: install.sh ENVIRONMENT [PIP OPTIONS FOR TORCH]}

python3.11 -m venv "$environment"
"$environment/bin/python" -m pip install torch==2.13.0 torchvision==0.28.0 "${@:2}"
"$environment/bin/python" -m pip install -r "$(dirname "$0")/requirements.txt"
"$environment/bin/python" -m pip install --no-deps monailabel==0.8.5  # its own list does not start: see requirements.txt
