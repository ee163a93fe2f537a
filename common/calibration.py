"""What a healthy population looks like to a trained method: a threshold and a distribution of scores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .methods.base import top_mean

N_QUANTILES = 101


def volume_score(anomaly_map: Tensor, brain: Tensor) -> float:
    """Score of a volume: the mean of the highest 1 % of the brain's map values."""
    return float(top_mean(anomaly_map[brain.bool()]))


class Calibration(nn.Module):
    """Fitted on held-out healthy subjects only; buffers, so that it travels with the weights. NaN until fitted.

    threshold: the map's value that `false_positive_share` of the healthy foreground voxels exceed.
    score_quantiles: quantiles 0, 1, ..., 100 % of the volume score (`volume_score`) of the healthy subjects.
    subjects: how many they were.
    """

    threshold: Tensor
    false_positive_share: Tensor
    score_quantiles: Tensor
    subjects: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("threshold", torch.tensor(torch.nan, dtype=torch.float64))
        self.register_buffer("false_positive_share", torch.tensor(torch.nan, dtype=torch.float64))
        self.register_buffer("score_quantiles", torch.full((N_QUANTILES,), torch.nan, dtype=torch.float64))
        self.register_buffer("subjects", torch.zeros((), dtype=torch.int64))

    @property
    def is_fitted(self) -> bool:
        """Whether `fit` was called, or fitted weights were loaded."""
        return bool(self.subjects > 0)

    def fit(self, threshold: float, false_positive_share: float, scores: Tensor) -> None:
        """scores: (n,) volume scores of the healthy subjects."""
        self.threshold.fill_(threshold)
        self.false_positive_share.fill_(false_positive_share)
        levels = torch.linspace(0, 1, N_QUANTILES, dtype=torch.float64)
        self.score_quantiles.copy_(torch.quantile(scores.to(torch.float64), levels))
        self.subjects.fill_(len(scores))

    def percentile(self, score: float) -> float:
        """Share of the healthy distribution below a volume score, in percent, 0 to 100."""
        return 100.0 * float((self.score_quantiles < score).sum()) / N_QUANTILES

    def describe(self, anomaly_map: Tensor, brain: Tensor, threshold: float) -> dict[str, Any]:
        """The volume as a whole, (1, H, W, D): its score, the percentile of that among the healthy (None until fitted,
        and of an empty map, which says nothing), and the share of the brain that is above the threshold."""
        score = volume_score(anomaly_map, brain)
        return {
            "threshold": threshold,
            "volume_score": score,
            "volume_score_percentile": self.percentile(score) if self.is_fitted and score > 0 else None,
            "abnormal_share": float((anomaly_map > threshold).sum()) / float(brain.sum()),
        }
