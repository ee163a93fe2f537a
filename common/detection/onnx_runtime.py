"""The networks of a method run by ONNX Runtime in place of torch; loops, noise and maps stay in torch."""

from __future__ import annotations

import importlib
import io
import warnings
from typing import Any, Literal, get_args

import torch
from monai.utils import convert_to_tensor
from torch import Tensor, nn

from ..errors import BundleError, SettingError
from .method import AnomalyDetector

Engine = Literal["torch", "onnxruntime"]

ONNX_TOLERANCE = 1e-4  # another runtime adds in another order
OPSET = 18
EXPORTED_BATCH, CHECKED_BATCH = 2, 3  # a batch of 1 would be taken for a constant


def onnx_packages(source: str, *names: str) -> list[Any]:
    """Packages of the extra `onnx`, imported. Raises BundleError where one is missing.

    source: what needs them.
    """
    try:
        return [importlib.import_module(name) for name in names]
    except ImportError as error:
        raise BundleError(source, f"ONNX needs more packages ({error})", "pip install 'uad-bundles[onnx]'") from error


def onnx_session(content: bytes) -> Any:
    """ONNX Runtime's session of a model on the CPU, with as many threads as torch has."""
    runtime: Any = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors alone
    return runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def check_engine(engine: str, detector: AnomalyDetector, device: torch.device) -> None:
    """Whether the networks of a method can run by an engine, before anything is computed.

    Raises SettingError where there is no such engine, or the method or the device does not allow it, BundleError where
    packages are missing.
    """
    if engine not in get_args(Engine):
        raise SettingError(engine, "is no engine", f"choose {' or '.join(get_args(Engine))}")
    if engine == "torch":
        return
    method = type(detector).__name__
    if not detector.networks:
        raise SettingError(engine, f"{method} has no network that another engine could run", "choose the engine torch")
    if device.type != "cpu":
        raise SettingError(engine, f"runs on the CPU alone, not on {device}", "choose cpu, or the engine torch")
    onnx_packages(engine, "onnxruntime", "onnx")


def use_engine(engine: str, detector: AnomalyDetector) -> None:
    """Let the `networks` of a detector with its final weights run by an engine, which `check_engine` has let pass.

    The modules stay, with their parameters: what changes is how they are computed.
    """
    for name in detector.networks if engine == "onnxruntime" else ():
        network = detector.get_submodule(name)
        network.forward = OnnxForward(f"{type(detector).__name__}.{name}", network)  # type: ignore[assignment]


def describe_engine(engine: str) -> str:
    """For the record of a result: the last digits of a map depend on it."""
    return engine if engine == "torch" else f"{engine} {importlib.import_module(engine).__version__}"


class OnnxForward:
    """The `forward` of a network in evaluation: tensors (B, ...) in, one or more (B, ...) out, without gradients.

    For each size of the inputs the network is exported when it comes first, with B left open, and compared with torch.

    Args:
        name: of the network, for errors.
        network: with its final weights, on the CPU.

    A call raises BundleError where the network cannot be exported.
    """

    def __init__(self, name: str, network: nn.Module) -> None:
        self.name = name
        self.network = _ByTorch(network)
        self.sessions: dict[tuple[object, ...], Any] = {}

    def __call__(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Run the network."""
        plain = [convert_to_tensor(x.detach(), track_meta=False) for x in inputs]
        size = tuple((x.dtype, *x.shape[1:]) for x in plain)
        if size not in self.sessions:
            self.sessions[size] = self._checked_session(plain)
        found = _run(self.sessions[size], plain)
        return found[0] if len(found) == 1 else tuple(found)

    @torch.no_grad()
    def _checked_session(self, inputs: list[Tensor]) -> Any:
        try:
            session = onnx_session(_exported(self.network, [_rows(x, EXPORTED_BATCH) for x in inputs]))
            checked = [_rows(x, CHECKED_BATCH) for x in inputs]
            pairs = zip(_run(session, checked), _as_list(self.network(*checked)), strict=True)
            difference = max(float((a - b).abs().max() / max(1.0, float(b.abs().max()))) for a, b in pairs)
        except Exception as error:  # of which an exporter has many kinds
            cause = f"{type(error).__name__}: {str(error).strip()[:200]}"
            raise BundleError(self.name, f"cannot run by ONNX Runtime ({cause})", "choose the engine torch") from error
        if not difference <= ONNX_TOLERANCE:
            fact = f"what ONNX Runtime computes differs by {difference:.1e}"
            raise BundleError(self.name, fact, "choose the engine torch")
        return session


class _ByTorch(nn.Module):
    """A network as torch computes it, also where its `forward` has been given to another engine."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.by_torch = network.forward
        self.train(network.training)  # the exporter gives all modules back in the mode of this one

    def forward(self, *inputs: Tensor) -> Any:
        return self.by_torch(*inputs)


def _exported(network: nn.Module, inputs: list[Tensor]) -> bytes:
    """The network in ONNX, of any batch size.

    By tracing: the exporter of `torch.export`, which also follows control flow, takes ten times as long, 5 to 12 CPU
    seconds, which a run would have to win back.
    """
    names = [f"input_{index}" for index in range(len(inputs))]
    file: Any = io.BytesIO()  # which the tracing exporter takes too
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what might be wrong: the result is compared
        torch.onnx.export(
            network,
            tuple(inputs),
            file,
            dynamo=False,
            opset_version=OPSET,
            input_names=names,
            dynamic_axes={name: {0: "batch"} for name in names},
        )
    content: bytes = file.getvalue()
    return content


def _run(session: Any, inputs: list[Tensor]) -> list[Tensor]:
    feed = {place.name: x.contiguous().numpy() for place, x in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(found) for found in session.run(None, feed)]


def _rows(x: Tensor, count: int) -> Tensor:
    """The first rows of a batch, again and again where there are fewer."""
    return x[torch.arange(count) % len(x)]


def _as_list(found: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)
