"""The wheel, installed elsewhere: the bundles come with it, a scan is examined, nothing is written into the package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from common.bundle import BUNDLES_DIR, LARGE_FILES, available_bundles

ROOT = Path(__file__).parents[2]
SOURCES = ("common", "bundles", "pyproject.toml", "README.md", "LICENSE")
MAX_MB = 15  # of the wheel
WITHOUT_WEIGHTS = "vae"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("UAD_CI_SLOW" not in os.environ, reason="builds a wheel, a minute: UAD_CI_SLOW=1"),
]


def run(*command, folder, **environment):
    """What a command prints, in an empty folder."""
    kept = {name: value for name, value in os.environ.items() if name not in ("UAD_BUNDLES", "UAD_WEIGHTS_URL")}
    command, environment = [*map(str, command)], kept | {"PYTHONDONTWRITEBYTECODE": "1"} | environment
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of the sources, so that nothing is left in them."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            left = shutil.ignore_patterns("__pycache__", "eval", "runs")
            shutil.copytree(ROOT / name, folder / "sources" / name, ignore=left)
        else:
            shutil.copy(ROOT / name, folder / "sources" / name)
    pip = (sys.executable, "-m", "pip", "--quiet", "wheel", "--no-deps", "--wheel-dir", folder)
    run(*pip, folder / "sources", folder=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def uad(wheel, tmp_path_factory):
    """The command of the installed wheel, and the folder that it is installed in."""
    site, folder = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("empty")
    install = ("install", "--no-deps", "--no-compile", "--target", site)
    run(sys.executable, "-m", "pip", "--quiet", *install, wheel, folder=folder)
    own = {"PYTHONPATH": str(site), "XDG_CACHE_HOME": str(folder / "cache")}
    before = {path: path.stat().st_mtime_ns for path in site.rglob("*")}

    def command(*arguments):
        return run(sys.executable, "-m", "common", *arguments, folder=folder, **own)

    yield command, site, folder
    assert {path: path.stat().st_mtime_ns for path in site.rglob("*")} == before


def test_wheel_holds_all_bundles_and_small_weights_only(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name.removeprefix("common/_bundles/") for name in archive.namelist() if "/_bundles/" in name}
    for key in available_bundles():
        files = {path.relative_to(BUNDLES_DIR).as_posix() for path in (BUNDLES_DIR / key).rglob("*") if path.is_file()}
        parts = ("LICENSE", LARGE_FILES, "configs", "docs", "models")
        files = {name for name in files if name.split("/")[1] in parts}
        large = {f"{key}/models/model.pt"} if f"{key}/{LARGE_FILES}" in files else set()
        assert {name for name in packed if name.startswith(f"{key}/")} == files - large
    assert wheel.stat().st_size < MAX_MB * 2**20


def test_two_commands(uad):
    """Install it, and examine the sample: with the map that the repository makes."""
    command, _, folder = uad
    assert [about["key"] for about in json.loads(command("list", "--json"))] == available_bundles()
    command("sample")
    sample = folder / "sample" / "mni152_lesions_T1.nii.gz"
    command("detect", "sample/mni152_lesions_T1.nii.gz", "-m", "dae", "-o", "out")
    run(sys.executable, "-m", "common", "detect", sample, "-m", "dae", "-o", folder / "clone", folder=ROOT)
    maps = [nib.load(folder / out / "mni152_lesions_T1" / "anomaly_map.nii.gz") for out in ("out", "clone")]
    assert np.array_equal(*(np.asarray(image.dataobj) for image in maps))


def test_large_weights_are_fetched_and_bundles_travel(uad):
    """Once, then without a source; and what is exported is imported beside them."""
    command, site, folder = uad
    sample = site / "common" / "cohorts" / "sample" / "mni152_lesions_T1.nii.gz"
    assert "uad fetch vae" in command("list")
    place = Path(command("fetch", WITHOUT_WEIGHTS, "--from", ROOT).partition(": ")[0])
    assert folder / "cache" in place.parents
    command("detect", sample, "-m", WITHOUT_WEIGHTS, "-o", folder / "vae")
    command("export", WITHOUT_WEIGHTS, "-o", folder / "exported")
    with zipfile.ZipFile(folder / "exported" / "vae.zip") as archive:
        assert not [name for name in archive.namelist() if "_bundles" in name]
        assert archive.read("vae/models/model.pt") == (BUNDLES_DIR / "vae" / "models" / "model.pt").read_bytes()
    said = command("import", folder / "exported" / "vae.zip", "-o", folder / "mine")
    assert said.startswith(f"{folder / 'mine' / 'vae'}: use it with UAD_BUNDLES=")
