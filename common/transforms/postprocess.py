"""From the network's prediction to what is written: map, reconstruction and segmentation on the input's own grid."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import Compose, Invertd, MapTransform
from monai.utils import convert_to_tensor
from scipy import ndimage
from torch import Tensor, nn

from ..detection.calibration import Calibration
from ..detection.method import foreground_of
from ..detection.normalisation import WithinSubjectNormalisation
from ..detection.reliability import MEASURED, doubts, verdict
from ..errors import BundleError
from ..images.check import voxel_volume_ml
from ..recorded import Recorded
from ..weights import load_weights
from .resample import LinearResample
from .tissue import destandardised


class Postprocessing(Compose):
    """The counterpart of a bundle's preprocessing: from the network's prediction of a case to what is written.

    In: `pred` (1 + C, H, W, D) on the network's grid, and what the preprocessing made. Out, on the input's own grid:
    `anomaly_map`, `reconstruction`, `segmentation`, `threshold`, and `result`, the volume in numbers.

    Args:
        preprocessing: whose steps are undone.
        weights: the bundle's weights, for the calibration.
        segmentation: `threshold`, `min_volume_ml` and `save_map` of `SegmentAnomaliesd`.
        normalisation: that of the network; None for the map as it is.
    """

    def __init__(
        self,
        preprocessing: Compose,
        weights: str,
        segmentation: Mapping[str, Any],
        normalisation: WithinSubjectNormalisation | None = None,
    ) -> None:
        super().__init__(
            [
                *([] if normalisation is None else [NormaliseWithinSubjectd(normalisation, weights)]),
                Invertd("pred", preprocessing, orig_keys="image", nearest_interp=False),
                SplitPredictiond(),
                SegmentAnomaliesd("pred", weights, **segmentation),
                ScoreVolumed(weights),
            ]
        )
        self.segmentation = segmentation


class NormaliseWithinSubjectd(MapTransform):
    """Apply `WithinSubjectNormalisation` to the map, the first channel of the prediction; add `map_scale`, its scale.

    Args:
        normalisation: its atlas and scales are read from the weights at first use, where they are not loaded yet.
        weights: the bundle's weights.
        keys: the prediction (1 + C, H, W, D), on the network's grid.
        image_key: the preprocessed image, for its foreground.
    """

    def __init__(
        self,
        normalisation: WithinSubjectNormalisation,
        weights: str | Path,
        keys: KeysCollection = "pred",
        image_key: str = "image",
    ) -> None:
        super().__init__(keys)
        self.normalisation = normalisation
        self.weights = weights
        self.image_key = image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the data with the normalised map. Raises BundleError where the weights are not calibrated."""
        if not self.normalisation.is_fitted:
            load_part(self.normalisation, "normalisation", self.weights)
        result = dict(data)
        pred = result[self.keys[0]]
        image, values = result[self.image_key].as_tensor(), pred.as_tensor()
        foreground = foreground_of(image[None])[0]
        normalised, result["map_scale"] = self.normalisation(values[:1], foreground, values[1:] - image.to(values))
        result[self.keys[0]] = pred.clone()
        result[self.keys[0]].as_tensor()[:1] = normalised
        return result


class SplitPredictiond(MapTransform):
    """Split `pred` (1 + C, H, W, D) into `anomaly_map` and `reconstruction`, 0 outside the brain.

    The reconstruction returns to the image's own contrast (`meta["tissue_knots"]`) and units
    (`meta["intensity_unit"]`, `intensity_zero`), with the bias field of the image where one was taken away
    (`bias_field`), and at the rim it is divided by how much of the brain its interpolation saw, as in
    `ResampleForegroundd`; the map stays as it is. `pred` becomes the map.

    Args:
        keys: the prediction, already inverted to the input's grid.
        image_key: the preprocessed image, for its intensity unit and its foreground.
        mask_key: brain mask on the input's grid.
    """

    def __init__(self, keys: KeysCollection = "pred", image_key: str = "image", mask_key: str = "brain") -> None:
        super().__init__(keys)
        self.image_key = image_key
        self.mask_key = mask_key
        self.resample = LinearResample(dtype=None)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the data with the two new keys."""
        result = dict(data)
        image, mask, pred = result[self.image_key], result[self.mask_key], result[self.keys[0]]
        inside = mask.as_tensor().bool().to(pred.device)
        values = pred.as_tensor() * inside
        foreground = (image > 0).any(dim=0, keepdim=True).to(torch.float32)
        share = self.resample(foreground, **_input_grid(image, mask))
        reconstruction = values[1:] / convert_to_tensor(share, track_meta=False).to(values).clamp_(min=0.01)
        del share  # this is where a case needs most memory
        if "tissue_knots" in image.meta:
            knots = np.reshape(image.meta["tissue_knots"], (2, -1))  # of which the first is 0, and stays 0
            reconstruction[:, inside[0]] = destandardised(reconstruction[:, inside[0]], knots)
        reconstruction *= intensity_unit(result, self.image_key, self.mask_key).to(values)
        zero = intensity_zero(result).to(values)
        if zero.any():
            reconstruction += zero * inside
        result["anomaly_map"] = MetaTensor(values[:1].clamp(min=0), affine=mask.affine)
        result["reconstruction"] = MetaTensor(reconstruction, affine=mask.affine)
        result[self.keys[0]] = result["anomaly_map"]
        return result


def intensity_unit(data: Mapping[Any, Any], image_key: str = "image", mask_key: str = "brain") -> Tensor:
    """The intensity on the input's grid that 1 in the prepared image stands for.

    (C, 1, 1, 1) float32, or (C, h, w, d) where the image was divided by its `bias_field`.
    """
    image, mask = data[image_key], data[mask_key]
    unit = torch.tensor(np.asarray(image.meta["intensity_unit"], dtype=np.float32).ravel()).view(-1, 1, 1, 1)
    if "bias_field" not in data:
        return unit
    resample = LinearResample("border", dtype=None)
    field = resample(data["bias_field"], **_input_grid(image, mask))
    return unit * convert_to_tensor(field, track_meta=False).cpu()


def intensity_zero(data: Mapping[Any, Any]) -> Tensor:
    """The intensity on the input's grid that 0 in the prepared image stands for, (C, 1, 1, 1) or (1, 1, 1, 1)."""
    return torch.as_tensor(data.get("intensity_zero", 0.0), dtype=torch.float32).reshape(-1, 1, 1, 1)


def to_input_grid(
    volume: Tensor, data: Mapping[Any, Any], image_key: str = "image", mask_key: str = "brain"
) -> MetaTensor:
    """A volume (1, H, W, D) of the grid of the prepared image on the input's grid, (1, h, w, d), linearly."""
    image, mask = data[image_key], data[mask_key]
    resample = LinearResample(dtype=None)
    moved = resample(MetaTensor(volume, affine=image.affine), **_input_grid(image, mask))
    return MetaTensor(convert_to_tensor(moved, track_meta=False), affine=mask.affine)


def _input_grid(image: MetaTensor, mask: MetaTensor) -> dict[str, Any]:
    """The grid of the mask in the world of a prepared image, which is another one where it was registered."""
    to_mni = np.reshape(image.meta.get("to_mni", np.eye(4)), (4, 4))
    return {"dst_affine": torch.as_tensor(to_mni) @ mask.affine, "spatial_size": mask.shape[1:]}


class SegmentAnomaliesd(Recorded, MapTransform):
    """Add `segmentation`: what exceeds the `threshold`, which is added too; uint8, small components removed.

    Args:
        keys: the map; the segmentation replaces it (viewers ask for integers), unless `save_map`.
        weights: the bundle's weights; the threshold calibrated on healthy subjects is read from them at first use.
        threshold: a value of the map instead of the calibrated one.
        min_volume_ml: connected components below this volume are removed; 0.02 ml is 2 voxels of 2 mm.
    """

    def __init__(
        self,
        keys: KeysCollection = "pred",
        weights: str | Path | None = None,
        threshold: float | None = None,
        min_volume_ml: float = 0.02,
        save_map: bool = False,
    ) -> None:
        super().__init__(keys)
        if weights is None and threshold is None:
            raise ValueError("give the weights, for the calibrated threshold, or a threshold")
        self.weights = weights
        self.threshold = threshold
        self.min_volume_ml = min_volume_ml
        self.save_map = save_map

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the data with the segmentation. Raises BundleError where the weights are not calibrated."""
        result = dict(data)
        if self.threshold is None:
            self.threshold = calibrated_threshold(self.weights)
        for key in self.key_iterator(result):
            anomaly_map = result[key]
            voxel_ml = voxel_volume_ml(anomaly_map)
            min_voxels = self.min_volume_ml / voxel_ml - 1e-4  # rounding must not remove what has just this volume
            mask = segment(anomaly_map[0].cpu().numpy(), self.threshold, min_voxels)
            segmentation = MetaTensor(torch.from_numpy(mask)[None], affine=anomaly_map.affine)
            result["segmentation"], result["threshold"] = segmentation, self.threshold
            result[key] = anomaly_map if self.save_map else segmentation
        return result


class ScoreVolumed(MapTransform):
    """Add `result`, the volume in numbers (`Calibration.describe`), which MONAI Label returns as JSON beside the image.

    With it goes whether the numbers can be believed, see `common.detection.reliability`.

    Args:
        weights: the bundle's weights, for the scores and scales of the healthy.
        keys: the map, on the input's grid.
        mask_key: brain mask on the input's grid.
    """

    def __init__(self, weights: str | Path, keys: KeysCollection = "anomaly_map", mask_key: str = "brain") -> None:
        super().__init__(keys)
        self.weights = weights
        self.mask_key = mask_key
        self.calibration: Calibration | None = None

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the data with the numbers. Raises BundleError."""
        if self.calibration is None:
            self.calibration = read_calibration(self.weights)
        anomaly_map = data[self.keys[0]].as_tensor()
        brain = data[self.mask_key].as_tensor().to(anomaly_map.device)
        result = self.calibration.describe(anomaly_map, brain, data["threshold"])
        return dict(data) | {"result": result | self._reliability(data)}

    def _reliability(self, data: Mapping[Hashable, Any]) -> dict[str, Any]:
        measured = {name: float(data[name]) for name in MEASURED if name in data}
        scales = load_weights(self.weights)["normalisation.scale_quantiles"] if "map_scale" in measured else None
        record: dict[str, Any] = {name: _number(value) for name, value in measured.items()}
        if "tissue_modes" not in data:  # a whole head, whose spacing nobody knows
            return record | verdict(doubts(measured, scales))
        modes = np.ravel(data["tissue_modes"]).astype(float).tolist()
        record["tissue_modes"] = None if np.isnan(modes).any() else modes
        return record | verdict(doubts(measured, scales, modes, data[self.mask_key].pixdim.tolist()))


def _number(value: float) -> float | None:
    """As JSON knows it."""
    return None if np.isnan(value) else value


def segment(anomaly_map: np.ndarray, threshold: float, min_voxels: float) -> np.ndarray:
    """(H, W, D) -> uint8 {0, 1}: voxels above the threshold in 26-connected components of at least `min_voxels`."""
    labels, _ = ndimage.label(anomaly_map > threshold, structure=np.ones((3, 3, 3)))
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return (sizes >= max(min_voxels, 1))[labels].astype(np.uint8)


def read_calibration(weights: str | Path | None) -> Calibration:
    """The calibration in a bundle's weights, fitted or not. Raises BundleError."""
    calibration = Calibration()
    load_part(calibration, "calibration", weights, may_miss=calibration.sized_by_file)
    return calibration


def load_part(module: nn.Module, name: str, weights: str | Path | None, may_miss: Sequence[str] = ()) -> None:
    """Read the part of a bundle's weights that has this name. Raises BundleError where it is not there."""
    state, prefix = load_weights(weights), f"{name}."
    stored = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if missing := module.state_dict().keys() - stored.keys() - {*may_miss}:
        raise BundleError(weights, f"no {prefix}{min(missing)} in the weights", "give weights of this bundle")
    module.load_state_dict(stored)


def calibrated_threshold(weights: str | Path | None) -> float:
    """The threshold in a bundle's weights. Raises BundleError where it was not fitted."""
    threshold = float(read_calibration(weights).threshold)
    if np.isnan(threshold):
        raise BundleError(
            weights, "the weights are not calibrated", "run the bundle's calibrate.json, or give a threshold"
        )
    return threshold


def shipped_threshold(weights: str | Path) -> float | None:
    """The same for configs, where viewers find it; None where there is none, which `SegmentAnomaliesd` will refuse."""
    try:
        return calibrated_threshold(weights)
    except BundleError:
        return None
