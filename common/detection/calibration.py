"""What a healthy population looks like to a trained method: a threshold and a distribution of scores."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .method import top_mean

N_QUANTILES = 101


def volume_score(anomaly_map: Tensor, brain: Tensor) -> float:
    """Score of a volume: the mean of the highest 1 % of the brain's map values."""
    return float(top_mean(anomaly_map[brain.bool()]))


class Calibration(nn.Module):
    """Fitted on held-out healthy subjects only; buffers, so that it travels with the weights. NaN until fitted.

    It owns the threshold: what a case is segmented with is this one or a given one, and `origin` says which.

    threshold: the map's value that `false_positive_share` of the healthy foreground voxels exceed.
    threshold_interval: 95 % of what the threshold would be with other healthy subjects; empty in older weights.
    score_quantiles: quantiles 0, 1, ..., 100 % of the volume score (`volume_score`) of the healthy subjects.
    subjects: how many they were.
    made_with: the settings that made their maps, JSON as (n,) uint8; empty until fitted, and in older weights.

    Buffers named in `sized_by_file` take the size that they have in a weights file, and may be missing from it.
    """

    sized_by_file: ClassVar[tuple[str, ...]] = ("made_with", "threshold_interval")

    threshold: Tensor
    threshold_interval: Tensor
    false_positive_share: Tensor
    score_quantiles: Tensor
    subjects: Tensor
    made_with: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("threshold", torch.tensor(torch.nan, dtype=torch.float64))
        self.register_buffer("false_positive_share", torch.tensor(torch.nan, dtype=torch.float64))
        self.register_buffer("score_quantiles", torch.full((N_QUANTILES,), torch.nan, dtype=torch.float64))
        self.register_buffer("subjects", torch.zeros((), dtype=torch.int64))
        self.register_buffer("made_with", torch.zeros(0, dtype=torch.uint8))
        self.register_buffer("threshold_interval", torch.zeros(0, dtype=torch.float64))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in self.sized_by_file:
            own = getattr(self, name)
            stored = state_dict.setdefault(prefix + name, own.new_zeros(0))
            setattr(self, name, own.new_empty(stored.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def is_fitted(self) -> bool:
        """Whether `fit` was called, or fitted weights were loaded."""
        return bool(self.subjects > 0)

    @property
    def settings(self) -> dict[str, Any] | None:
        """Those that made the maps that it was fitted on, see `Fingerprint.of_map`; None where that is not recorded."""
        return json.loads(bytes(self.made_with.tolist())) if len(self.made_with) else None

    def fit(
        self,
        threshold: float,
        false_positive_share: float,
        scores: Tensor,
        settings: Mapping[str, Any] | None = None,
        threshold_interval: tuple[float, float] | None = None,
    ) -> None:
        """scores: (n,) volume scores of the healthy subjects; settings: those that made their maps."""
        made_with = b"" if settings is None else json.dumps(settings, sort_keys=True).encode()
        self.made_with = self.made_with.new_tensor(list(made_with))
        self.threshold.fill_(threshold)
        self.false_positive_share.fill_(false_positive_share)
        levels = torch.linspace(0, 1, N_QUANTILES, dtype=torch.float64)
        self.score_quantiles.copy_(torch.quantile(scores.to(torch.float64), levels))
        self.subjects.fill_(len(scores))
        self.threshold_interval = self.threshold_interval.new_tensor(threshold_interval or ())

    def percentile(self, score: float) -> float:
        """Share of the healthy distribution below a volume score, in percent, 0 to 100."""
        return 100.0 * float((self.score_quantiles < score).sum()) / N_QUANTILES

    def origin(self, threshold: float) -> dict[str, Any]:
        """Where a threshold in use comes from: the healthy subjects, or `given` by the user."""
        if not self.is_fitted or threshold != float(self.threshold):
            return {"kind": "given"}
        share, subjects = float(self.false_positive_share), int(self.subjects)
        interval = {"interval": self.threshold_interval.tolist()} if len(self.threshold_interval) else {}
        return {"kind": "calibrated", "false_positive_share": share, "subjects": subjects, **interval}

    def describe(self, anomaly_map: Tensor, brain: Tensor, threshold: float) -> dict[str, Any]:
        """The volume as a whole, (1, H, W, D): its score, the percentile of that among the healthy (None until fitted,
        and of an empty map, which says nothing), and the share of the brain that is above the threshold."""
        score = volume_score(anomaly_map, brain)
        return {
            "threshold": threshold,
            "threshold_origin": self.origin(threshold),
            "volume_score": score,
            "volume_score_percentile": self.percentile(score) if self.is_fitted and score > 0 else None,
            "abnormal_share": float((anomaly_map > threshold).sum()) / float(brain.sum()),
        }


def origin_in_words(origin: Mapping[str, Any]) -> str:
    """What `Calibration.origin` found, for people; of records of earlier versions as much as they say."""
    if origin.get("kind") != "calibrated":
        return {"given": "given by the user"}.get(origin.get("kind", ""), "of unknown origin")
    words = "calibrated"
    if "subjects" in origin:
        words += f" on {origin['subjects']} healthy subjects"
    if "false_positive_share" in origin:
        words += f", {100 * origin['false_positive_share']:g} % of whose brains lies above it"
    if "interval" in origin:
        words += ", 95 % interval {:.3g} to {:.3g}".format(*origin["interval"])
    return words


def percentile_in_words(record: Mapping[str, Any], short: bool = False) -> str:
    """Where the score of a record (run.json) lies among the healthy subjects of the calibration, for people.

    Even above all of them it says no more than that: they are few, and another healthy subject may score higher.
    """
    percentile = record.get("volume_score_percentile")
    if percentile is None:
        return "-" if short else "not compared with healthy subjects"
    share = "all" if percentile >= 100 else f"{percentile:.0f} % of the"
    subjects = (record.get("threshold_origin") or {}).get("subjects")
    compared = f"{share} healthy" if subjects is None else f"{share} {subjects} healthy"
    if short:
        return compared
    caution = "; another healthy subject may score higher" if percentile >= 100 else ""
    return f"higher than in {compared} subjects of the calibration{caution}"
