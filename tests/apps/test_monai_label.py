"""What of the instructions for MONAI Label can be checked without its server."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

from common.bundle import BUNDLES_DIR
from common.transforms.postprocess import shipped_threshold

APPS = Path(__file__).parents[2] / "apps"
README = APPS / "monai_label" / "README.md"


def test_threshold_of_the_example_is_above_the_calibrated_one():
    """The unit of a map may change with its method: a number that marked less would mark the whole brain."""
    found = re.findall(
        r"infer/(\w+)\?\S+ -F 'params=(\{[^']*\"threshold\"[^']*\})'", README.read_text(encoding="utf-8")
    )
    assert found
    for key, params in found:
        assert json.loads(params)["threshold"] > shipped_threshold(BUNDLES_DIR / key / "models" / "model.pt")


@pytest.mark.parametrize("command", [["prepare.sh", "app", "dae"], ["test.sh", "work"]], ids=["prepare", "test"])
def test_outside_the_environment_of_uad_it_is_one_line(command, tmp_path):
    """Where the shell finds only what these scripts need before they look for `uad`."""
    for program in ("bash", "dirname"):
        (tmp_path / program).symlink_to(shutil.which(program))
    script = [str(APPS / "monai_label" / command[0]), *command[1:]]
    done = subprocess.run(
        ["bash", *script], cwd=tmp_path, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    line = f"{command[0]}: no command uad; activate the environment of the repository (README.md, Install)\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", line)
    assert {path.name for path in tmp_path.iterdir()} == {"bash", "dirname"}


@pytest.mark.parametrize("readme", sorted(APPS.glob("*/README.md")), ids=lambda path: path.parent.name)
def test_folders_that_the_instructions_make_are_ignored_by_git(readme):
    """Those in the root of the repository, where the commands are to be run."""
    ignored = (APPS.parent / ".gitignore").read_text(encoding="utf-8").splitlines()
    blocks = re.findall(r"```sh\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL)
    commands = [line.split("#")[0].split() for line in "\n".join(blocks).splitlines() if not line.startswith("curl")]
    made = {words[words.index("-o") + 1] for words in commands if "-o" in words}
    made |= {word for words in commands if words[:2] == ["mkdir", "-p"] for word in words[2:]}
    makers = ("install.sh", "prepare.sh", "make_dicom.py")  # whose first argument is a folder
    made |= {after for words in commands for word, after in pairwise(words) if word.endswith(makers)}
    assert made
    assert [folder for folder in made if f"/{Path(folder).parts[0]}/" not in ignored] == []
