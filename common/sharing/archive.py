"""Exported bundles as files: written so that the same content gives the same bytes, read with distrust."""

from __future__ import annotations

import hashlib
import io
import json
import re
import stat
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from zipfile import ZIP_DEFLATED, BadZipFile, ZipFile, ZipInfo

from ..errors import BundleError, OutputError
from ..files import partial_folder, replacing
from ..outputs import Inputs
from ..weights import load_weights
from .vendor import bundle_config, is_config, named_modules

PARTS = {"LICENSE", "configs", "docs", "models"}  # what a bundle consists of; running it leaves more
LEFT = {"eval", "runs", "__pycache__"}
SUMS = "SHA256SUMS"  # as the program sha256sum writes and checks it
MAX_BYTES = 2**30  # unpacked; the bundles here are below 25 MB a file
AGAIN = "export or download it again"

Files = Mapping[str, bytes]  # by their paths in the bundle, with "/"


def write_bundle(name: str, files: Files, folder: Path) -> Path:
    """Write `files` and their sums as `folder/name` and `folder/name.zip`; return the latter. Raises OutputError."""
    target, archive = folder / name, folder / f"{name}.zip"
    files = dict(sorted(files.items()))
    files[SUMS] = "".join(f"{_sha256(content)}  {path}\n" for path, content in files.items()).encode()
    with _writing(target, archive), replacing(archive) as temporary, _whole_folder(target) as partial:
        temporary.write_bytes(zipped({f"{name}/{path}": content for path, content in files.items()}))
        _write_files(files, partial)
    return archive


def write_new(path: Path, content: bytes) -> Path:
    """Write a file and return its path. Raises OutputError where it is there already."""
    with _writing(path), replacing(path) as temporary:
        temporary.write_bytes(content)
    return path


def write_folder(files: Files, folder: Path) -> Path:
    """Write `files` as a new folder and return it. Raises OutputError."""
    with _writing(folder), _whole_folder(folder) as partial:
        _write_files(files, partial)
    return folder


def import_bundle(path: Path, bundles: Path, others: Iterable[Path] = ()) -> str:
    """Unpack an exported bundle, zip or folder, into `bundles` and return its key; none of `others` may have it.

    Only what is data is taken: configs, weights and documents. Its copy of this package stays behind, the configs name
    the installed one again. Everything is checked before anything appears. Raises BundleError, OutputError.
    """
    files = read_bundle(path)
    name = _key(path, files)
    Inputs([path]).check([bundles / name])
    kept = {place: content for place, content in files.items() if place.split("/")[0] in PARTS}
    for place in filter(is_config, kept):
        try:
            kept[place] = bundle_config(kept[place])
            named_modules(kept[place], f"{path}, {place}")
        except UnicodeDecodeError:
            raise BundleError(f"{path}, {place}", "not UTF-8", AGAIN) from None
    with _writing(bundles / name, *(folder / name for folder in others)), _whole_folder(bundles / name) as partial:
        _write_files(kept, partial)
        for place in kept:
            if place.startswith("models/"):
                _check_weights(partial, place, path)
    return name


def read_bundle(path: Path) -> dict[str, bytes]:
    """The files of an exported bundle, those and only those that its sums list, unchanged. Raises BundleError."""
    files = _read_folder(path) if path.is_dir() else _read_zip(path)
    if SUMS not in files:
        raise BundleError(path, f"no {SUMS}, so not an exported bundle", "export it with `uad export`")
    lines = files.pop(SUMS).decode("utf-8", "replace").splitlines()
    sums = {place: digest for digest, _, place in (line.partition("  ") for line in lines)}
    if unlisted := sorted(files.keys() - sums.keys()):
        raise BundleError(path, f"holds {unlisted[0]}, which {SUMS} does not list", AGAIN)
    if missing := sorted(sums.keys() - files.keys()):
        raise BundleError(path, f"lacks {missing[0]}, which {SUMS} lists", AGAIN)
    if changed := [place for place, content in files.items() if sums[place] != _sha256(content)]:
        raise BundleError(path, f"{changed[0]} is not what {SUMS} says", AGAIN)
    return files


def _key(path: Path, files: Files) -> str:
    """The name in the metadata, which is going to be a folder."""
    try:
        name = json.loads(files["configs/metadata.json"])["name"]
    except (KeyError, TypeError, ValueError):
        raise BundleError(path, "no name in configs/metadata.json", AGAIN) from None
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise BundleError(path, f"{name!r} cannot name a bundle", "use small letters, digits and _")
    return name


def _check_weights(folder: Path, place: str, source: Path) -> None:
    """Tensors only: whatever else could be in `models` (pickles, TorchScript) may run code when it is loaded."""
    if not place.endswith(".pt"):
        raise BundleError(f"{source}, {place}", "not a weights file", "leave only state dicts, *.pt, in models")
    try:
        load_weights(folder / place)
    except BundleError as error:
        raise BundleError(f"{source}, {place}", error.fact, error.remedy) from error


def _read_folder(path: Path) -> dict[str, bytes]:
    places = {place.relative_to(path).as_posix(): place for place in sorted(path.rglob("*"))}
    if links := [place for place, file in places.items() if file.is_symlink()]:
        raise BundleError(path, f"{links[0]} is a link", "put the file itself there")
    files = {place: file for place, file in places.items() if file.is_file() and not LEFT & set(file.parts)}
    _check_size(path, sum(file.stat().st_size for file in files.values()))
    return {place: file.read_bytes() for place, file in files.items()}


def _read_zip(path: Path) -> dict[str, bytes]:
    """By the paths below the one folder that all is in."""
    try:
        with ZipFile(path) as archive:
            entries = archive.infolist()
            for entry in entries:
                _check_entry(path, entry)
            _check_size(path, sum(entry.file_size for entry in entries))
            files = {entry.filename: archive.read(entry) for entry in entries if not entry.is_dir()}
    except (OSError, BadZipFile, EOFError, zlib.error, NotImplementedError, RuntimeError) as error:
        raise BundleError(path, f"not a readable zip archive ({error})", AGAIN) from error
    names = [entry.filename for entry in entries]
    if len(set(names)) < len(names):
        raise BundleError(path, "two files of one name", AGAIN)
    if len({name.split("/")[0] for name in names}) != 1:
        raise BundleError(path, "not one folder with a bundle", AGAIN)
    return {name.partition("/")[2]: content for name, content in files.items()}


def _check_entry(path: Path, entry: ZipInfo) -> None:
    place = PurePosixPath(entry.filename)
    if place.is_absolute() or ".." in place.parts or re.search(r"[\\:]", entry.orig_filename):
        raise BundleError(path, f"{entry.orig_filename} would be written elsewhere", "do not use this archive")
    if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise BundleError(path, f"{entry.filename} is a link or a device", "do not use this archive")


def _check_size(path: Path, size: int) -> None:
    if size > MAX_BYTES:
        raise BundleError(path, f"{size / 2**30:.1f} GB unpacked", "a bundle is smaller: do not use this one")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def zipped(files: Files, compression: int = ZIP_DEFLATED) -> bytes:
    """A zip archive without times and owners: the same bytes whenever it is written."""
    buffer = io.BytesIO()
    with ZipFile(buffer, "w") as archive:
        for place, content in files.items():
            entry = ZipInfo(place)  # of 1980
            entry.create_system, entry.external_attr, entry.compress_type = 3, 0o100644 << 16, compression
            archive.writestr(entry, content)
    return buffer.getvalue()


def _write_files(files: Files, folder: Path) -> None:
    for place, content in files.items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_bytes(content)


@contextmanager
def _writing(*paths: Path) -> Iterator[None]:
    """Raises OutputError where something is there already, or cannot be written."""
    if taken := [path for path in paths if path.exists()]:
        raise OutputError(taken[0], "is there already", "remove it, or choose another folder", output="FOLDER")
    try:
        yield
    except OSError as error:
        fact = f"cannot be written ({error.strerror or error})"
        raise OutputError(paths[0], fact, "choose another folder, or make room in it") from error


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder beside `folder`, which it becomes if the block succeeds."""
    with partial_folder(folder.parent, folder.name) as partial:
        yield partial
        partial.rename(folder)
