"""Every recipe names what there is: bundles, their configs and items, kinds of cohorts, metrics of a result."""

from __future__ import annotations

from typing import get_type_hints

import pytest

from common.bundle import BUNDLES_DIR, available_bundles, fitting_items
from common.cohorts.kinds import KINDS
from common.errors import SettingError
from common.metrics.paper_slices import SIZES_MM2
from common.workflows.recipes import recipe, recipes

NAMES = {
    *("berdiff-table1", "pinaya-table1", "pinaya-table2", "pinaya-table3", "madad-s1", "madad-s2", "madad-table3"),
    *("madad-table4", "autoddpm-table1", "autoddpm-table2", "autoddpm-table3"),
}
SIZES = {f"auto_ddpm::{size}::max_dice_exact" for size in SIZES_MM2}
PROTOCOLS = {
    *("mad_ad_s1::max_dice", "mad_ad_s2::max_dice", "auto_ddpm::healthy_ssim", "auto_ddpm::auprc"),
    *("auto_ddpm::max_dice", *SIZES, *(f"masked_bernoulli::{name}::mean" for name in ("dice", "auprc", "psnr"))),
}
METRICS = {"max_dice_pooled::value", *(f"protocols::{name}" for name in PROTOCOLS)}


@pytest.fixture(params=sorted(NAMES))
def one(request):
    return recipe(request.param)


def test_all_tables_are_there():
    assert recipes().keys() == NAMES
    with pytest.raises(SettingError, match="choose one of berdiff-table1"):
        recipe("madad-table9")


def test_trainings_are_of_bundles_with_these_configs_and_items(one):
    for training in one.trainings.values():
        assert training.bundle in available_bundles()
        assert all((BUNDLES_DIR / training.bundle / "configs" / name).is_file() for name in training.paper)
        for configs in (["train.json"], ["inference.json"]):
            assert fitting_items(training.bundle, configs, training.compact) == training.compact
            own = [*configs, *training.paper]
            assert fitting_items(training.bundle, own, training.set) == training.set


def test_rows_change_items_that_there_are(one):
    for row in one.rows.values():
        keys = {row["training"]} if "training" in row else {column["training"] for column in one.columns.values()}
        for training in (one.trainings[key] for key in keys):
            for overlays in ([], training.paper):
                fitting = fitting_items(training.bundle, ["inference.json", *overlays], row["set"])
                assert fitting == row["set"]


def test_cohorts_are_of_kinds_with_these_options(one):
    parts = [*one.train, *(part for parts in one.tests.values() for part in parts)]
    for part in parts:
        hints = get_type_hints(KINDS[part.kind].__wrapped__)
        assert all(hints[name](value) == value for name, value in part.options.items())
    if one.sprites is not None:
        assert one.sprites["kind"] in KINDS
    assert one.folders


def test_columns_are_metrics_of_a_test_that_there_is(one):
    assert {column["metric"] for column in one.columns.values()} <= METRICS
    assert {column["test"] for column in one.columns.values() if "test" in column} <= one.tests.keys()
    assert len(one.tests) == 1 or one.sprites or all("test" in column for column in one.columns.values())


def test_printed_numbers_are_one_a_column(one):
    width = len(one.columns) + one.mean
    assert all(len(numbers) == width for numbers in one.printed.values())
    assert one.sprites or set(one.rows) & set(one.printed)


def test_an_argument_of_what_a_stage_refers_to_has_no_place_there():
    item = "network_def::detector::map_kind"
    assert fitting_items("mad_ad", ["train.json"], {item: "mask"}) == {item: "mask"}
    assert fitting_items("mad_ad", ["train.json", "train_autoencoder.json"], {item: "mask"}) == {}


def test_hours_are_those_of_all_parts():
    one = recipe("madad-s2")
    assert one.gpu_hours == sum(t.gpu_hours for t in one.trainings.values()) + one.evaluation_gpu_hours > 0
