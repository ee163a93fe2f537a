"""Exported bundles as files: the same bytes each time, and nothing is imported that is not what it says it is."""

from __future__ import annotations

import hashlib
import json
import pickle
import zipfile

import pytest
import torch

from common.errors import BundleError, OutputError
from common.sharing import archive
from common.sharing.archive import SUMS, import_bundle, read_bundle, write_bundle
from common.weights import save_weights

CONFIG = {"network_def": {"_target_": "scripts._common.methods.dae.DAE"}}


@pytest.fixture
def files(tmp_path):
    """A small bundle that stands alone."""
    save_weights({"w": torch.ones(3)}, tmp_path / "model.pt")
    return {
        "configs/metadata.json": json.dumps({"name": "small"}).encode(),
        "configs/inference.json": json.dumps(CONFIG).encode(),
        "docs/README.md": b"what it is",
        "LICENSE": b"free",
        "models/model.pt": (tmp_path / "model.pt").read_bytes(),
        "scripts/__init__.py": b"",
        "scripts/_common/methods/dae.py": b"raise SystemExit",
    }


def sums(files):
    return "".join(f"{hashlib.sha256(content).hexdigest()}  {place}\n" for place, content in files.items()).encode()


def make_zip(path, files, top="small/"):
    """An archive with a good SHA256SUMS of `files`, whatever they are."""
    with zipfile.ZipFile(path, "w") as file:
        for place, content in {SUMS: sums(files), **files}.items():
            file.writestr(top + place, content)
    return path


def refused(path, tmp_path, match, error=BundleError):
    bundles = tmp_path / "bundles"
    with pytest.raises(error, match=match) as caught:
        import_bundle(path, bundles)
    assert "\n" not in str(caught.value)
    assert not bundles.exists() or not [p for p in bundles.rglob("*") if p.is_file()]


def test_written_and_read(files, tmp_path):
    path = write_bundle("small", files, tmp_path / "a")
    assert path == tmp_path / "a" / "small.zip"
    assert read_bundle(path) == read_bundle(tmp_path / "a" / "small") == files
    assert [p.name for p in (tmp_path / "a").iterdir() if p.name.startswith(".")] == []
    with zipfile.ZipFile(path) as file:
        assert {entry.date_time for entry in file.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert {entry.filename.split("/")[0] for entry in file.infolist()} == {"small"}


def test_same_bytes_each_time(files, tmp_path):
    first = write_bundle("small", files, tmp_path / "a")
    second = write_bundle("small", dict(reversed(files.items())), tmp_path / "b")
    assert first.read_bytes() == second.read_bytes()


def test_nothing_is_overwritten(files, tmp_path):
    write_bundle("small", files, tmp_path)
    with pytest.raises(OutputError, match="is there already"):
        write_bundle("small", files, tmp_path)
    (tmp_path / "small.zip").unlink()
    with pytest.raises(OutputError, match="is there already"):
        write_bundle("small", files, tmp_path)


def test_nowhere_to_write(files, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(OutputError, match="cannot be written"):
        write_bundle("small", files, tmp_path / "file" / "folder")


@pytest.mark.parametrize("form", ["small.zip", "small"])
def test_import_takes_data_only(form, files, tmp_path):
    write_bundle("small", files, tmp_path)
    assert import_bundle(tmp_path / form, tmp_path / "bundles") == "small"
    root = tmp_path / "bundles" / "small"
    found = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    config = {"configs/inference.json": files["configs/inference.json"].replace(b"scripts._common", b"common")}
    assert found == {place: files[place] for place in files if not place.startswith("scripts/")} | config
    with pytest.raises(OutputError, match="is there already"):
        import_bundle(tmp_path / form, tmp_path / "bundles")


def test_what_running_leaves_in_a_folder_does_not_matter(files, tmp_path):
    write_bundle("small", files, tmp_path)
    for left in ("eval/case/run.json", "scripts/__pycache__/__init__.cpython-311.pyc"):
        (tmp_path / "small" / left).parent.mkdir(parents=True)
        (tmp_path / "small" / left).write_bytes(b"left")
    assert read_bundle(tmp_path / "small") == files


@pytest.mark.parametrize("place", ["models/model.pt", "configs/inference.json", "scripts/_common/methods/dae.py"])
def test_changed_file(place, files, tmp_path):
    changed = bytearray(files[place])
    changed[len(changed) // 2] ^= 1
    path = make_zip(tmp_path / "small.zip", {**files, place: bytes(changed), SUMS: sums(files)})
    refused(path, tmp_path, f"{place} is not what SHA256SUMS says")
    write_bundle("small", files, tmp_path / "folder")
    (tmp_path / "folder" / "small" / place).write_bytes(bytes(changed))
    refused(tmp_path / "folder" / "small", tmp_path, f"{place} is not what SHA256SUMS says")


def test_file_too_many_or_too_few(files, tmp_path):
    write_bundle("small", files, tmp_path)
    extra = tmp_path / "small" / "configs" / "extra.json"
    extra.write_text("{}", encoding="utf-8")
    refused(tmp_path / "small", tmp_path, "holds configs/extra.json, which SHA256SUMS does not list")
    extra.unlink()
    (tmp_path / "small" / "LICENSE").unlink()
    refused(tmp_path / "small", tmp_path, "lacks LICENSE, which SHA256SUMS lists")
    (tmp_path / "small" / SUMS).unlink()
    refused(tmp_path / "small", tmp_path, "no SHA256SUMS")


@pytest.mark.parametrize("place", ["../evil.json", "/evil.json", "small/../../evil", "..\\evil", "C:\\evil"])
def test_path_out_of_the_archive(place, files, tmp_path):
    path = make_zip(tmp_path / "small.zip", files)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr(place, b"evil")
    refused(path, tmp_path, "would be written elsewhere")


def test_links(files, tmp_path):
    path = make_zip(tmp_path / "small.zip", files)
    with zipfile.ZipFile(path, "a") as file:
        entry = zipfile.ZipInfo("small/docs/link")
        entry.create_system, entry.external_attr = 3, 0o120777 << 16
        file.writestr(entry, "/etc/passwd")
    refused(path, tmp_path, "docs/link is a link or a device")
    write_bundle("small", files, tmp_path / "folder")
    (tmp_path / "folder" / "small" / "docs" / "link").symlink_to("/etc/passwd")
    refused(tmp_path / "folder" / "small", tmp_path, "docs/link is a link")


class Evil:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (self.path.mkdir, ())


@pytest.mark.parametrize("save", [pickle.dumps, None], ids=["pickle", "torch"])
def test_pickles(save, files, tmp_path):
    if save is None:
        torch.save({"w": Evil(tmp_path / "ran")}, tmp_path / "evil.pt")
        files["models/model.pt"] = (tmp_path / "evil.pt").read_bytes()
    else:
        files["models/model.pt"] = save({"w": Evil(tmp_path / "ran")})
    refused(make_zip(tmp_path / "small.zip", files), tmp_path, r"models/model.pt: not a weights file")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["extra.pkl", "model.ts", "deep/extra.onnx"])
def test_other_files_beside_the_weights(name, files, tmp_path):
    files[f"models/{name}"] = b"what?"
    refused(make_zip(tmp_path / "small.zip", files), tmp_path, f"models/{name}: not a weights file")


def test_not_an_archive(files, tmp_path):
    path = tmp_path / "small.zip"
    refused(path, tmp_path, "not a readable zip archive")
    path.write_bytes(b"PK\x03\x04 nothing")
    refused(path, tmp_path, "not a readable zip archive")
    whole = make_zip(path, files).read_bytes()
    path.write_bytes(whole.replace(b"raise SystemExit", b"raise SystemEx1t"))
    refused(path, tmp_path, "not a readable zip archive")
    path.write_bytes(whole[: len(whole) // 2])
    refused(path, tmp_path, "not a readable zip archive")


def test_not_one_folder(files, tmp_path):
    refused(make_zip(tmp_path / "a.zip", files, top=""), tmp_path, "not one folder")
    path = make_zip(tmp_path / "b.zip", files)
    with zipfile.ZipFile(path, "a") as file, pytest.warns(UserWarning, match="Duplicate name"):
        file.writestr("small/LICENSE", b"another")
    refused(path, tmp_path, "two files of one name")


def test_too_large(files, tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "MAX_BYTES", 100)
    refused(make_zip(tmp_path / "small.zip", files), tmp_path, "GB unpacked")
    write_bundle("small", files, tmp_path / "folder")
    refused(tmp_path / "folder" / "small", tmp_path, "GB unpacked")


@pytest.mark.parametrize("metadata", [{"name": "../evil"}, {"name": ".."}, {"name": 3}, {}, [], None])
def test_name_that_is_no_folder(metadata, files, tmp_path):
    files["configs/metadata.json"] = json.dumps(metadata).encode()
    refused(make_zip(tmp_path / "small.zip", files), tmp_path, "cannot name a bundle|no name in")


@pytest.mark.parametrize(
    ("config", "match"),
    [(b'"scripts._common.methods.dae.New"', "names common.methods.dae.New"), (b"\xff", "not UTF-8")],
)
def test_config_of_another_version(config, match, files, tmp_path):
    files["configs/train.json"] = config
    refused(make_zip(tmp_path / "small.zip", files), tmp_path, match)
