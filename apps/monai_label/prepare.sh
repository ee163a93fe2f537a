#!/usr/bin/env bash
# A MONAI Label app with bundles of this repository, which it does not need any more:   prepare.sh APP KEY...
set -euo pipefail
app=${1:?usage: prepare.sh APP KEY...}

command -v uad >/dev/null || { echo "prepare.sh: no command uad; activate the environment of the repository (README.md, Install)" >&2; exit 1; }
mkdir -p "$app/model"
cp "$(dirname "$0")/main.py" "$app"
for key in "${@:2}"; do
    uad export "$key" -o "$app/model"
    rm "$app/model/$key.zip"
done
