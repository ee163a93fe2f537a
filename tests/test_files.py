"""Files and folders appear whole or not at all, also where several processes write them."""

from __future__ import annotations

import os

import pytest

from common.files import discard_partial, partial_folder, replacing


def test_file_appears_when_the_block_succeeds(tmp_path):
    path = tmp_path / "a" / "b" / "result.nii.gz"
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
        assert temporary.parent == path.parent
        assert temporary.name.endswith(".nii.gz")  # writers look at the suffixes
        assert temporary.name.startswith(".")
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_old_file_is_replaced(tmp_path):
    path = tmp_path / "file"
    path.write_text("a long old text")
    with replacing(str(path)) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "a long old text"
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_old_file_stays_when_the_block_fails(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(error), replacing(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_is_left_when_the_block_fails_at_once(tmp_path):
    with pytest.raises(ValueError, match="at once"), replacing(tmp_path / "file"):
        raise ValueError("at once")
    assert list(tmp_path.iterdir()) == []


def test_two_at_once_do_not_mix(tmp_path):
    path = tmp_path / "file"
    with replacing(path) as first, replacing(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_is_replaced_and_not_what_it_leads_to(tmp_path):
    (tmp_path / "original").write_text("original")
    (tmp_path / "link").symlink_to(tmp_path / "original")
    with replacing(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "original").read_text() == "original"
    assert (tmp_path / "link").read_text() == "new"
    assert not (tmp_path / "link").is_symlink()


def test_only_what_killed_processes_left_is_discarded(tmp_path):
    """By its whole name: a case may be called like the beginning or the end of another."""
    with partial_folder(tmp_path, "a") as folder, partial_folder(tmp_path, "b-a") as other:
        (folder / "x").write_text("x")
        kept = [other, tmp_path / ".partial-a", tmp_path / ".partial-mine-a"]
        for path in kept[1:]:
            path.mkdir()
        with partial_folder(tmp_path, "a"):
            assert folder.is_dir()  # another process may be at it
        os.utime(folder, (0, 0))
        with partial_folder(tmp_path, "a"):
            assert not folder.exists()  # for hours nobody was
        folder.mkdir()
        discard_partial(tmp_path, "a")
        assert not folder.exists()
        assert all(path.is_dir() for path in kept)
