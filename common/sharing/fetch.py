"""Weights that are too large for a wheel: fetched once, checked against the sha256 that the bundle names."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import IO
from urllib.request import urlopen

from .. import bundle
from ..errors import BundleError, OutputError
from ..files import replacing
from ..progress import Progress

CHUNK = 2**20
MAX_BYTES = 2**30
TIMEOUT_S = 60


def fetch_weights(name: str, source: str | None) -> Path:
    """Put the weights of a bundle where `bundle.weights_place` says, unless they are there, and return that place.

    source: a folder with this project's files, or the address of one (http, https). Raises BundleError where they are
    not there, or are others; OutputError. Nothing but the right file is left.
    """
    place, large = bundle.weights_place(name), bundle.large_file(name)
    if place.is_file() and (large is None or _is_whole(place, large["hash_val"])):
        return place
    if large is None:
        raise BundleError(name, "has no weights that could be fetched", "train it")
    if source is None:
        fact = "its weights are not on this machine, and nothing says where to fetch them from"
        raise BundleError(
            name, fact, "set UAD_WEIGHTS_URL to the address of this project's files", from_="FOLDER_OR_URL"
        )
    try:
        with replacing(place) as temporary, _opened(source, large["url"]) as (file, size), temporary.open("wb") as copy:
            found = _copied(file, copy, name, size)
            if found != large["hash_val"]:
                fact = f"these are not the weights of {name} (sha256 {found}, not {large['hash_val']})"
                raise BundleError(_place(source, large["url"]), fact, "fetch them from where this version is")
    except OSError as error:
        fact = f"cannot be written ({error.strerror or error})"
        raise OutputError(place, fact, "make room, or set UAD_BUNDLES to another folder") from error
    return place


def _is_whole(path: Path, sha256: str) -> bool:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256


def _place(source: str, url: str) -> str:
    return f"{source.rstrip('/')}/{url}"


@contextmanager
def _opened(source: str, url: str) -> Iterator[tuple[IO[bytes], int]]:
    """The file, and how many bytes it is said to have. Raises BundleError where there is none."""
    place = _place(source, url)
    try:
        if re.match(r"https?://", source):
            opened = urlopen(place, timeout=TIMEOUT_S)  # noqa: S310 - http or https, and the content is checked
            size = int(opened.headers.get("Content-Length") or 0)
        else:
            opened = Path(place).open("rb")  # noqa: SIM115 - closed below
            size = Path(place).stat().st_size
    except (OSError, HTTPException, ValueError) as error:
        fact = f"cannot be read ({getattr(error, 'reason', None) or getattr(error, 'strerror', None) or error})"
        remedy = "check the address, or the network, or give the folder of a clone"
        raise BundleError(place, fact, remedy, from_="FOLDER_OR_URL") from error
    with opened:
        yield opened, size


def _copied(file: IO[bytes], copy: IO[bytes], name: str, size: int) -> str:
    """Copy, with progress; the sha256 of what was copied. Raises BundleError where it does not end, or breaks off."""
    digest, done = hashlib.sha256(), 0
    with Progress(1, "file") as progress:
        progress.begin(name)
        while chunk := _read(file, name):
            done += len(chunk)
            if done > MAX_BYTES:
                raise BundleError(name, "what is sent is too large to be weights", "fetch them from another address")
            digest.update(chunk)
            copy.write(chunk)
            progress.step(done // CHUNK, max(size, done) // CHUNK, "MB")
        progress.end()
    return digest.hexdigest()


def _read(file: IO[bytes], name: str) -> bytes:
    try:
        return file.read(CHUNK)
    except (OSError, HTTPException) as error:
        raise BundleError(name, f"the transfer broke off ({error})", "fetch them again") from error
