"""The networks of a method by ONNX Runtime: what is refused, what changes, and how near its numbers are to torch's."""

from __future__ import annotations

import json
import sys
from importlib import import_module

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from torch import nn
from typer.testing import CliRunner

import common
from common.bundle import BUNDLES_DIR, available_bundles
from common.cli import app
from common.console import FAILED
from common.detection import onnx_runtime
from common.detection.method import AnomalyDetector
from common.detection.onnx_runtime import ONNX_TOLERANCE, check_engine, describe_engine, use_engine
from common.errors import BundleError, SettingError
from common.sharing.export import example, load_network

CPU = torch.device("cpu")
BY_TORCH_ALONE = ["ar_transformer", "ar_transformer_headct"]  # it reads token by token, by parts of its network


class TwoInputs(nn.Module):
    """Of images and times: two images. Batch norm tells the mode of evaluation from that of training."""

    def __init__(self):
        super().__init__()
        norms = nn.GroupNorm(2, 8), nn.BatchNorm2d(8)
        self.layers = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), *norms, nn.SiLU(), nn.Conv2d(8, 2, 1))

    def forward(self, x, t):
        y = self.layers(x) * (1 + t.view(-1, 1, 1, 1) / 10)
        return y[:, :1], y[:, 1:]


class Toy(AnomalyDetector):
    networks = ("network",)

    def __init__(self):
        super().__init__()
        self.network = TwoInputs()

    def _detect(self, image, foreground, generators):
        y, z = self.network(image, torch.arange(len(image)))
        return y.abs(), z


class Alone(Toy):
    networks = ()


class OtherSession:
    """In the place of ONNX Runtime's: the network by torch, and so much more."""

    def __init__(self, network, more):
        self.network, self.more = network, more

    def get_inputs(self):
        return [type("Place", (), {"name": name}) for name in "xt"]

    def run(self, names, feed):
        return [found.numpy() + self.more for found in self.network(*(torch.from_numpy(feed[name]) for name in "xt"))]


@pytest.fixture
def other_engine(monkeypatch):
    """Sessions that give so much more than torch, as long as ONNX Runtime is not asked; those that were made."""
    made = []

    def install(more):
        monkeypatch.setattr(onnx_runtime, "_exported", lambda network, inputs: network)
        monkeypatch.setattr(
            onnx_runtime, "onnx_session", lambda network: made.append(OtherSession(network, more)) or made[-1]
        )
        return made

    return install


@pytest.fixture
def runtime(monkeypatch):
    pytest.importorskip("onnx", reason="the extra onnx is not installed")
    return pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")


def image_of(count, side=16):
    return torch.rand(count, 1, side, side, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize(
    ("engine", "detector", "device", "message"),
    [
        ("tensorrt", Toy, CPU, "tensorrt: is no engine; choose torch or onnxruntime"),
        ("onnxruntime", Alone, CPU, "onnxruntime: Alone has no network that another engine could run; choose"),
        ("onnxruntime", Toy, torch.device("cuda", 1), "onnxruntime: runs on the CPU alone, not on cuda:1; choose cpu"),
    ],
)
def test_what_cannot_be_is_refused(engine, detector, device, message):
    with pytest.raises(SettingError) as raised:
        check_engine(engine, detector(), device)
    assert str(raised.value).startswith(message)


def test_torch_is_never_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    check_engine("torch", Alone(), torch.device("cuda"))
    assert describe_engine("torch") == "torch"


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_ends_the_command_in_one_line(package, monkeypatch, phantom, save_nifti, tmp_path):
    for name in ("onnx", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None if name == package else sys)
    (height, width, _), affine = phantom.grid(spacing_mm=(8, 8, 8))
    scan = save_nifti(tmp_path / "scan.nii.gz", phantom.on_grid((height, width, 6), affine)[0], affine)
    options = ["-m", "dae", "-o", str(tmp_path / "out"), "--device", "cpu", "--engine", "onnxruntime"]
    done = CliRunner().invoke(app, ["detect", str(scan), *options])
    assert (done.exit_code, done.stderr.count("\n"), (tmp_path / "out").exists()) == (FAILED, 1, False)
    assert done.stderr.startswith("BundleError: onnxruntime: ONNX needs more packages")
    assert done.stderr.rstrip().endswith("; pip install 'uad-bundles[onnx]'")


def test_an_unknown_engine_from_python():
    with pytest.raises(SettingError, match="is no engine"):
        common.load_detector("dae", device="cpu", engine="abacus")


def test_which_bundles_another_engine_can_run():
    found = {}
    for name in available_bundles():
        config = json.loads((BUNDLES_DIR / name / "configs" / "inference.json").read_text(encoding="utf-8"))
        module, _, method = config["network_def"]["detector"]["_target_"].rpartition(".")
        found[name] = getattr(import_module(module), method).networks
    assert [name for name, networks in found.items() if not networks] == BY_TORCH_ALONE


def test_a_network_is_made_once_for_each_size_and_keeps_its_weights(other_engine):
    made, detector = other_engine(0), Toy().eval()
    expected, names = [detector.detect(image_of(count)) for count in (1, 5)], list(detector.state_dict())
    use_engine("onnxruntime", detector)
    for count, by_torch in zip((1, 5), expected, strict=True):
        found = detector.detect(MetaTensor(image_of(count)))
        torch.testing.assert_close(torch.as_tensor(found.anomaly_map), by_torch.anomaly_map, rtol=0, atol=0)
        torch.testing.assert_close(torch.as_tensor(found.reconstruction), by_torch.reconstruction, rtol=0, atol=0)
    assert len(made) == 1
    detector.detect(image_of(2, side=24))
    assert len(made) == 2
    assert list(detector.state_dict()) == names


def test_torch_changes_nothing():
    detector = Toy()
    use_engine("torch", detector)
    assert "forward" not in vars(detector.network)


@pytest.mark.parametrize("more", [3 * ONNX_TOLERANCE, float("nan")])
def test_other_numbers_than_torchs_are_refused(other_engine, more):
    other_engine(more)
    detector = Toy().eval()
    use_engine("onnxruntime", detector)
    with pytest.raises(BundleError, match=r"Toy.network: what ONNX Runtime computes differs by .*; choose the engine"):
        detector.detect(image_of(2))


def test_a_network_that_cannot_be_exported_is_refused(monkeypatch):
    def fail(*_):
        raise RuntimeError("no such\noperator")

    monkeypatch.setattr(onnx_runtime, "_exported", fail)
    detector = Toy().eval()
    use_engine("onnxruntime", detector)
    with pytest.raises(BundleError) as raised:
        detector.detect(image_of(2))
    assert str(raised.value) == (
        "Toy.network: cannot run by ONNX Runtime (RuntimeError: no such operator); choose the engine torch"
    )


def test_any_number_of_slices(runtime):
    detector = Toy().eval()
    expected = [detector.detect(image_of(count)) for count in (1, 2, 7)]
    use_engine("onnxruntime", detector)
    for by_torch, count in zip(expected, (1, 2, 7), strict=True):
        found = detector.detect(image_of(count))
        torch.testing.assert_close(found.anomaly_map, by_torch.anomaly_map, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.reconstruction, by_torch.reconstruction, rtol=0, atol=1e-5)


def test_as_many_threads_as_torch(runtime):
    detector = Toy().eval()
    use_engine("onnxruntime", detector)
    detector.detect(image_of(2))
    (session,) = detector.network.forward.sessions.values()
    assert session.get_session_options().intra_op_num_threads == torch.get_num_threads()


def test_a_scan_is_found_alike_and_the_record_says_by_what(runtime, phantom, save_nifti, tmp_path):
    (height, width, depth), affine = phantom.grid(spacing_mm=(4, 4, 4))
    affine[:3, 3] += affine[:3, :3] @ (0, 0, depth // 2 - 3)
    scan = save_nifti(tmp_path / "scan.nii.gz", phantom.on_grid((height, width, 6), affine)[0], affine)
    by_torch, found = (common.detect(scan, "dae", device="cpu", engine=engine) for engine in ("torch", "onnxruntime"))
    expected = by_torch.anomaly_map.get_fdata()
    np.testing.assert_allclose(found.anomaly_map.get_fdata(), expected, rtol=0, atol=1e-4 * expected.max())
    assert by_torch.record["engine"] == "torch"
    assert found.record["engine"] == f"onnxruntime {runtime.__version__}"


class AllSeenError(Exception):
    """Each network has been called."""


def inputs_of(detector, image):
    """What each of the networks gets at its first call, by name; no more is computed than that takes."""
    seen = {}

    def hook(name):
        def take(network, inputs):
            seen.setdefault(name, inputs)
            if len(seen) == len(detector.networks):
                raise AllSeenError

        return take

    handles = [detector.get_submodule(name).register_forward_pre_hook(hook(name)) for name in detector.networks]
    with pytest.raises(AllSeenError):
        detector.detect(image)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("dae", "disyre") else pytest.mark.slow)
        for name in available_bundles()
        if name not in BY_TORCH_ALONE
    ],
)
@torch.no_grad()
def test_the_networks_of_every_bundle(runtime, name):
    network = load_network(name)
    detector = network.detector
    check_engine("onnxruntime", detector, CPU)
    seen = inputs_of(detector, example(network, 2))
    expected = {part: detector.get_submodule(part)(*inputs) for part, inputs in seen.items()}
    use_engine("onnxruntime", detector)
    for part, inputs in seen.items():
        outputs = zip(*(as_tuple(x) for x in (detector.get_submodule(part)(*inputs), expected[part])), strict=True)
        for found, by_torch in outputs:
            tolerance = ONNX_TOLERANCE * max(1.0, float(by_torch.abs().max()))
            torch.testing.assert_close(found, by_torch, rtol=0, atol=tolerance)


def as_tuple(found):
    return found if isinstance(found, tuple) else (found,)
