"""The `network_def` of every bundle: a 2D method applied to a volume, slice by slice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from monai.networks.layers import gaussian_1d, separable_filtering
from monai.utils import convert_to_tensor, ensure_tuple, ensure_tuple_rep
from torch import Tensor, nn

from ..errors import BundleError, SettingError
from ..networks.weight_standardised_unet import filters_kept
from ..progress import inside
from ..recorded import Recorded
from .calibration import Calibration
from .mahalanobis import mahalanobis_map
from .method import AnomalyDetector, foreground_of, seeded_generators
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
        num_seeds: the map is the mean over as many seeds, the first of which is `seed`; of use to random methods only.
        mirror: the result for the mirrored slices (the first of their axes, left and right in RAS) is averaged in.
        combine: the map of several seeds: "maps", their mean; "mahalanobis", the distance to their reconstructions by
            the covariance of these, see `mahalanobis_map`: instead of the method's own map, so without its median.
        regularisation: of "mahalanobis"; 0.01 as published, with 10 seeds.
        smoothing_vox: standard deviation of a Gaussian smoothing of the map within the foreground, in voxels: a number
            for all three axes, or one for each; 0 for none. Slices that are no neighbours have 0 along `axis`.
        normalisation: what `Postprocessing` does to the map next; its atlas travels with the weights.

    `slice_scores`, (B, D) along `axis`: the method's own image-level scores of the slices that the last call has seen,
    NaN of those without foreground; None where they do not come with the map, see `score`.

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
        combine: Literal["maps", "mahalanobis"] = "maps",
        regularisation: float = 0.01,
        smoothing_vox: float | Sequence[float] = 0.0,
        normalisation: WithinSubjectNormalisation | None = None,
    ) -> None:
        super().__init__()
        sigmas = ensure_tuple(smoothing_vox)
        if num_seeds < 1 or len(sigmas) not in (1, 3) or min(sigmas) < 0:
            fact = f"num_seeds = {num_seeds}, smoothing_vox = {smoothing_vox}"
            remedy = "choose at least one seed, and a smoothing of 0 or more, one number or three"
            raise SettingError("VolumeDetector", fact, remedy)
        if combine == "mahalanobis" and (num_seeds < 2 or regularisation <= 0):
            fact = f"num_seeds = {num_seeds}, regularisation = {regularisation} with mahalanobis"
            raise SettingError("VolumeDetector", fact, "choose at least two seeds, and a regularisation above 0")
        self.detector = detector
        self.axis = axis
        self.batch_size = batch_size
        self.seed = seed
        self.num_seeds = num_seeds
        self.mirror = mirror
        self.combine = combine
        self.regularisation = regularisation
        self.smoothing_vox = smoothing_vox
        self.normalisation = normalisation
        self.calibration = Calibration()
        self.slice_scores: Tensor | None = None
        self.preparation_names = sorted(preparation or {})
        values = [float(x) for name in self.preparation_names for x in np.ravel((preparation or {})[name])]
        self.register_buffer("preparation", torch.tensor(values, dtype=torch.float64))
        self.register_load_state_dict_pre_hook(_check_preparation)

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """(B, C, H, W, D), prepared: foreground in (0, 1], background 0 -> (B, 1 + C, H, W, D): map, reconstruction."""
        count, slices = image.shape[self.axis + 2], self._slices(image)
        result = image.new_zeros(len(slices), 1 + slices.shape[1], *slices.shape[2:])
        scores = torch.full((len(slices),), torch.nan, device=slices.device)
        with filters_kept(self.detector):
            for batch in inside(self._batches(slices)):
                result[batch], found = self._detect(slices[batch], batch % count)
                if found is not None:
                    scores[batch] = found
        self.slice_scores = None if scores.isnan().all() else scores.unflatten(0, (len(image), count))
        result = result.unflatten(0, (len(image), count)).movedim(1, self.axis + 2).contiguous()
        if any(ensure_tuple(self.smoothing_vox)):
            result[:, :1] = smoothed_within(result[:, :1], foreground_of(image), self.smoothing_vox)
        return result

    @torch.no_grad()
    def score(self, image: Tensor) -> Tensor | None:
        """The method's own image-level scores of the slices where they take passes of their own: see `slice_scores`.

        (B, C, H, W, D), as for `forward` -> (B, D); None where they come with the map, or where the method has none.
        """
        if not self.detector.has_separate_score:
            return None
        count, slices = image.shape[self.axis + 2], self._slices(image)
        scores = torch.full((len(slices),), torch.nan, device=slices.device)
        for batch in inside(self._batches(slices), "slices scored"):
            views = self._views(slices[batch], batch % count)
            found = (self.detector.score(x, foreground_of(x), seeded_generators(seeds)) for x, seeds, _ in views)
            scores[batch] = _mean([score for score in found if score is not None])
        return None if scores.isnan().all() else scores.unflatten(0, (len(image), count))

    def _slices(self, image: Tensor) -> Tensor:
        """(B * D, C, H, W), D along `axis`; without meta data, which every operation on them would hand on."""
        return convert_to_tensor(image.movedim(self.axis + 2, 1).flatten(0, 1), track_meta=False)

    def _batches(self, slices: Tensor) -> Sequence[Tensor]:
        """Indices of the slices that hold foreground."""
        indices = (slices > 0).flatten(1).any(dim=1).nonzero().flatten()
        return indices.split(self.batch_size) if len(indices) else ()

    def _views(self, slices: Tensor, positions: Tensor) -> Iterator[tuple[Tensor, Tensor, bool]]:
        """What the method sees of slices, by seed and mirrored: padded slices, seeds, whether they are mirrored."""
        for seed in range(self.seed, self.seed + self.num_seeds):
            for mirrored in (False, True)[: 1 + self.mirror]:
                seen = slices.flip(2) if mirrored else slices
                yield padded(seen, self.detector.size_divisor), slice_seeds(seed, positions), mirrored

    def _detect(self, slices: Tensor, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        """Map and reconstruction in one, and the scores that come with them: combined over the views."""
        height, width = slices.shape[2:]
        total, count, scores, reconstructions = torch.zeros(()), 0, [], []
        for seen, seeds, mirrored in self._views(slices, positions):
            found = self.detector.detect(seen, seeds=seeds)
            pair = torch.cat([found.anomaly_map, found.reconstruction], dim=1)[..., :height, :width]
            pair = pair.flip(2) if mirrored else pair
            total, count = total + pair, count + 1
            scores += [] if found.score is None else [found.score]
            reconstructions += [pair[:, 1:]] if self.combine == "mahalanobis" else []
        result = total / count
        if reconstructions:
            draws, foreground = torch.stack(reconstructions), foreground_of(slices)
            result[:, :1] = mahalanobis_map(slices, draws, foreground, self.regularisation)
        return result, _mean(scores) if scores else None


def _mean(scores: Sequence[Tensor]) -> Tensor:
    """Of (B,) each, float32 where autocast made less of them."""
    return torch.stack([score.float() for score in scores]).mean(dim=0)


def volume_mean(slice_scores: Tensor | None) -> float | None:
    """The score of a volume, from those of its slices (D,): their mean, but for slices without foreground (NaN).

    The papers score slices. None where there is no score.
    """
    if slice_scores is None or slice_scores.isnan().all():
        return None
    return float(slice_scores.double().nanmean())


def padded(slices: Tensor, divisor: int) -> Tensor:
    """(B, C, H, W) with zeros to multiples of the divisor, right and below."""
    height, width = slices.shape[2:]
    return F.pad(slices, (0, -width % divisor, 0, -height % divisor))


def slice_seeds(seed: int, positions: Tensor) -> Tensor:
    """One seed for each slice, of a seed of the volume and the slices' indices along the axis, (B,) int64 -> same."""
    return seed * 1_000_003 + positions  # a prime: volumes of neighbouring seeds share none


def smoothed_within(anomaly_map: Tensor, foreground: Tensor, smoothing_vox: float | Sequence[float]) -> Tensor:
    """Gaussian mean of the foreground's voxels only, 0 outside: (B, 1, H, W, D) float and bool -> float.

    smoothing_vox: as for `VolumeDetector`.
    """
    kernels = [_kernel(sigma).to(anomaly_map) for sigma in ensure_tuple_rep(smoothing_vox, 3)]
    weights = foreground.to(anomaly_map.dtype)
    total, weight = (separable_filtering(x, kernels) for x in (anomaly_map * weights, weights))
    return torch.where(foreground, total / weight.clamp(min=torch.finfo(weight.dtype).tiny), 0)


def _kernel(sigma_vox: float) -> Tensor:
    """(n,), of sum 1."""
    if sigma_vox == 0:
        return torch.ones(1)
    return gaussian_1d(torch.tensor(float(sigma_vox)), truncated=3.0, approx="sampled", normalize=True)


def _check_preparation(module: VolumeDetector, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    stored = state_dict.get(f"{prefix}preparation")
    if stored is None:
        return  # a strict load will name the missing key
    own = module.preparation
    if stored.shape != own.shape or not torch.allclose(stored.to(own), own):
        names = ", ".join(module.preparation_names)
        fact = f"the weights were trained with other settings, {stored.tolist()}, than {own.tolist()} ({names})"
        raise BundleError("weights", fact, "use the settings the weights were trained with, or train again")
