"""What run.json says of a case beside the run itself."""

from __future__ import annotations

import pytest

from common.detection.reliability import verdict
from common.results.case import describe

LESIONS = [{"volume_ml": 1.25}, {"volume_ml": 0.5}]


def numbers(share, healthy=None, doubts=()):
    """What `ScoreVolumed` adds."""
    origin = {"kind": "given"} if healthy is None else {"kind": "calibrated", "false_positive_share": healthy}
    return {"threshold": 0.3, "threshold_origin": origin, "abnormal_share": share, **verdict(doubts)}


@pytest.mark.parametrize(
    ("share", "healthy", "warned"),
    [
        (0.099, 0.01, False),
        (0.101, 0.01, True),
        (0.101, 0.02, False),
        (0.201, 0.02, True),
        (0.021, 0.002, True),
        (0.099, None, False),  # of a threshold that is given 1 % is taken for the healthy share
        (0.101, None, True),
    ],
)
def test_ten_times_the_healthy_share_is_warned_of(share, healthy, warned):
    warnings = describe(numbers(share, healthy), LESIONS)["warnings"]
    assert len(warnings) == warned
    assert all(f"{share:.0%} of the brain is above the threshold, more than 10 times" in text for text in warnings)


def test_doubts_are_warnings_too():
    found = describe(numbers(0.5, 0.01, ["slices of 5.0 mm", "another contrast"]), LESIONS)
    assert found["warnings"][:2] == [
        "unreliable, do not interpret: slices of 5.0 mm",
        "unreliable, do not interpret: another contrast",
    ]
    assert len(found["warnings"]) == 3
    assert (found["reliability"], found["doubts"]) == ("unreliable", ["slices of 5.0 mm", "another contrast"])
    assert (found["lesions"], found["lesion_volume_ml"]) == (2, 1.75)
