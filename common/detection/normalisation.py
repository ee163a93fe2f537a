"""Each brain is its own control: the anomaly map in units of its own scatter, compared with healthy brains and sides.

On a scanner that a network has not learned its residuals are larger everywhere. What is abnormal still stands out of
the residuals of the same brain, of the same place in healthy brains, and of the mirrored place in the same brain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn

from ..errors import SettingError
from ..images.mni import mni_grid
from ..recorded import Recorded
from .alignment import ATLAS_MM, Align, by_boxes, by_registration, from_atlas, mirrored, to_atlas

ATLAS_SHAPE = mni_grid(ATLAS_MM)[1]
TOLERANCE_VOX = 3  # side of the cube whose largest value stands for the mirrored place
MIRROR_SIGMA_VOX = 0.7
MIN_COUNT = 0.05  # of a subject; where fewer healthy brains are, the atlas says nothing
SCALE_QUANTILES = 101
ATLAS_SUBJECTS = 12  # an atlas of fewer is noise: 16 give what 60 give
TAIL = 0.01  # of the voxels of healthy brains: where it begins, the darker and the brighter part are made equal
SIGNED_FROM = 1e-3  # change of an intensity in [0, 1] that has its full sign: rounding has hardly any
EPSILON = 1e-6  # the least scale, for a map that is constant in more than half of the brain


@dataclass(frozen=True)
class HealthyMap:
    """The map of a healthy subject in robust units, with what it adds to the atlas.

    z: (P, H, W, D), its parts in units of its own scatter, 0 outside the brain; brain: (H, W, D) bool, where it
    belongs; to_mni: (4, 4), its voxels to mm of MNI152. scale: the scatter in units of the map. total: (P, 46, 55, 46),
    smoothed z in MNI152; count: (46, 55, 46), the brain there.
    """

    z: np.ndarray
    brain: np.ndarray
    to_mni: np.ndarray
    scale: float
    total: Tensor
    count: Tensor


class WithinSubjectNormalisation(Recorded, nn.Module):
    """Robust z-score of a map within its brain, minus a healthy atlas, minus the mirrored side, smoothed.

    With m the map, b the brain and g the result mirrored left to right:

    1. z = (m - median_b m) / MAD_b m, with MAD = median of |m - median|;
    2. r = z - a, where a is the mean z of healthy subjects at this place;
    3. r = r - w max(g, 0), where g is dilated (3 x 3 x 3, the tolerance) and smoothed (0.7 voxel) before;
    4. Gaussian smoothing within the brain.

    The result has no unit: it says how many times the scatter of its own brain a voxel lies above what is expected.
    The median and the MAD stand as long as much less than half of a brain is abnormal. Step 3 weakens what is abnormal
    on both sides alike. The same place of another brain, and of the other side, is found by the boxes around the
    brains, or with `registration` by the affine that brings the mask of the brain to that of MNI152.

    With `signed_smoothing_vox`, what is darker and what is brighter than its reconstruction are two parts of the map.
    Where the reconstruction of a healthy brain is blurred, both alternate from gyrus to sulcus, and a mean over some
    voxels cancels them; a lesion is darker, or brighter, as a whole. In place of step 1:

    1. z = max(s, 0) / MAD_b m of the darker part and max(-s, 0) / MAD_b m of the brighter one, where s is m, negative
       where the image is brighter than its reconstruction and 0 where they are the same, smoothed within the brain;

    steps 2 to 4 are done of each with an atlas of its own, and the result is the larger of the two, the brighter part
    times a factor with which the highest `TAIL` of the voxels of healthy brains begins at the same value in both.

    The atlas, the factor and the scales of the healthy subjects are buffers, 0, 1 and NaN until `fit`.

    Args:
        healthy_atlas: whether step 2 is done; the atlas is 0 until it is fitted.
        contralateral_weight: w, 0 to 1; 0 leaves step 3 out.
        smoothing_vox: standard deviation of step 4, in voxels; 0 leaves it out.
        signed_smoothing_vox: standard deviation of the smoothing of s, in voxels; 0 for one part, without a sign.
        registration: whether places are found by the affine to MNI152; it takes 0.4 s of a core a brain.

    Raises SettingError where a number is out of its range.
    """

    atlas: Tensor
    brighter_factor: Tensor
    scale_quantiles: Tensor

    def __init__(
        self,
        healthy_atlas: bool = True,
        contralateral_weight: float = 0.5,
        smoothing_vox: float = 1.5,
        signed_smoothing_vox: float = 0.0,
        registration: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= contralateral_weight <= 1 or min(smoothing_vox, signed_smoothing_vox) < 0:
            fact = f"contralateral_weight = {contralateral_weight}, smoothing_vox = {smoothing_vox}, "
            fact += f"signed_smoothing_vox = {signed_smoothing_vox}"
            raise SettingError("WithinSubjectNormalisation", fact, "choose a weight from 0 to 1, a smoothing from 0")
        self.healthy_atlas = healthy_atlas
        self.contralateral_weight = contralateral_weight
        self.smoothing_vox = smoothing_vox
        self.signed_smoothing_vox = signed_smoothing_vox
        self.align: Align = by_registration if registration else by_boxes
        shape = (2, *ATLAS_SHAPE) if signed_smoothing_vox else ATLAS_SHAPE
        self.register_buffer("atlas", torch.zeros(shape if healthy_atlas else 0))
        factor = torch.ones((), dtype=torch.float64)
        self.register_buffer("brighter_factor", factor, persistent=bool(signed_smoothing_vox))
        self.register_buffer("scale_quantiles", torch.full((SCALE_QUANTILES,), torch.nan, dtype=torch.float64))

    @torch.no_grad()
    def forward(self, anomaly_map: Tensor, brain: Tensor, change: Tensor | None = None) -> tuple[Tensor, float]:
        """The normalised map, 0 outside the brain and below 0 where less than expected, and the scale (the MAD).

        anomaly_map: (1, H, W, D) float, axis 1 from left to right; brain: (1, H, W, D) bool; change: (C, H, W, D), the
        reconstruction less the image, whose mean over the channels gives the sign; needed with
        `signed_smoothing_vox`, ValueError where it is not given.
        """
        inside = brain[0].cpu().numpy()
        parts, scale = self._parts(anomaly_map, inside, change)
        compared = self._compare(parts, inside, self.align(inside), self._fitted_atlas()) if inside.any() else parts
        result = self._joined(compared)
        return torch.from_numpy(result)[None].to(anomaly_map.device), scale

    def healthy_map(self, anomaly_map: Tensor, brain: Tensor, change: Tensor | None = None) -> HealthyMap:
        """What `fit` needs of a healthy subject, on the CPU; shapes as for `forward`."""
        inside = brain[0].cpu().numpy()
        parts, scale = self._parts(anomaly_map, inside, change)
        to_mni = self.align(inside)
        total, count = (to_atlas(x.astype(np.float32), to_mni) for x in (parts, inside[None]))
        return HealthyMap(parts, inside, to_mni, scale, total, count[0])

    @property
    def is_fitted(self) -> bool:
        """Whether `fit` was called, or fitted weights were loaded."""
        return bool(self.scale_quantiles.isfinite().all())

    def keeps_atlas(self, subjects: int) -> bool:
        """Whether `fit` on so many keeps the atlas that was fitted before."""
        return self.healthy_atlas and self.is_fitted and subjects < ATLAS_SUBJECTS

    def fit(self, subjects: Sequence[HealthyMap]) -> list[np.ndarray]:
        """Fit the atlas, the factor and the scales; return the normalised values (n,) of each subject's brain.

        Of each subject they are compared with the atlas of the others: against an atlas that has seen it a healthy
        brain would look more healthy than the next patient's. An atlas that was fitted before is kept, and the factor
        with it, where there are fewer than `ATLAS_SUBJECTS`, which say less about a place than about the scatter.
        """
        keep = self.keeps_atlas(len(subjects))
        total = torch.stack([subject.total for subject in subjects]).sum(dim=0, dtype=torch.float64)
        count = torch.stack([subject.count for subject in subjects]).sum(dim=0, dtype=torch.float64)
        levels = torch.linspace(0, 1, SCALE_QUANTILES, dtype=torch.float64)
        scales = torch.tensor([subject.scale for subject in subjects], dtype=torch.float64)
        self.scale_quantiles.copy_(torch.quantile(scales, levels))
        compared = []
        for subject in subjects:
            others = self._fitted_atlas()
            if self.healthy_atlas and not keep:
                others = mean_of(total - subject.total, count - subject.count)
            compared.append(self._compare(subject.z, subject.brain, subject.to_mni, others)[:, subject.brain])
        if self.healthy_atlas and not keep:
            self.atlas.copy_(mean_of(total, count).view_as(self.atlas))
        if self.signed_smoothing_vox and not keep:
            darker, brighter = np.quantile(np.concatenate(compared, axis=1), 1 - TAIL, axis=1)
            self.brighter_factor.fill_(float(darker / max(brighter, EPSILON)))
        return [self._joined(parts) for parts in compared]

    def _fitted_atlas(self) -> Tensor | None:
        """(P, 46, 55, 46), on the CPU."""
        return self.atlas.float().cpu().view(-1, *ATLAS_SHAPE) if self.healthy_atlas else None

    def _parts(self, anomaly_map: Tensor, inside: np.ndarray, change: Tensor | None) -> tuple[np.ndarray, float]:
        """Step 1: the parts (P, H, W, D) float32 and the MAD."""
        values = anomaly_map[0].float().cpu().numpy()
        z, scale = robust_z(values, inside)
        if not self.signed_smoothing_vox:
            return z[None], scale
        if change is None:
            raise ValueError("give the change, for its sign")
        signed = values * (change.mean(dim=0).float() / SIGNED_FROM).clamp(-1, 1).cpu().numpy()
        signed = smoothed_inside(signed, inside, self.signed_smoothing_vox) / np.float32(scale)
        return np.stack([np.maximum(signed, 0), np.maximum(-signed, 0)]), scale

    def _compare(self, parts: np.ndarray, brain: np.ndarray, to_mni: np.ndarray, atlas: Tensor | None) -> np.ndarray:
        """Steps 2 to 4, (P, H, W, D) -> same."""
        if atlas is not None:
            parts = np.where(brain, parts - from_atlas(atlas, to_mni, brain.shape), 0)
        if self.contralateral_weight > 0:
            parts = np.stack([minus_mirrored(part, brain, to_mni, self.contralateral_weight) for part in parts])
        if self.smoothing_vox > 0:
            parts = np.stack([smoothed_inside(part, brain, self.smoothing_vox) for part in parts])
        return parts

    def _joined(self, parts: np.ndarray) -> np.ndarray:
        """The result of the compared parts (P, ...)."""
        return parts[0] if len(parts) == 1 else np.maximum(parts[0], parts[1] * np.float32(self.brighter_factor))


def minus_mirrored(values: np.ndarray, brain: np.ndarray, to_mni: np.ndarray, weight: float) -> np.ndarray:
    """Step 3: less what is above 0 around the mirrored place; (H, W, D), 0 outside the brain."""
    other = ndimage.grey_dilation(mirrored(values, to_mni), TOLERANCE_VOX)
    return np.where(brain, values - weight * np.maximum(ndimage.gaussian_filter(other, MIRROR_SIGMA_VOX), 0), 0)


def smoothed_inside(values: np.ndarray, brain: np.ndarray, sigma_vox: float) -> np.ndarray:
    """Step 4: the Gaussian mean of the brain's voxels only; (H, W, D), 0 outside the brain."""
    share = ndimage.gaussian_filter(brain.astype(np.float32), sigma_vox)
    total = ndimage.gaussian_filter(np.where(brain, values, 0), sigma_vox)
    return np.where(brain, total / np.maximum(share, EPSILON), 0).astype(np.float32)


def robust_z(values: np.ndarray, inside: np.ndarray) -> tuple[np.ndarray, float]:
    """(x - median) / MAD within `inside`, else 0, float32, and the MAD (without a factor); both (H, W, D)."""
    if not inside.any():
        return np.zeros_like(values, dtype=np.float32), EPSILON
    centre = np.median(values[inside])
    scale = max(float(np.median(np.abs(values[inside] - centre))), EPSILON)
    return np.where(inside, (values - centre) / np.float32(scale), 0).astype(np.float32), scale


def mean_of(total: Tensor, count: Tensor) -> Tensor:
    """The mean of healthy brains by sums and counts in an atlas, float32; 0 where there are hardly any."""
    return torch.where(count > MIN_COUNT, total / count.clamp(min=MIN_COUNT), 0.0).float()
