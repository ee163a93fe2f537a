"""The `network_def` of every bundle: a 2D method applied to a volume, slice by slice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..calibration import Calibration
from ..errors import BundleError
from ..methods.base import AnomalyDetector


class VolumeDetector(nn.Module):
    """Takes the slices of a volume that hold foreground through `detector.detect` and lays them back.

    Its `state_dict` is the whole product: networks, schedule, calibration, and the preparation of the images that the
    weights were trained with. Loading weights into a detector that is prepared otherwise raises BundleError.

    Args:
        detector: the method.
        preparation: named numbers of the preprocessing (spacing, percentile, ...), compared when weights are loaded.
        axis: spatial axis along which slices are taken; 2 is axial for volumes in RAS.
        batch_size: slices at a time; the result does not depend on it.
        seed: with the index of a slice, the only source of randomness.
    """

    preparation: Tensor

    def __init__(
        self,
        detector: AnomalyDetector,
        preparation: Mapping[str, float] | None = None,
        axis: int = 2,
        batch_size: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.detector = detector
        self.axis = axis
        self.batch_size = batch_size
        self.seed = seed
        self.calibration = Calibration()
        self.preparation_names = sorted(preparation or {})
        values = [float((preparation or {})[name]) for name in self.preparation_names]
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
            result[batch] = self._detect(slices[batch], seeds=self.seed * 1_000_003 + batch % count)
        return result.unflatten(0, (len(image), count)).movedim(1, self.axis + 2).contiguous()

    def _detect(self, slices: Tensor, seeds: Tensor) -> Tensor:
        height, width = slices.shape[2:]
        divisor = self.detector.size_divisor
        padded = F.pad(slices, (0, -width % divisor, 0, -height % divisor))
        detection = self.detector.detect(padded, seeds=seeds)
        return torch.cat([detection.anomaly_map, detection.reconstruction], dim=1)[..., :height, :width]


def _check_preparation(module: VolumeDetector, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    stored = state_dict.get(f"{prefix}preparation")
    if stored is None:
        return  # a strict load will name the missing key
    own = module.preparation
    if stored.shape != own.shape or not torch.allclose(stored.to(own), own):
        settings = dict(zip(module.preparation_names, own.tolist(), strict=True))
        fact = f"the weights were trained with other settings, {stored.tolist()}, than the configured {settings}"
        raise BundleError("weights", fact, "use the settings the weights were trained with, or train again")
