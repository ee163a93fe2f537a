import numpy as np
import pytest
import torch

from common.detection.reliability import MEASURED, OK, UNRELIABLE, doubts, verdict

# of real images, see docs/reliability.md
T1 = {"map_scale": 0.009, "contrast_order": 0.6, "vessel_share": 0.0002}
CT = {"air_level": 25.0, "bone_share": 0.19}
HEALTHY_SCALES = torch.linspace(0.005, 0.012, 101, dtype=torch.float64)
MODES = (0.35, 0.6, 0.76)


def doubts_of(changes=(), modes=MODES, spacing_mm=(1.0, 1.0, 1.2)):
    return doubts(T1 | dict(changes), HEALTHY_SCALES, modes, spacing_mm)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"map_scale": 0.0169},  # the largest of another scanner
        {"contrast_order": 0.329},  # the least of T1 images: a patient, slices of 3 mm, the brain found by the atlas
        {"vessel_share": 0.0043},  # the same patient
    ],
)
def test_a_t1_image_is_believed(changes):
    assert doubts_of(changes) == []
    assert verdict(doubts_of(changes)) == {"reliability": OK, "doubts": []}


@pytest.mark.parametrize(
    ("changes", "settings", "said"),
    [
        ({"map_scale": 0.023}, {}, "2.7 times as much as in a healthy subject"),
        ({"contrast_order": -0.12}, {}, "a FLAIR, a T2"),
        ({"contrast_order": 0.19}, {}, "a FLAIR, a T2"),  # a patient with a tumour, the largest of FLAIR images
        ({"vessel_share": 0.0065}, {}, "contrast agent"),
        ({}, {"modes": (np.nan,) * 3}, "do not show as in a T1 image"),
        ({}, {"spacing_mm": (0.9, 0.9, 4.8)}, "slices of 4.8 mm"),
        ({}, {"spacing_mm": (4.8, 0.9, 0.9)}, "slices of 4.8 mm"),
    ],
)
def test_each_sign_alone_is_enough_and_says_why(changes, settings, said):
    reasons = doubts_of(changes, **settings)
    assert len(reasons) == 1
    assert said in reasons[0]
    assert "\n" not in reasons[0]
    assert verdict(reasons) == {"reliability": UNRELIABLE, "doubts": reasons}


@pytest.mark.parametrize("single_slice", [{}, {"bone_share": 0.07}])
def test_a_head_ct_is_believed(single_slice):
    assert doubts(CT | single_slice) == []


def test_mr_is_no_head_ct():
    """By the air, which is black, and by the bone, which is not bright: each alone is enough."""
    assert len(doubts({"air_level": 2.0, "bone_share": 0.012})) == 2
    (reason,) = doubts(CT | {"air_level": 0.0})
    assert "air has the grey value 0 instead of 25" in reason
    (reason,) = doubts(CT | {"bone_share": 0.012})
    assert "1.2% of the head is as bright as bone" in reason


def test_what_is_not_known_is_no_reason():
    assert doubts({}) == []
    assert doubts({"map_scale": 9.0}) == []  # of a network whose calibration knows no scales
    assert doubts(dict.fromkeys(MEASURED, np.nan), HEALTHY_SCALES) == []
