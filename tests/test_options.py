"""Options that several commands share."""

from __future__ import annotations

from typing import get_args

import pytest
import typer

from common.bundle import available_bundles
from common.options import StripHow, _device, _part, known_bundle
from common.transforms.strip import Strip


def test_every_way_to_find_the_brain_is_offered():
    literal, _ = get_args(get_args(StripHow)[0])
    assert get_args(literal) == tuple(Strip)


@pytest.mark.parametrize("name", ["auto", "cpu", "cuda", "cuda:1", "mps"])
def test_device(name):
    assert _device(name) == name


@pytest.mark.parametrize(
    ("check", "text"),
    [(_device, "tpu"), (_device, "cuda:x"), (_part, "3/2"), (_part, "0/2"), (_part, "1"), (known_bundle, "nonsense")],
)
def test_what_is_not_offered_is_wrong_use(check, text):
    with pytest.raises(typer.BadParameter):
        check(text)


def test_what_is_offered_is_passed_on():
    assert [known_bundle(key) for key in available_bundles()] == available_bundles()
    assert (_part(None), _part("2/8")) == (None, "2/8")
