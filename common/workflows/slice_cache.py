"""Slices of prepared volumes on disk: what a cohort that is larger than the memory trains on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..errors import OutputError, SettingError
from ..files import discard_partial, replacing
from ..locks import locked
from ..outputs import input_files
from ..recorded import describe, digest_of

PACKAGE = Path(__file__).resolve().parents[1]
ROOMS = ("images", "transforms")  # whose programs prepare an image, with these packages
PACKAGES = ("monai", "nibabel", "numpy", "scipy", "SimpleITK", "torch")


class SliceCache:
    """Slices (C, H, W) float16 of many volumes, one file a volume, of which a slice is read when it is asked for.

    The name of a file tells the image that it was made of (its path, size and time) and how: the settings of the
    preparation, the programs and the versions of the packages. What was made of another image or in another way is
    therefore never read; it stays until somebody deletes the folder.

    Several processes may fill one cache at the same time, those of `torchrun` or separate ones: each takes the volumes
    that no other one is at, and all of them find the whole cache in the end.

    Args:
        folder: made if it is not there.
        data: MONAI datalist of volumes, which are files.
        prepare: makes of an item its slices (n, C, H, W) float16; their number may be 0.
        settings: all that `prepare` depends on beside the item, as `describe` takes it.
        processes: that prepare volumes at the same time, beside those of `torchrun`.

    Raises OutputError where the folder cannot be written, and what `prepare` raises of the first item that it does not
    take, after all others are prepared.
    """

    def __init__(
        self,
        folder: str | Path,
        data: Sequence[Mapping[str, Any]],
        prepare: Callable[[Mapping[str, Any]], Tensor],
        settings: object,
        processes: int = 1,
    ) -> None:
        self.folder = Path(folder)
        self.data = data
        self.prepare = prepare
        way = digest_of([describe(settings), _programs()])
        self.files = [self.folder / f"{digest_of([_identity(item), way])}.npy" for item in data]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._fill(processes)
        except OSError as error:
            fact = f"cannot be written ({error.strerror or error})"
            raise OutputError(self.folder, fact, "choose another folder, or make room in it") from error
        counts = [len(np.load(file, mmap_mode="r")) for file in self.files]
        self.ends = np.cumsum(counts, dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, index: int) -> Tensor:
        """(C, H, W) float16."""
        if not 0 <= index < len(self):
            raise IndexError(f"slice {index} of {len(self)}")
        number = int(np.searchsorted(self.ends, index, side="right"))
        position = index - int(self.ends[number])  # counted from the end of the file
        return torch.from_numpy(np.array(np.load(self.files[number], mmap_mode="r")[position]))

    def _fill(self, processes: int) -> None:
        missing = [number for number, file in enumerate(self.files) if not file.is_file()]
        workers = processes if processes > 1 and len(missing) > 1 else 0
        loader = DataLoader(_Missing(self, missing), batch_size=None, num_workers=workers)
        for goes_on in tqdm(loader, total=len(missing), desc="prepare", disable=None):
            if not goes_on:
                break
        for number in missing:  # those that another process was at, and those that failed
            with locked(self.folder, self.files[number].name):
                self.write(number)

    def write(self, number: int) -> None:
        """Prepare a volume, unless its file is there."""
        file = self.files[number]
        if file.is_file():
            return
        slices = self.prepare(self.data[number]).numpy()
        discard_partial(self.folder, file.name)
        with replacing(file) as temporary:
            np.save(temporary, slices)


class _Missing(Dataset):
    """Prepares a volume of a cache for each index, where no other process is at it and nothing is wrong with it."""

    def __init__(self, cache: SliceCache, missing: Sequence[int]) -> None:
        self.cache = cache
        self.missing = missing

    def __len__(self) -> int:
        return len(self.missing)

    def __getitem__(self, index: int) -> bool:
        """Whether the next one may succeed; the cache tries again what failed, and raises what the matter is."""
        number = self.missing[index]
        with locked(self.cache.folder, self.cache.files[number].name, wait=False) as free:
            try:
                if free:
                    self.cache.write(number)
            except Exception as error:
                return not isinstance(error, OSError)  # a full disk
        return True


def _identity(item: Mapping[str, Any]) -> list[Any]:
    """What tells the volumes of an item from others: its texts and numbers, and of its files the size and the time."""
    if in_memory := [key for key, value in item.items() if isinstance(value, (Tensor, np.ndarray))]:
        fact = f"{in_memory[0]!r} of an item is in memory, where nobody knows whether it has changed"
        raise SettingError("cache_dir", fact, "give the path of a file, or leave out the cache")
    return [describe(item), *([str(file), *_state(Path(file))] for file in input_files([item]))]


def _state(path: Path) -> list[int]:
    """Size and time of a file, or of all files of a folder; nothing where there is none, as `prepare` will say."""
    paths = sorted(path.rglob("*")) if path.is_dir() else [path]
    states = [one.stat() for one in paths if one.exists()]
    return [number for state in states for number in (state.st_size, state.st_mtime_ns)]


def _programs() -> list[str]:
    """A digest of the programs that prepare images, and the versions of the packages."""
    content = hashlib.sha256()
    for path in sorted(path for room in ROOMS for path in (PACKAGE / room).rglob("*.py")):
        content.update(path.read_bytes())
    return [content.hexdigest(), *map(version, PACKAGES)]
