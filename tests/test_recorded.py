"""A class that records its constructor's arguments, and what is said of one that does not."""

from __future__ import annotations

import copy
import functools
import json
from typing import Any

import numpy as np
import pytest
import torch
from monai.networks.nets import DiffusionModelUNet
from torch import nn

from common.recorded import Recorded, describe, digest_of


class Part(Recorded, nn.Module):
    unrecorded = frozenset({"batch_size"})

    def __init__(self, width: int, gain: float = 1.0, batch_size: int = 8) -> None:
        super().__init__()
        self.line = nn.Linear(width, width)


class Whole(Part):
    def __init__(self, part: nn.Module, names: tuple[str, ...] = ("a",), **settings: Any) -> None:
        super().__init__(width=2, **settings)
        self.part = part


class Plain(Whole):
    """Without a constructor of its own."""


def unet(**settings):
    return DiffusionModelUNet(2, 1, 1, 1, (8, 8), (False, True), num_head_channels=4, norm_num_groups=4, **settings)


def test_arguments_and_defaults_are_recorded_once():
    part = Part(2)
    assert part.settings == {"width": 2, "gain": 1}
    assert part.changed_settings == {"width": 2}
    whole = Plain(part, gain=2.0, batch_size=1)
    assert whole.settings == {"part": {"class": "Part", "width": 2, "gain": 1}, "names": ["a"], "gain": 2}
    assert whole.changed_settings == {"part": {"class": "Part", "width": 2}, "gain": 2}
    assert describe(whole)["class"] == "Plain"
    assert copy.deepcopy(whole).settings == whole.settings
    assert "settings" not in whole.state_dict()


def test_a_wrong_call_fails_as_python_does():
    with pytest.raises(TypeError, match="width"):
        Part()
    with pytest.raises(TypeError, match="other"):
        Part(2, other=3)


def test_default_that_is_given_is_no_change():
    assert Part(2, gain=1).changed_settings == Part(2).changed_settings
    assert Whole(Part(2), names=["a"]).changed_settings == Whole(Part(2)).changed_settings


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.0, 0),
        (1.5, 1.5),
        (True, True),
        ((1, (2.0, None)), [1, [2, None]]),
        ({"a": (1,)}, {"a": [1]}),
        (torch.Size([2, 3]), [2, 3]),
        (torch.float16, "torch.float16"),
        (torch.tensor([[1 / 3, 1.0]]), ["0.33333", "1"]),
        (torch.empty(2, 3, device="meta"), {"class": "Tensor", "shape": [2, 3]}),
        (unet, "unet"),
        (functools.partial(unet, norm_eps=0.5), ["unet", [], {"norm_eps": 0.5}]),
    ],
)
def test_values(value, expected):
    described = describe(value)
    assert described == expected
    assert json.loads(json.dumps(described)) == described


def test_array_is_described_by_its_numbers_on_any_device():
    with torch.device("meta"):
        assert describe(np.array([1, 2.5])) == ["1", "2.5"]


@pytest.mark.parametrize("settings", [{"norm_eps": 1e-4}, {"resblock_updown": True}, {"use_flash_attention": True}])
def test_module_that_does_not_record_is_known_by_all_that_it_holds(settings):
    """None of these is an attribute of MONAI's U-Net, or changes a shape that a strict load would miss."""
    assert describe(unet()) == describe(unet().eval())
    assert describe(unet())["num_head_channels"] == [4, 4]
    assert describe(unet(**settings)) != describe(unet())


def test_digest():
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1})
    assert digest_of({"a": 1}) != digest_of({"a": 2})
    assert len(digest_of(None)) == 16
