import pytest

from common.files import replacing


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
