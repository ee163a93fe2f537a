"""A bundle for machines without this repository: whole, or its 2D network alone as TorchScript or ONNX."""

from __future__ import annotations

import copy
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn
from zipfile import ZIP_STORED, ZipFile

import torch
import torch.nn.functional as F
from monai.bundle import ConfigParser
from monai.data import save_net_with_metadata
from monai.networks.layers import MedianFilter
from torch import Generator, Tensor, nn

from .. import bundle
from ..detection.method import AnomalyDetector, foreground_of
from ..detection.onnx_runtime import ONNX_TOLERANCE, onnx_packages, onnx_session
from ..detection.volume import VolumeDetector
from ..errors import BundleError
from ..outputs import Inputs
from ..weights import load_into, load_weights
from .archive import PARTS, write_bundle, write_new, zipped
from .vendor import STANDALONE, is_config, standalone_config, vendored_files

# between the maps (and reconstructions, in [0, 1]) of the network and of what is exported of it
TOLERANCE = 1e-5
BATCH = torch.export.Dim("batch")


def export_bundle(name: str, folder: Path) -> Path:
    """Write the bundle as `folder/name` and `folder/name.zip`, which needs nothing but the packages of its metadata.

    Beside its own files: the part of this package that its configs need, with the sample, as `scripts/_common`;
    requirements.txt; SHA256SUMS. Returns the archive. Raises BundleError, OutputError.
    """
    metadata, root = bundle.metadata(name), bundle.folder_of(name)
    Inputs([root]).check([folder / name, folder / f"{name}.zip"])
    paths = {path.relative_to(root): path for path in root.rglob("*") if path.is_file() and path.name[0] != "."}
    paths[Path(bundle.WEIGHTS)] = bundle.weights_of(name)
    for weights in (path for place, path in paths.items() if place.match("models/*.pt")):
        load_weights(weights)
    files = {place.as_posix(): path.read_bytes() for place, path in paths.items() if place.parts[0] in PARTS}
    configs = {place: content for place, content in files.items() if is_config(place)}
    files |= {place: standalone_config(content) for place, content in configs.items()}
    vendored = vendored_files({str(root / place): content for place, content in configs.items()})
    files |= {f"{STANDALONE.replace('.', '/')}/{place}": content for place, content in vendored.items()}
    files["scripts/__init__.py"] = b""
    files["requirements.txt"] = requirements(metadata).encode()
    return write_bundle(name, files, folder)


def requirements(metadata: dict[str, Any]) -> str:
    """The versions that a bundle's metadata name, for pip."""
    main = {"torch": "pytorch_version", "monai": "monai_version", "numpy": "numpy_version"}
    versions = {package: metadata[key] for package, key in main.items()} | metadata["required_packages_version"]
    return "".join(f"{package}=={version}\n" for package, version in versions.items())


def export_torchscript(name: str, folder: Path) -> Path:
    """Trace the 2D network into `folder/name.ts`; what it is stands in its extra file `metadata.json`.

    See `SliceNetwork`; any batch size. Raises BundleError where the method does not allow it, OutputError.
    """
    Inputs([bundle.folder_of(name)]).check([folder / f"{name}.ts"])
    network = load_network(name)
    with _untraceable(name):
        traced = torch.jit.trace(_slice_network(network), example(network, 2), check_trace=False)
    _check_equal(name, network, traced)
    file = io.BytesIO()
    save_net_with_metadata(traced, file, include_config_vals=False, meta_values=describe(name, network))
    with ZipFile(file) as saved:  # where each line of code was on this machine is nobody's business
        content = {entry: saved.read(entry) for entry in saved.namelist() if not entry.endswith(".debug_pkl")}
    return write_new(folder / f"{name}.ts", zipped(content, ZIP_STORED))


def export_onnx(name: str, folder: Path) -> Path:
    """Write the 2D network as `folder/name.onnx`, with what it is in its metadata property `metadata`.

    See `SliceNetwork`; any batch size. Raises BundleError where the method does not allow it, or where the packages
    of the extra `onnx` are missing; OutputError.
    """
    Inputs([bundle.folder_of(name)]).check([folder / f"{name}.onnx"])
    network = load_network(name)
    onnx_packages(name, "onnxruntime", "onnxscript")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that there is no torchvision
    with _untraceable(name):
        program: Any = torch.onnx.export(
            _slice_network(network),
            (example(network, 2),),
            input_names=["image"],
            output_names=["pred"],
            dynamic_shapes=({0: BATCH},),
            verbose=False,
        )
    for node in program.model.graph:
        node.metadata_props.clear()  # lines of code, on this machine
    program.model.metadata_props["metadata"] = json.dumps(describe(name, network))
    content = program.model_proto.SerializeToString(deterministic=True)
    session = onnx_session(content)

    def run(image: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"image": image.numpy()})[0])

    _check_equal(name, network, run, ONNX_TOLERANCE)
    return write_new(folder / f"{name}.onnx", content)


class SliceNetwork(nn.Module):
    """What a detector does to prepared slices, as one traceable function of one tensor.

    (B, C, H, W) of the size of the slices in training, foreground in (0, 1], background 0 -> (B, 1 + C, H, W): map and
    reconstruction. A detector that draws random numbers raises BundleError.
    """

    def __init__(self, detector: AnomalyDetector) -> None:
        super().__init__()
        self.detector = copy.deepcopy(detector).requires_grad_(False)
        self.eval()
        for name, module in list(self.detector.named_modules()):
            if isinstance(module, MedianFilter):
                self.detector.set_submodule(name, TraceableMedian(module.window[0]))

    def forward(self, image: Tensor) -> Tensor:
        """See the class."""
        foreground = foreground_of(image)
        found = self.detector._detect(image * foreground, foreground, _NoGenerators())
        return torch.cat([found[0] * foreground, found[1].clamp(0, 1) * foreground], dim=1)


class TraceableMedian(nn.Module):
    """As MONAI's `MedianFilter`, (B, C, H, W) -> same; that one fixes B in a trace, and ONNX has no median."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """Filter."""
        padded = F.pad(x, (self.size // 2,) * 4, mode="replicate")
        windows = F.unfold(padded, self.size).unflatten(1, (x.shape[1], -1))
        return windows.sort(dim=2).values[:, :, self.size**2 // 2].reshape(x.shape)


class _NoGenerators(list[Generator]):
    """Stands where a method gets a generator for each slice: a trace would repeat the numbers of the example."""

    def _refuse(self, *_: object) -> NoReturn:
        raise BundleError("its method", "it draws random numbers for each slice", "")

    __iter__ = __getitem__ = __len__ = _refuse


def load_network(name: str) -> VolumeDetector:
    """The `network_def` of a bundle's inference with its weights, on the CPU. Raises BundleError."""
    config = ConfigParser.load_config_file(bundle.folder_of(name) / "configs" / "inference.json")
    network = ConfigParser(config).get_parsed_content("network_def")
    load_into(network, bundle.weights_of(name))
    return network.eval()


def describe(name: str, network: VolumeDetector) -> dict[str, Any]:
    """The bundle's metadata, and what belongs to its volumes: preparation, smoothing and normalisation of the map.

    The threshold is of the map after these.
    """
    made_with = network.settings
    volume = {"preparation": made_with["preparation"], "normalisation": made_with["normalisation"]}
    volume |= {"smoothing_vox": network.smoothing_vox}
    return bundle.metadata(name) | volume | {"threshold": float(network.calibration.threshold)}


def example(network: VolumeDetector, batch_size: int) -> Tensor:
    """Smooth slices of the size of those in training, (B, C, H, W), each another disc on a background of 0."""
    settings = network.settings["preparation"]
    side = int(settings["canvas"] if "canvas" in settings else settings["size"])
    generator = torch.Generator().manual_seed(batch_size)
    coarse = torch.rand(batch_size, int(settings.get("channels", 1)), 8, 8, generator=generator)
    y, x = torch.meshgrid(torch.linspace(-1, 1, side), torch.linspace(-1, 1, side), indexing="ij")
    radius = torch.linspace(0.6, 0.9, batch_size)[:, None, None, None]
    return F.interpolate(coarse, (side, side), mode="bilinear").clamp(min=0.01) * (x.hypot(y) < radius)


def _slice_network(network: VolumeDetector) -> SliceNetwork:
    """Run once, so that a method which is refused is refused for its own reason."""
    slices = SliceNetwork(network.detector)
    slices(example(network, 1))
    return slices


def _check_equal(
    name: str, network: VolumeDetector, exported: Callable[[Tensor], Tensor], tolerance: float = TOLERANCE
) -> None:
    """Whether other slices, another number of them, give what the bundle's network gives. Raises BundleError."""
    for batch_size in (1, 3):
        image = example(network, batch_size)
        found = network.detector.detect(image)
        expected = torch.cat([found.anomaly_map, found.reconstruction], dim=1)
        with _untraceable(name):
            difference = float((exported(image) - expected).abs().max())
        if not difference <= tolerance:
            fact = f"what was traced differs by {difference:.1e}: the method's steps depend on the image"
            raise BundleError(name, fact, "export it as a bundle")


@contextmanager
def _untraceable(name: str) -> Iterator[None]:
    """Turn whatever error a trace ends in into a BundleError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what might be wrong; `_check_equal` measures whether it is
            yield
    except Exception as error:
        cause = error.fact if isinstance(error, BundleError) else f"{type(error).__name__}: {str(error).strip()[:200]}"
        raise BundleError(name, f"cannot be traced ({cause})", "export it as a bundle") from error
