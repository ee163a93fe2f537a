import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from common.errors import BundleError
from common.weights import load_into, load_networks, load_weights, save_weights, sha256, weights_sha256


def state_dict():
    return {
        "layer.weight": torch.randn(20, 30, generator=torch.Generator().manual_seed(0)),
        "threshold": torch.tensor(1 / 3, dtype=torch.float64),
        "subjects": torch.tensor(7),
        "flags": torch.tensor([True, False]),
    }


@pytest.fixture
def weights(tmp_path):
    save_weights(state_dict(), tmp_path / "model.pt")
    return tmp_path / "model.pt"


class Code:
    """Unpickled, it makes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_float32_is_stored_in_half_precision_and_the_rest_exactly(weights):
    stored = load_weights(weights)
    expected = state_dict()
    assert stored.keys() == expected.keys()
    assert stored["layer.weight"].dtype == torch.float16
    torch.testing.assert_close(stored["layer.weight"].float(), expected["layer.weight"], rtol=1e-3, atol=1e-6)
    for name in ("threshold", "subjects", "flags"):
        assert stored[name].dtype == expected[name].dtype
        assert torch.equal(stored[name], expected[name])


def test_the_same_weights_are_the_same_bytes_under_any_name(weights, tmp_path):
    save_weights(load_weights(weights), tmp_path / "other.pt")
    assert (tmp_path / "other.pt").read_bytes() == weights.read_bytes()


def test_parameters_are_stored_without_their_gradients(tmp_path):
    save_weights({"weight": torch.nn.Parameter(torch.ones(2))}, tmp_path / "model.pt")
    assert not load_weights(tmp_path / "model.pt")["weight"].requires_grad


def test_half_the_size(tmp_path):
    save_weights({"weight": torch.zeros(100_000)}, tmp_path / "model.pt")
    assert (tmp_path / "model.pt").stat().st_size < 210_000


def test_failed_save_leaves_the_old_file(weights, tmp_path, monkeypatch):
    def fail(state, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_weights({"weight": torch.zeros(1)}, weights)
    assert load_weights(weights).keys() == state_dict().keys()
    assert list(tmp_path.iterdir()) == [weights]


@pytest.mark.parametrize("path", [None, "no/such/model.pt", "."])
def test_missing_weights(path):
    with pytest.raises(BundleError, match="no weights; train the bundle"):
        load_weights(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"version https://git-lfs.github.com/spec/v1\n", b"<!DOCTYPE html>", b"PK\x03\x04", bytes(99)],
    ids=["empty", "text", "git-lfs", "html", "zip", "zeros"],
)
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"model\.pt: not a weights file") as error:
        load_weights(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.9, 0.99])
def test_truncated_weights_are_refused(weights, share):
    content = weights.read_bytes()
    weights.write_bytes(content[: int(share * len(content))])
    with pytest.raises(BundleError, match="not a weights file"):
        load_weights(weights)


@pytest.mark.parametrize("position", [0, 1, 600, 1199])
def test_single_flipped_bit_of_a_weight_is_refused(weights, position):
    content = bytearray(weights.read_bytes())
    start = content.index(state_dict()["layer.weight"].half().numpy().tobytes())
    content[start + position] ^= 1
    weights.write_bytes(content)
    with pytest.raises(BundleError, match="not a weights file"):
        load_weights(weights)


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_pickled_code_is_refused_and_not_run(tmp_path, write):
    path, marker = tmp_path / "model.pt", tmp_path / "ran"
    write({"weight": torch.zeros(1), "code": Code(marker)}, path)
    with pytest.raises(BundleError, match="not a weights file"):
        load_weights(path)
    assert not marker.exists()


@pytest.mark.parametrize("value", [[torch.zeros(1)], torch.zeros(1), {"model": {"w": torch.zeros(1)}}, {"epoch": 3}])
def test_other_content_is_refused(tmp_path, value):
    torch.save(value, tmp_path / "model.pt")
    with pytest.raises(BundleError, match="no state dict of tensors"):
        load_weights(tmp_path / "model.pt")


class Bundle(nn.Module):
    """A detector of one or two networks, and a number of the calibration."""

    def __init__(self, *parts):
        super().__init__()
        self.detector = nn.ModuleDict({part: nn.Linear(2, 2) for part in ("unet", *parts)})
        self.register_buffer("threshold", torch.rand(()))


def test_networks_of_another_method_leave_new_parts_as_they_are(tmp_path):
    old, new = Bundle(), Bundle("encoder")
    save_weights(old.state_dict(), tmp_path / "model.pt")
    before = {name: value.clone() for name, value in new.state_dict().items()}
    with pytest.raises(BundleError, match="encoder"):
        load_networks(new, tmp_path / "model.pt")
    load_networks(new, tmp_path / "model.pt", new=["encoder"])
    for name, value in new.state_dict().items():
        expected = old.state_dict()[name].half().float() if ".unet." in name else before[name]
        assert torch.equal(value, expected), name


def test_weights_of_another_network_are_refused_in_a_line_that_can_be_read(tmp_path):
    """However many tensors there are, a few of each kind are named."""
    own, other = ({f"{name}{index}": nn.Linear(2, 2) for index in range(99)} for name in "ab")
    both = {"shared": nn.Linear(2, 2)}
    save_weights(nn.ModuleDict(own | {"shared": nn.Linear(2, 3)}).state_dict(), tmp_path / "model.pt")
    with pytest.raises(BundleError) as error:
        load_into(nn.ModuleDict(other | both), tmp_path / "model.pt")
    line = str(error.value)
    assert "\n" not in line and len(line) < 500 + len(str(tmp_path))
    for part in (
        "of another shape: shared.weight [3, 2] instead of [2, 2], shared.bias [3] instead of [2]",
        "missing: b0.weight, b0.bias, b1.weight and 195 more",
        "not of this network: a0.weight, a0.bias, a1.weight and 195 more",
    ):
        assert part in line


def test_digest_is_of_the_weights_that_are_read(weights, tmp_path):
    assert weights_sha256(weights) == sha256(weights)
    load_weights(weights).clear()  # the caller's own
    assert load_weights(weights).keys() == state_dict().keys()
    save_weights({"other": torch.ones(3)}, weights)  # another file in its place is read anew
    assert load_weights(weights).keys() == {"other"}
    assert weights_sha256(weights) == sha256(weights)
    with pytest.raises(BundleError, match="no weights"):
        weights_sha256(tmp_path / "none.pt")


def test_sha256(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert sha256(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
