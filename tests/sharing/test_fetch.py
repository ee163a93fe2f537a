"""Weights that a wheel leaves out: which they are, and how they come to the user."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from typer.testing import CliRunner

from common import bundle
from common.bundle import BUNDLES_DIR, LARGE_FILES, weights_of, weights_place
from common.cli import app
from common.errors import BundleError, OutputError
from common.sharing import fetch
from common.sharing.fetch import fetch_weights

CONTENT = b"weights" * 1000


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package that was installed from a wheel with one bundle, whose weights it lacks, and a folder with these."""
    folder, large = tmp_path / "site" / "_bundles", tmp_path / "clone" / "bundles" / "vae" / "models" / "model.pt"
    shutil.copytree(BUNDLES_DIR / "vae", folder / "vae", ignore=shutil.ignore_patterns("models"))
    large.parent.mkdir(parents=True)
    large.write_bytes(CONTENT)
    pin(folder / "vae" / LARGE_FILES, hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(bundle, "INSTALLED", folder)
    monkeypatch.setattr(bundle, "BUNDLES_DIR", folder)
    monkeypatch.setenv("UAD_BUNDLES", str(tmp_path / "mine"))
    monkeypatch.delenv("UAD_WEIGHTS_URL", raising=False)
    return tmp_path


def pin(path, sha256):
    file = {"path": "models/model.pt", "url": "bundles/vae/models/model.pt", "hash_val": sha256, "hash_type": "sha256"}
    path.write_text(json.dumps({"large_files": [file]}), encoding="utf-8")


def written(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_weights_are_fetched_from_a_folder_once(installed):
    with pytest.raises(BundleError, match="uad fetch vae"):
        weights_of("vae")
    before = written(installed / "site")
    place = fetch_weights("vae", str(installed / "clone"))
    assert place.read_bytes() == CONTENT
    assert (weights_of("vae"), written(installed / "mine")) == (place, [place])
    assert written(installed / "site") == before
    shutil.rmtree(installed / "clone")
    assert fetch_weights("vae", None) == place


def test_weights_are_fetched_from_an_address(installed):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(installed / "clone")))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        address = f"http://127.0.0.1:{server.server_port}/"
        assert fetch_weights("vae", address).read_bytes() == CONTENT
        (installed / "clone" / "bundles" / "vae" / "models" / "model.pt").unlink()
        shutil.rmtree(installed / "mine")
        with pytest.raises(BundleError, match=r"(?i)not found"):
            fetch_weights("vae", address)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert not written(installed / "mine")


@pytest.mark.parametrize("source", ["none", "http://127.0.0.1:9"])
def test_a_source_that_is_not_there(source, installed):
    with pytest.raises(BundleError, match="cannot be read"):
        fetch_weights("vae", source)
    assert not written(installed / "mine")


def test_other_weights_are_refused_and_nothing_is_left(installed, monkeypatch):
    (installed / "clone" / "bundles" / "vae" / "models" / "model.pt").write_bytes(CONTENT[:-1])
    with pytest.raises(BundleError, match="not the weights of vae"):
        fetch_weights("vae", str(installed / "clone"))
    monkeypatch.setattr(fetch, "MAX_BYTES", 10)
    with pytest.raises(BundleError, match="too large"):
        fetch_weights("vae", str(installed / "clone"))
    assert not written(installed / "mine")


def test_weights_that_were_damaged_later_are_fetched_again(installed):
    place = fetch_weights("vae", str(installed / "clone"))
    place.write_bytes(b"cut")
    assert fetch_weights("vae", str(installed / "clone")).read_bytes() == CONTENT


def test_weights_of_another_version_do_not_count(installed):
    fetch_weights("vae", str(installed / "clone"))
    pin(installed / "site" / "_bundles" / "vae" / LARGE_FILES, hashlib.sha256(b"new").hexdigest())
    assert not weights_place("vae").exists()
    with pytest.raises(BundleError, match="uad fetch vae"):
        weights_of("vae")


def test_a_folder_that_cannot_be_written(installed):
    (installed / "mine").write_text("a file", encoding="utf-8")
    with pytest.raises(OutputError, match="UAD_BUNDLES"):
        fetch_weights("vae", str(installed / "clone"))


@pytest.mark.parametrize("text", ["[", "{}", '{"large_files": [{"path": "../../x", "hash_type": "sha256"}]}'])
def test_a_broken_description_is_said(text, installed):
    (installed / "site" / "_bundles" / "vae" / LARGE_FILES).write_text(text, encoding="utf-8")
    with pytest.raises(BundleError, match="does not say which weights"):
        fetch_weights("vae", str(installed / "clone"))


def test_a_bundle_without_weights_is_trained(installed):
    (installed / "site" / "_bundles" / "vae" / LARGE_FILES).unlink()
    with pytest.raises(BundleError, match="train it"):
        fetch_weights("vae", str(installed / "clone"))


def test_command(installed):
    run = CliRunner().invoke
    done = run(app, ["fetch", "vae"])
    assert (done.exit_code, done.stderr.count("\n")) == (3, 1)
    assert "set UAD_WEIGHTS_URL" in done.stderr and "give --from FOLDER_OR_URL" in done.stderr
    assert [run(app, ["fetch"]).exit_code, run(app, ["fetch", "vae", "--all"]).exit_code] == [2, 2]
    done = run(app, ["detect", __file__, "-m", "vae", "-o", str(installed / "out")])
    assert (done.exit_code, done.stderr.count("\n")) == (3, 1)
    assert "uad fetch vae" in done.stderr
    assert "uad fetch vae" in run(app, ["list"]).stdout
    done = run(app, ["fetch", "--all"], env={"UAD_WEIGHTS_URL": str(installed / "clone")})
    assert (done.exit_code, done.stdout) == (0, f"{weights_of('vae')}: the weights of vae\n")
    assert "uad fetch vae" not in run(app, ["list"]).stdout
