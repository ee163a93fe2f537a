"""Detection from Python, in memory: `common.detect(image, "dae")`; nothing is written."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import nibabel as nib
import numpy as np
import SimpleITK as sitk  # noqa: N813 - its own name for itself
import torch
from monai.data import MetaTensor
from monai.utils import SpaceKeys
from nibabel.spatialimages import SpatialImage

from .bundle import check_inference_items, load_workflow
from .cohorts.cases import case_name
from .detection.onnx_runtime import Engine
from .devices import checked_device
from .errors import ImageFileError, ImageGeometryError
from .images.check import typed_errors
from .images.itk_image import from_itk
from .results.case import Case, as_nifti, case_record, find_lesions, numbered
from .transforms.load import check_placement, check_voxels, from_nibabel, load_image, stack
from .weights import load_into
from .workflows.batch import CaseRunner
from .workflows.inference import KeepDetections

IN_MEMORY = "image"  # how an image without a file is named

Image = str | Path | SpatialImage | sitk.Image | torch.Tensor | np.ndarray


@dataclass(frozen=True)
class Detection:
    """What was found in one scan; the images lie on the grid of the input.

    anomaly_map: float32, 0 outside the brain; segmentation: uint8, 0 or 1; reconstruction: float32, the pseudo-healthy
    scan in the units of the input. lesions: the rows of lesions.csv, largest first. record: what run.json says, without
    paths.
    """

    anomaly_map: nib.Nifti1Image
    segmentation: nib.Nifti1Image
    reconstruction: nib.Nifti1Image
    lesions: list[dict[str, float]]
    record: dict[str, Any]


class Detector:
    """A bundle that is loaded once and called with many scans; the result is that of `uad detect`, bit by bit.

    Args:
        bundle: its key, as `uad list` says.
        weights: your own weights instead of the bundle's.
        strip: how to find the brain in a scan with the skull on, see `uad detect --strip`.
        register: work in MNI152 space; None for what the bundle wants.
        seed: same seed, same result.
        device: auto, cpu, cuda, cuda:0, ..., mps
        batch_size: slices at a time; changes memory and speed only.
        engine: what computes the networks: "torch", or "onnxruntime" (on the CPU; of the extra `onnx`).
        settings: items of the bundle's inference.json, such as {"displayable_configs::threshold": 3.0}; text that
            begins with "$" is evaluated.

    Raises UADError: BundleError where there is no such bundle or its weights do not fit, SettingError.
    """

    def __init__(
        self,
        bundle: str,
        *,
        weights: str | Path | None = None,
        strip: str | None = None,
        register: bool | None = None,
        seed: int = 0,
        device: str = "auto",
        batch_size: int = 16,
        engine: Engine = "torch",
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        check_inference_items(bundle, settings or {})
        given = {
            "device": None if device == "auto" else checked_device(device),
            "weights": None if weights is None else str(Path(weights).resolve()),
            "preprocessing::strip": strip,
            "preprocessing::register": register,
            "evaluator::engine": None if engine == "torch" else engine,
        }
        override = dict(settings or {}) | {name: value for name, value in given.items() if value is not None}
        override |= {"network_def::seed": seed, "network_def::batch_size": batch_size}
        override["task::_target_"] = f"{KeepDetections.__module__}.{KeepDetections.__name__}"
        with typed_errors():
            workflow = load_workflow(bundle, ["inference.json"], **override)  # `initialize` would set a hook for errors
            self._runner = CaseRunner(workflow)
            content = workflow.parser.get_parsed_content
            load_into(content("network_def"), content("weights"))
        self._kept = cast(KeepDetections, self._runner.saver)

    def __call__(
        self,
        image: Image | Sequence[Image],
        *,
        brain: Image | None = None,
        affine: np.ndarray | None = None,
        series: str | None = None,
    ) -> Detection:
        """Examine a scan, which is not changed.

        Args:
            image: a path (NIfTI, MGH, NRRD, MetaImage, the folder of a DICOM series), a nibabel image, a SimpleITK
                image, a MetaTensor (1, H, W, D) or (H, W, D) in RAS mm, or an array (H, W, D) with `affine`. Of a
                bundle with several modalities a list of them.
            brain: the mask of the brain, on the grid of the image.
            affine: voxel to world (RAS, mm), (4, 4), of arrays.
            series: which DICOM series of a folder, by UID or description.

        Raises UADError where the image cannot be examined.
        """
        started = time.perf_counter()
        several = isinstance(image, (list, tuple))
        images: list[Any] = list(image) if several else [image]  # type: ignore[arg-type]
        first = images[0] if images else None
        subject = case_name(first) if isinstance(first, (str, Path)) else IN_MEMORY
        item: dict[str, Any] = {"subject": subject, "image": _loadable(images, affine, series)}
        item |= {} if brain is None else {"brain": _loadable([brain], affine, None)}
        item |= {} if series is None else {"series": series}
        self._kept.found.clear()
        with typed_errors():
            self._runner(item)
        batch, output = self._kept.found.pop()
        return self._detection(subject, batch, output, started)

    def _detection(
        self, subject: str, batch: Mapping[str, Any], output: Mapping[str, Any], started: float
    ) -> Detection:
        volumes = {name: output[name] for name in ("anomaly_map", "segmentation", "reconstruction")}
        to_mni = np.asarray(batch["to_mni"]) if "to_mni" in batch else None
        case = Case(subject=subject, image=batch["input"], brain=batch["brain"], **volumes, to_mni=to_mni)
        lesions = find_lesions(case)
        result = self._kept.result(output)
        run = self._kept.run_record(batch, self._runner.evaluator.state.device)
        run["seconds"] = round(time.perf_counter() - started, 3)
        images = {name: as_nifti(volume, case.affine) for name, volume in volumes.items()}
        record = case_record(case, result, run, lesions)
        return Detection(**images, lesions=numbered(lesions), record=record)


def load_detector(bundle: str, **options: Any) -> Detector:
    """A `Detector`, whose options are those of its constructor. Raises UADError."""
    return Detector(bundle, **options)


def detect(
    image: Image | Sequence[Image],
    bundle: str,
    *,
    brain: Image | None = None,
    affine: np.ndarray | None = None,
    series: str | None = None,
    **options: Any,
) -> Detection:
    """Examine one scan, see `Detector`; for many, load a detector once. Raises UADError."""
    return Detector(bundle, **options)(image, brain=brain, affine=affine, series=series)


def _loadable(images: Sequence[Any], affine: np.ndarray | None, series: str | None) -> Any:
    """What the preprocessing takes: paths as they are, and images in memory as one tensor with a channel each."""
    if not images:
        raise ImageFileError(IN_MEMORY, "no image was given", "give one for each modality of the bundle")
    if all(isinstance(image, (str, Path)) for image in images):
        paths = [str(image) for image in images]
        return paths if len(paths) > 1 else paths[0]
    tensors = [
        load_image(image, series) if isinstance(image, (str, Path)) else _tensor(image, affine) for image in images
    ]
    return tensors[0] if len(tensors) == 1 else stack(tensors)


def _tensor(image: Any, affine: np.ndarray | None) -> MetaTensor:
    """A copy (C, H, W, D) float32 of an image in memory, with its affine (RAS, mm)."""
    if isinstance(image, SpatialImage):
        source = Path(image.get_filename() or IN_MEMORY)
        check_voxels(source, image)
        if isinstance(image, nib.Nifti1Pair):
            check_placement(source, image.header)
        return from_nibabel(image, source)
    if isinstance(image, sitk.Image):
        return from_itk(image, IN_MEMORY)
    if not isinstance(image, (torch.Tensor, np.ndarray)):
        remedy = "give a path, a nibabel or SimpleITK image, a MetaTensor, or an array with its affine"
        raise ImageFileError(type(image).__name__, "is no image", remedy)
    own = image.affine if affine is None and isinstance(image, MetaTensor) else affine
    if own is None:
        raise ImageGeometryError(IN_MEMORY, "an array does not say where its voxels lie", "give its affine (RAS, mm)")
    values = image.as_tensor() if isinstance(image, MetaTensor) else torch.as_tensor(image)
    if values.is_complex():
        raise ImageFileError(IN_MEMORY, "complex voxels", "convert it to one real number per voxel")
    if isinstance(image, MetaTensor) and image.meta.get("space", SpaceKeys.RAS) != SpaceKeys.RAS:
        fact = f"its affine is of the space {image.meta['space']}"
        raise ImageGeometryError(IN_MEMORY, fact, "load it with an affine in RAS mm")
    values = values.detach().cpu().to(torch.float32, copy=True)
    return MetaTensor(
        values[None] if values.ndim == 3 else values, affine=torch.as_tensor(np.asarray(own, dtype=float))
    )
