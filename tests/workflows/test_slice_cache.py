"""Slices on disk: those of the memory, read again only where nothing has changed, and prepared once for all."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from common.errors import ImageFileError, OutputError, SettingError
from common.locks import locked
from common.recorded import Recorded
from common.workflows import slice_cache
from common.workflows.slices import SliceDataset, latents, shuffled

SUBJECTS = 5


class Preparation(Recorded):
    """Reads an array and multiplies it; one line of `log` for each time."""

    unrecorded = frozenset({"log"})

    def __init__(self, factor: float = 1.0, log: str | None = None) -> None:
        self.factor = factor
        self.log = log

    def __call__(self, item):
        if self.log is not None:
            with Path(self.log).open("a", encoding="utf-8") as file:
                file.write(f"{item['subject']}\n")
        try:
            values = np.load(item["image"])
        except ValueError as error:
            raise ImageFileError(item["image"], "is damaged", "copy it again") from error
        return {"image": MetaTensor(torch.from_numpy(values * np.float32(self.factor)))}


@pytest.fixture
def data(tmp_path):
    """Volumes (1, 4, 6, 5), of which slice k has 4 k foreground pixels; one has no foreground at all."""
    items = []
    for number in range(SUBJECTS):
        image = np.zeros((1, 4, 6, 5), np.float32)
        for k in range(5 * (number != 2)):
            image[0, :k, :4, k] = (number + 1) / 10 + k / 100
        path = tmp_path / f"{number}.npy"
        np.save(path, image)
        items.append({"subject": str(number), "image": str(path)})
    return items


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log"


def subjects_in(log):
    return log.read_text(encoding="utf-8").split() if log.exists() else []


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize("settings", [{}, {"axis": 1}, {"min_foreground": 12}])
def test_slices_are_those_of_the_memory(processes, settings, data, log, tmp_path):
    cached = SliceDataset(
        data, Preparation(log=str(log)), cache_dir=tmp_path / "cache", processes=processes, **settings
    )
    plain = SliceDataset(data, Preparation(), **settings)
    assert len(cached) == len(plain) > 0
    assert sorted(subjects_in(log)) == [str(number) for number in range(SUBJECTS)]
    for index in range(len(plain)):
        for key, expected in plain[index].items():
            assert torch.equal(cached[index][key], expected)
            assert cached[index][key].dtype == expected.dtype
    with pytest.raises(IndexError):
        cached[len(cached)]


def test_batches_are_those_of_the_memory(data, tmp_path):
    def batches(**where):
        dataset = SliceDataset(data, Preparation(), augmentation=[noisy], **where)
        torch.manual_seed(3)
        return [batch["image"] for batch in shuffled(dataset, batch_size=4)]

    plain, cached = batches(), batches(cache_dir=tmp_path / "cache")
    assert len(plain) == 4
    assert all(map(torch.equal, plain, cached))


def noisy(item):
    return {**item, "image": item["image"] + torch.rand(())}


def test_nothing_is_prepared_twice(data, log, tmp_path):
    for number in (3, SUBJECTS):
        SliceDataset(data[:number], Preparation(log=str(log)), cache_dir=tmp_path / "cache")
    assert subjects_in(log) == [item["subject"] for item in data]


def other_setting(data, monkeypatch):
    return {"preprocessing": Preparation(factor=0.5)}


def other_axis(data, monkeypatch):
    return {"axis": 0}


def other_foreground(data, monkeypatch):
    return {"min_foreground": 5}


def other_program(data, monkeypatch):
    monkeypatch.setattr(slice_cache, "ROOMS", ("images",))
    return {}


def other_package(data, monkeypatch):
    monkeypatch.setattr(slice_cache, "version", lambda name: "0.0.1")
    return {}


def other_image(data, monkeypatch):
    for item in data:
        np.save(item["image"], np.load(item["image"]) / 2)
        os.utime(item["image"], ns=(0, 1))
    return {}


@pytest.mark.parametrize(
    "change", [other_setting, other_axis, other_foreground, other_program, other_package, other_image]
)
def test_what_was_prepared_in_another_way_is_not_read(change, data, log, tmp_path, monkeypatch):
    """And what is left of it harms nobody."""
    cache, preparation = tmp_path / "cache", Preparation(log=str(log))
    SliceDataset(data, preparation, cache_dir=cache)
    settings = {"preprocessing": preparation} | change(data, monkeypatch)
    changed = SliceDataset(data, **settings, cache_dir=cache)
    again = SliceDataset(data, **settings, cache_dir=cache)
    expected = SliceDataset(data, **settings)
    assert len(changed) == len(again) == len(expected)
    for index in range(len(expected)):
        assert torch.equal(changed[index]["image"], expected[index]["image"])
    assert len(list(cache.iterdir())) == 2 * SUBJECTS


def test_processes_share_the_work(data, log, tmp_path):
    """As those of `torchrun`: each comes with the whole list."""
    fork = multiprocessing.get_context("fork")
    arguments = (data, str(log), str(tmp_path / "cache"))
    others = [fork.Process(target=fill, args=arguments) for _ in range(3)]
    for process in others:
        process.start()
    for process in others:
        process.join(600)
    assert [process.exitcode for process in others] == [0] * 3
    assert sorted(subjects_in(log)) == [str(number) for number in range(SUBJECTS)]
    assert len(list((tmp_path / "cache").iterdir())) == SUBJECTS  # neither locks nor what is half-written


def fill(data, log, cache, begin=None):
    torch.set_num_threads(1)
    if begin is not None:
        begin.wait()
    preparation = Preparation(log=log)

    def slow(item):
        time.sleep(0.05)
        return Preparation.__call__(preparation, item)

    dataset = SliceDataset([], Preparation(), cache_dir=cache)
    dataset.preprocessing = slow
    slice_cache.SliceCache(cache, data, dataset._slices, [preparation, 2, 1, None])


def test_volume_that_another_process_is_at_is_waited_for(data, tmp_path):
    cache = tmp_path / "cache"
    first = SliceDataset(data, Preparation(), cache_dir=cache)
    file = first.images.files[1]
    content = file.read_bytes()
    file.unlink()
    fork = multiprocessing.get_context("fork")
    begin = fork.Event()
    other = fork.Process(target=fill, args=(data, str(tmp_path / "log"), str(cache), begin))
    other.start()  # before the lock is taken, which it would inherit
    with locked(cache, file.name, wait=False) as free:
        assert free
        begin.set()
        other.join(0.5)
        assert other.is_alive()
        file.write_bytes(content)
    other.join(600)
    assert other.exitcode == 0
    assert subjects_in(tmp_path / "log") == []


@pytest.mark.parametrize("processes", [1, 2])
def test_damaged_volume_is_named_after_all_others_are_there(processes, data, log, tmp_path):
    Path(data[1]["image"]).write_bytes(b"no array")
    cache = tmp_path / "cache"
    with pytest.raises(ImageFileError, match="is damaged"):
        SliceDataset(data, Preparation(log=str(log)), cache_dir=cache, processes=processes)
    assert len(list(cache.iterdir())) == SUBJECTS - 1
    assert subjects_in(log)[-1] == "1"


def test_folder_that_cannot_be_written_is_refused(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        SliceDataset(data, Preparation(), cache_dir=tmp_path / "file" / "cache")


def test_full_disk_stops_at_once(data, log, tmp_path, monkeypatch):
    def full(path, slices):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(slice_cache.np, "save", full)
    with pytest.raises(OutputError, match="No space left"):
        SliceDataset(data, Preparation(log=str(log)), cache_dir=tmp_path / "cache")
    assert set(subjects_in(log)) == {"0"}


def test_what_cannot_be_told_from_another_is_refused(data, tmp_path):
    with pytest.raises(SettingError, match="in memory"):
        SliceDataset([{"subject": "a", "image": torch.zeros(1, 2, 2, 2)}], Preparation(), cache_dir=tmp_path)
    with pytest.raises(SettingError, match="does not record its settings"):
        SliceDataset(data, lambda item: item, cache_dir=tmp_path)


def test_latents_of_cached_slices(data, tmp_path):
    class Half(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one = torch.nn.Parameter(torch.ones(()))

        def posterior(self, image):
            return image / 2, torch.ones_like(image)

    plain = latents(data, Preparation(), Half())
    cached = latents(data, Preparation(), Half(), cache_dir=tmp_path / "cache")
    assert torch.equal(plain.mean, cached.mean)
    assert len(list((tmp_path / "cache").iterdir())) == SUBJECTS
