"""The `network_def` of every bundle: a 2D method applied to a volume, slice by slice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.networks.layers import gaussian_1d, separable_filtering
from torch import Tensor, nn

from ..errors import BundleError, SettingError
from ..recorded import Recorded
from .calibration import Calibration
from .method import AnomalyDetector, foreground_of
from .normalisation import WithinSubjectNormalisation


class VolumeDetector(Recorded, nn.Module):
    """Takes the slices of a volume that hold foreground through `detector.detect` and lays them back.

    Its `state_dict` is the whole product: networks, schedule, calibration, and the preparation of the images that the
    weights were trained with. Loading weights into a detector that is prepared otherwise raises BundleError.

    Args:
        detector: the method.
        preparation: that of the preprocessing: its numbers by name, compared when weights are loaded.
        axis: spatial axis along which slices are taken; 2 is axial for volumes in RAS.
        batch_size: slices at a time; the result does not depend on it.
        seed: with the index of a slice, the only source of randomness.
        num_seeds: walks from as many seeds, the first of which is `seed`, are averaged; of use to random methods only.
        mirror: the result for the mirrored slices (the first of their axes, left and right in RAS) is averaged in.
        smoothing_vox: Gaussian smoothing of the map in three dimensions, in voxels, within the foreground; 0 for none.
        normalisation: what `Postprocessing` does to the map next; its atlas travels with the weights.

    Raises SettingError where a number is out of its range.
    """

    preparation: Tensor
    unrecorded = frozenset({"batch_size", "seed"})

    def __init__(
        self,
        detector: AnomalyDetector,
        preparation: Mapping[str, float | Sequence[float]] | None = None,
        axis: int = 2,
        batch_size: int = 16,
        seed: int = 0,
        num_seeds: int = 1,
        mirror: bool = False,
        smoothing_vox: float = 0.0,
        normalisation: WithinSubjectNormalisation | None = None,
    ) -> None:
        super().__init__()
        if num_seeds < 1 or smoothing_vox < 0:
            fact = f"num_seeds = {num_seeds}, smoothing_vox = {smoothing_vox}"
            raise SettingError("VolumeDetector", fact, "choose at least one seed, and a smoothing of 0 or more")
        self.detector = detector
        self.axis = axis
        self.batch_size = batch_size
        self.seed = seed
        self.num_seeds = num_seeds
        self.mirror = mirror
        self.smoothing_vox = smoothing_vox
        self.normalisation = normalisation
        self.calibration = Calibration()
        self.preparation_names = sorted(preparation or {})
        values = [float(x) for name in self.preparation_names for x in np.ravel((preparation or {})[name])]
        self.register_buffer("preparation", torch.tensor(values, dtype=torch.float64))
        self.register_load_state_dict_pre_hook(_check_preparation)

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """(B, C, H, W, D), prepared: foreground in (0, 1], background 0 -> (B, 1 + C, H, W, D): map, reconstruction."""
        slices = image.movedim(self.axis + 2, 1).flatten(0, 1)
        count = image.shape[self.axis + 2]
        indices = (slices > 0).flatten(1).any(dim=1).nonzero().flatten()
        result = slices.new_zeros(len(slices), 1 + slices.shape[1], *slices.shape[2:])
        for batch in indices.split(self.batch_size) if len(indices) else ():
            result[batch] = self._views(slices[batch], batch % count)
        result = result.unflatten(0, (len(image), count)).movedim(1, self.axis + 2).contiguous()
        if self.smoothing_vox > 0:
            result[:, :1] = smoothed_within(result[:, :1], foreground_of(image), self.smoothing_vox)
        return result

    def _views(self, slices: Tensor, positions: Tensor) -> Tensor:
        """The mean over seeds and mirror images."""
        total, count = torch.zeros(()), 0
        for seed in range(self.seed, self.seed + self.num_seeds):
            seeds = seed * 1_000_003 + positions
            total, count = total + self._detect(slices, seeds), count + 1
            if self.mirror:
                total, count = total + self._detect(slices.flip(2), seeds).flip(2), count + 1
        return total / count

    def _detect(self, slices: Tensor, seeds: Tensor) -> Tensor:
        height, width = slices.shape[2:]
        divisor = self.detector.size_divisor
        padded = F.pad(slices, (0, -width % divisor, 0, -height % divisor))
        detection = self.detector.detect(padded, seeds=seeds)
        return torch.cat([detection.anomaly_map, detection.reconstruction], dim=1)[..., :height, :width]


def smoothed_within(anomaly_map: Tensor, foreground: Tensor, smoothing_vox: float) -> Tensor:
    """Gaussian mean of the foreground's voxels only, 0 outside: (B, 1, H, W, D) float and bool -> float."""
    kernel = gaussian_1d(torch.tensor(smoothing_vox), truncated=3.0, approx="sampled", normalize=True).to(anomaly_map)
    weights = foreground.to(anomaly_map.dtype)
    total, weight = (separable_filtering(x, [kernel] * 3) for x in (anomaly_map * weights, weights))
    return torch.where(foreground, total / weight.clamp(min=torch.finfo(weight.dtype).tiny), 0)


def _check_preparation(module: VolumeDetector, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    stored = state_dict.get(f"{prefix}preparation")
    if stored is None:
        return  # a strict load will name the missing key
    own = module.preparation
    if stored.shape != own.shape or not torch.allclose(stored.to(own), own):
        names = ", ".join(module.preparation_names)
        fact = f"the weights were trained with other settings, {stored.tolist()}, than {own.tolist()} ({names})"
        raise BundleError("weights", fact, "use the settings the weights were trained with, or train again")
