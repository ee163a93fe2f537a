"""Weights files: safe to load, half the size, never half-written."""

from __future__ import annotations

import functools
import hashlib
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from torch import Tensor, nn

from .errors import BundleError, first_few
from .files import replacing
from .images.itk_image import voxel_files


def load_weights(path: str | Path | None) -> dict[str, Any]:
    """Read a state dict onto the CPU, tensors only; change none of them in place. Raises BundleError."""
    return dict(_read(path)[0])


def weights_sha256(path: str | Path | None) -> str:
    """Hexadecimal digest of a weights file, of the bytes that `load_weights` gives the tensors of. Raises BundleError.

    The two read a file once, however often and in whatever order they are called, until it is changed.
    """
    return _read(path)[1]


def _read(path: str | Path | None) -> tuple[dict[str, Any], str]:
    if path is None or not Path(path).is_file():
        raise BundleError(path, "no weights", "train the bundle, or download its models/model.pt")
    about = Path(path).stat()
    return _read_once(Path(path).absolute(), (about.st_ino, about.st_size, about.st_mtime_ns))


@functools.lru_cache(maxsize=1)
def _read_once(path: Path, version: tuple[int, ...]) -> tuple[dict[str, Any], str]:
    """version: tells the file from another one that took its place."""
    try:
        content = path.read_bytes()
        with ZipFile(io.BytesIO(content)) as archive:
            if damaged := archive.testzip():  # torch.load does not look at the checksums
                raise BadZipFile(f"wrong checksum of {damaged}")
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in many ways, with KeyError and OSError among them
        cause = type(error).__name__
        raise BundleError(path, f"not a weights file ({cause})", "download or train it again") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise BundleError(path, "not a weights file (no state dict of tensors)", "give the bundle's models/model.pt")
    return state, hashlib.sha256(content).hexdigest()


def load_into(module: nn.Module, path: str | Path) -> None:
    """Read a state dict into a module, strictly. Raises BundleError where the file or its names do not fit."""
    _load(module, load_weights(path), path)


def _load(module: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        fact = f"the weights do not fit the network ({_misfits(str(error))})"
        raise BundleError(path, fact, "use those of this bundle and config") from None


def _misfits(error: str) -> str:
    """What PyTorch says of a state dict that does not fit, with a few names of each kind, since it lists them all."""
    shapes = re.findall(r"size mismatch for (\S+): .*?torch\.Size\((.*?)\).*?torch\.Size\((.*?)\)", error)
    found = {"of another shape": [f"{name} {given} instead of {wanted}" for name, given, wanted in shapes]}
    for kind, begins in (("missing", "Missing key"), ("not of this network", "Unexpected key")):
        lines = (line for line in error.splitlines() if line.strip().startswith(begins))
        found[kind] = [name for line in lines for name in re.findall('"(.+?)"', line)]
    parts = [f"{kind}: {first_few(names)}" for kind, names in found.items() if names]
    return "; ".join(parts) or error.splitlines()[-1].strip()


def load_networks(module: nn.Module, path: str | Path, new: Sequence[str] = ()) -> None:
    """Read the networks alone of a bundle's weights, to train them on: calibration and preparation are not theirs.

    module: its `network_def`. new: parts of its detector that the weights of another method do not have, which stay as
    they are. Raises BundleError where the file or its names do not fit.
    """
    trained = {name: value for name, value in load_weights(path).items() if name.startswith("detector.")}
    kept = tuple(f"detector.{part}." for part in new)
    own = {n: v for n, v in module.state_dict().items() if not n.startswith("detector.") or n.startswith(kept)}
    _load(module, own | trained, path)


def save_weights(state_dict: Mapping[str, Tensor], path: str | Path) -> None:
    """Write a state dict, float32 in half precision (float64 buffers, such as thresholds, as they are).

    The same tensors make the same bytes: given a path, torch would put its name into the file.
    """
    compact = {
        name: value.detach().cpu().half() if value.dtype == torch.float32 else value.detach().cpu()
        for name, value in state_dict.items()
    }
    with replacing(path) as temporary, temporary.open("wb") as file:
        torch.save(compact, file)


def sha256(path: str | Path) -> str:
    """Hexadecimal digest of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(image: str | Path | Iterable[str | Path]) -> str:
    """The digest of a file; of a folder (a DICOM series), of several images or of a header and the files of its voxels
    that of their digests."""
    if not isinstance(image, (str, Path)):
        parts = [digest(path) for path in image]
    elif Path(image).is_dir():
        parts = [sha256(path) for path in sorted(Path(image).rglob("*")) if path.is_file()]
    elif voxels := voxel_files(image):
        parts = [sha256(path) for path in (image, *voxels)]
    else:
        return sha256(image)
    return hashlib.sha256("".join(parts).encode()).hexdigest()
