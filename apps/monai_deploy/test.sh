#!/usr/bin/env bash
# Runs what README.md says, then the checks of test_app.py. Arguments go to pytest.
# UAD_DEPLOY_VENV: the environment, made where it is missing; UAD_TEST_DATA: a folder with real series in dicom/*/.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$(dirname "$here")")
venv=${UAD_DEPLOY_VENV:-$HOME/deploy}

block() {  # the n-th block of commands in README.md
    awk -v n="$1" '/^```sh$/ { count++; inside = 1; next } /^```/ { inside = 0 } inside && count == n' "$here/README.md" |
        sed "s#~/deploy#$venv#g"
}

cd "$root"
if [ ! -x "$venv/bin/pytest" ]; then  # what is installed last
    echo "== install" && bash -euxo pipefail -c "$(block 1)"
fi
eval "$(block 2)"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
ln -s "$root/apps" "$root/bundles" "$root/common" .
for number in 3 4; do
    echo "== commands of README.md, block $number" && bash -euxo pipefail -c "$(block "$number")"
done

cd "$root"
echo "== checks"
python -m pytest -p no:cacheprovider -rs "$here/test_app.py" "$@"
