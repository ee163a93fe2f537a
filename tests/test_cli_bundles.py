"""Which bundles there are, and where those go that a user adds."""

from __future__ import annotations

import json
import shutil

import pytest
from typer.testing import CliRunner

from common import bundle
from common.bundle import BUNDLES_DIR
from common.cli import app
from common.sharing.archive import write_bundle


def uad(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package that was installed from a wheel with one bundle; and the archive of a bundle."""
    shutil.copytree(BUNDLES_DIR / "dae" / "configs", tmp_path / "site" / "_bundles" / "dae" / "configs")
    monkeypatch.setattr(bundle, "INSTALLED", tmp_path / "site" / "_bundles")
    monkeypatch.setattr(bundle, "BUNDLES_DIR", tmp_path / "site" / "_bundles")
    monkeypatch.delenv("UAD_BUNDLES", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.platform", "linux")
    return tmp_path


def archive(folder, key):
    about = json.loads((BUNDLES_DIR / "dae" / "configs" / "metadata.json").read_text(encoding="utf-8")) | {"name": key}
    return write_bundle(key, {"configs/metadata.json": json.dumps(about).encode()}, folder / "exported")


def listed():
    return [about["key"] for about in json.loads(uad("list", "--json").stdout)]


def test_no_bundles_is_an_error(installed):
    shutil.rmtree(installed / "site")
    done = uad("list")
    assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (3, "", 1)
    assert done.stderr.startswith("BundleError: ") and "set UAD_BUNDLES" in done.stderr


def test_scans_to_try_are_written_where_the_user_is(installed, monkeypatch):
    monkeypatch.chdir(installed)
    done = uad("sample")
    assert done.exit_code == 0
    assert "sample/mni152_lesions_T1.nii.gz" in done.stdout.splitlines()
    assert {str(path.relative_to(installed)) for path in (installed / "sample").iterdir()} == {*done.stdout.split()}


def test_an_installed_package_keeps_what_a_user_adds_in_the_cache(installed):
    before = sorted((installed / "site").rglob("*"))
    done = uad("import", archive(installed, "mine"))
    place = installed / "cache" / "uad-bundles" / "mine"
    assert (done.exit_code, done.stdout) == (0, f"{place}: use it with -m mine\n")
    assert listed() == ["dae", "mine"]
    assert uad("new-bundle", "next", "--like", "dae").stdout.startswith(str(place.with_name("next")))
    assert sorted((installed / "site").rglob("*")) == before


def test_a_key_that_is_there_is_refused_but_for_another_folder(installed, monkeypatch):
    path, folder = archive(installed, "dae"), installed / "my bundles"
    done = uad("import", path)
    assert (done.exit_code, done.stderr.count("\n")) == (3, 1)
    assert "is there already" in done.stderr and "give --output FOLDER" in done.stderr
    done = uad("import", path, "-o", folder)
    assert (done.exit_code, done.stdout) == (0, f"{folder / 'dae'}: use it with UAD_BUNDLES={folder} and -m dae\n")
    assert bundle.folder_of("dae") == installed / "site" / "_bundles" / "dae"
    monkeypatch.setenv("UAD_BUNDLES", str(folder))
    assert bundle.folder_of("dae") == folder / "dae"
    assert listed() == ["dae"]
