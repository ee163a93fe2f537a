"""All methods on one cohort: what is written, what is not done twice, and what one failure leaves."""

from __future__ import annotations

import csv
import json
import shutil

import pytest
from typer.testing import CliRunner

from common.bundle import BUNDLES_DIR, available_bundles, metadata
from common.cli import app
from common.errors import BundleError, CohortError, OutputError, SkullStripError
from common.metrics.baselines import QUANTITIES
from common.report.benchmark_table import cell, site_cell
from common.transforms.pipeline import BrainPreprocessing
from common.weights import sha256
from common.workflows import benchmark
from common.workflows.benchmark import Variant

METHOD = "vae"
FITTED = {"mean_healthy_image", *QUANTITIES}  # on the healthy subjects of the split `train`
BASELINES = {f"{name}_T1" for name in ("intensity_dark", "intensity_bright", *FITTED)}


@pytest.fixture(scope="module")
def measured_once(cohort, tmp_path_factory):
    """The folder of a benchmark of one method."""
    output = tmp_path_factory.mktemp("benchmark") / "results"
    done = CliRunner().invoke(app, ["benchmark", str(cohort), "-o", str(output), "-m", METHOD, "--seed", "3"])
    assert done.exit_code == 0, done.output
    return output


@pytest.fixture
def measured(measured_once, tmp_path):
    """The same, of this test alone."""
    return shutil.copytree(measured_once, tmp_path / "measured")


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_files_of_a_benchmark(measured):
    names = {str(path.relative_to(measured)) for path in measured.rglob("*") if path.is_file()}
    results = {f"{key}/result" for key in {METHOD, *BASELINES}}
    assert names == {f"{result}{suffix}" for result in results for suffix in (".json", ".replicates.json")} | {
        "benchmark.json",
        "benchmark.csv",
        "benchmark.md",
    }


def test_result_of_a_method(measured):
    result = read(measured / METHOD / "result.json")
    assert (result["key"], result["kind"], result["seed"]) == (METHOD, "method", 3)
    assert result["weights_sha256"] == sha256(BUNDLES_DIR / METHOD / "models" / "model.pt")
    assert "baselines" not in result
    assert "replicates" not in result
    assert len(read(measured / METHOD / "result.replicates.json")["replicates"]["auprc"]) in (0, 1000)
    assert result["n_lesions"] == 1
    assert 0 <= result["lesion_recall"]["value"] <= 1
    time = result["run_time"]
    assert time["seconds_per_volume"] > time["network_seconds_per_slice"] > 0
    assert 0 < time["slices_per_volume"] <= 12
    assert time["engine"] == "torch"
    assert time["peak_memory_mb"] is None or time["peak_memory_mb"] > 100
    assert result["protocols"]["mad_ad_s2"]["n_slices"] == 1
    dice = result["protocols"]["masked_bernoulli"]["dice"]
    text = (measured / "benchmark.md").read_text(encoding="utf-8")
    assert f"| {METHOD} | {dice['mean']:.3f} ± {dice['std']:.3f} |" in text


def test_what_a_report_draws(measured):
    for key in (METHOD, *BASELINES):
        result = read(measured / key / "result.json")
        assert set(result["curves"]) == {"threshold", "precision", "recall", "dice"}
        assert set(result["slice_scores"]) == {"subject", "slice", "score", "method_score", "abnormal"}
        assert len({len(values) for values in result["slice_scores"].values()}) == 1
        assert set(result["slice_scores"]["subject"]) == {"c", "d"}


def test_tables_hold_every_method_best_first(measured):
    table = read(measured / "benchmark.json")
    assert {method["key"] for method in table["methods"]} == {METHOD, *BASELINES}
    values = [method["auprc"]["value"] for method in table["methods"]]
    assert values == sorted(values, reverse=True)
    assert not set(benchmark.LONG) & set(table["methods"][0])
    best, *others = table["methods"]
    assert "auprc" not in best["difference_to_best"]
    for other in others:
        difference = other["difference_to_best"]["auprc"]
        assert difference["best"] == best["key"]
        assert difference["value"] == pytest.approx(other["auprc"]["value"] - best["auprc"]["value"])
    with (measured / "benchmark.csv").open(newline="", encoding="utf-8") as file:
        rows = {(row["method"], row["metric"]): row["value"] for row in csv.DictReader(file)}
    for method in table["methods"]:
        assert float(rows[method["key"], "auprc"]) == method["auprc"]["value"]
    text = (measured / "benchmark.md").read_text(encoding="utf-8")
    assert all(f"| {method['key']} | {cell(method['auprc'])} |" in text for method in table["methods"])


@pytest.mark.parametrize("key", sorted({METHOD, *BASELINES}))
def test_file_of_another_program_at_the_place_of_a_result_is_refused(key, cohort, tmp_path):
    (tmp_path / key).mkdir()
    (tmp_path / key / "result.json").write_text("{}", encoding="utf-8")
    with pytest.raises(OutputError, match=f"{key}/result.json"):
        benchmark.check_output(cohort, tmp_path, [Variant(METHOD)])


def test_finished_methods_are_not_run_again(measured, cohort, monkeypatch):
    def not_again(*_):
        raise AssertionError("was run again")

    before = (measured / "benchmark.md").read_bytes()
    monkeypatch.setattr(benchmark, "evaluate_apart", not_again)
    monkeypatch.setattr(benchmark, "run_baselines", not_again)
    assert benchmark.run_benchmark(cohort, measured, [METHOD], seed=3, options={"device": "auto"}) == 0
    assert (measured / "benchmark.md").read_bytes() == before
    for other in ({"seed": 4}, {"seed": 3, "options": {"strip": "atlas"}}):
        with pytest.raises(AssertionError, match="run again"):
            benchmark.run_benchmark(cohort, measured, [METHOD], **other)


def test_a_result_of_an_earlier_version_that_lacks_a_metric_is_measured_again(measured, cohort, monkeypatch, tmp_path):
    def again(*_):
        raise AssertionError("was run again")

    shutil.copytree(measured, tmp_path / "old")
    result = read(tmp_path / "old" / METHOD / "result.json")
    del result["voxel_recall_at_threshold"]
    (tmp_path / "old" / METHOD / "result.json").write_text(json.dumps(result), encoding="utf-8")
    monkeypatch.setattr(benchmark, "evaluate_apart", again)
    with pytest.raises(AssertionError, match="run again"):
        benchmark.run_benchmark(cohort, tmp_path / "old", [METHOD], seed=3, options={"device": "auto"})


def test_false_alarms_and_recall_stand_in_the_tables(measured):
    result = read(measured / METHOD / "result.json")
    assert [site["site"] for site in result["sites"]] == [""]
    assert result["sites"][0]["n_healthy"] >= 1
    text = (measured / "benchmark.md").read_text(encoding="utf-8")
    assert f"| {METHOD} | {site_cell(result['sites'][0])} |" in text
    assert "volume AUROC, largest component" in text


def test_configs_that_change_are_measured_again(measured, cohort, tmp_path, monkeypatch):
    """In a copy of the bundle, so that no other test sees it."""

    def again(variant, *_):
        raise benchmark.MethodFailedError("was run again")

    shutil.copytree(BUNDLES_DIR / METHOD, tmp_path / METHOD)
    monkeypatch.setattr("common.bundle.BUNDLES_DIR", tmp_path)
    monkeypatch.setattr(benchmark, "evaluate_apart", again)
    assert benchmark.run_benchmark(cohort, measured, [METHOD], seed=3) == 0
    config = tmp_path / METHOD / "configs" / "inference.json"
    config.write_bytes(config.read_bytes() + b" ")
    assert benchmark.run_benchmark(cohort, measured, [METHOD], seed=3) == 1


def test_settings_that_change_in_the_code_are_measured_again(measured, cohort, monkeypatch):
    def again(variant, *_):
        raise benchmark.MethodFailedError("was run again")

    monkeypatch.setattr(benchmark, "evaluate_apart", again)
    assert benchmark.run_benchmark(cohort, measured, [METHOD], seed=3) == 0
    monkeypatch.setattr(BrainPreprocessing, "settings", {"spacing_mm": 3})
    assert benchmark.run_benchmark(cohort, measured, [METHOD], seed=3) == 1


def test_setting_that_a_method_cannot_work_with_stops_no_other(measured, cohort):
    broken = f"{METHOD}:network_def::num_seeds=0"
    assert benchmark.run_benchmark(cohort, measured, [METHOD, broken], seed=3) == 1
    (message,) = read(measured / "benchmark.json")["failed"].values()
    assert message.startswith("SettingError: VolumeDetector: num_seeds = 0")


def test_images_that_change_are_measured_again(cohort, tmp_path):
    for path in cohort.parent.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    copy = tmp_path / cohort.name
    digest = benchmark.cohort_digest(cohort, ["T1"])
    assert benchmark.cohort_digest(copy, ["T1"]) == digest
    lesion = tmp_path / "d_lesion.nii.gz"
    lesion.write_bytes(lesion.read_bytes() + b" ")
    assert benchmark.cohort_digest(copy, ["T1"]) != digest


def test_a_method_that_fails_stops_no_other(measured, cohort, monkeypatch, capsys):
    def fails(variant, *_):
        raise benchmark.MethodFailedError(f"{variant.key} is broken")

    monkeypatch.setattr(benchmark, "evaluate_apart", fails)
    other = next(key for key in available_bundles() if metadata(key)["modalities"] == ["T1"] and key < METHOD)
    monkeypatch.setattr(benchmark, "run_baselines", lambda *_: {})
    assert benchmark.run_benchmark(cohort, measured, [other, METHOD], seed=3) == 1
    table = read(measured / "benchmark.json")
    assert table["failed"] == {other: f"{other} is broken"}
    assert METHOD in {method["key"] for method in table["methods"]}
    assert f"{other} is broken" in (measured / "benchmark.md").read_text(encoding="utf-8")


def test_images_that_no_method_can_prepare(measured, cohort, monkeypatch, tmp_path):
    """The baselines fail as a method does; where nothing is left there is no table."""

    def refused(*_):
        raise SkullStripError("a.nii.gz", "no brain alone", "strip it")

    monkeypatch.setattr(benchmark, "run_baselines", refused)
    monkeypatch.setattr(benchmark, "finished", lambda folder, _: read(folder / "result.json"))
    shutil.copytree(measured / METHOD, tmp_path / "some" / METHOD)
    assert benchmark.run_benchmark(cohort, tmp_path / "some", [METHOD], seed=3) == 1
    table = read(tmp_path / "some" / "benchmark.json")
    assert [method["key"] for method in table["methods"]] == [METHOD]
    assert table["failed"] == {"baselines_T1": "SkullStripError: a.nii.gz: no brain alone; strip it"}

    def fails(*_):
        raise benchmark.MethodFailedError("broken")

    monkeypatch.setattr(benchmark, "finished", lambda *_: None)
    monkeypatch.setattr(benchmark, "evaluate_apart", fails)
    with pytest.raises(CohortError, match=r"no method could be measured.*no brain alone"):
        benchmark.run_benchmark(cohort, tmp_path / "none", [METHOD], seed=3)
    assert not (tmp_path / "none" / "benchmark.json").exists()


def test_evaluation_that_breaks_is_said_in_one_line(cohort, tmp_path):
    identity = {"seed": 0}
    with pytest.raises(benchmark.MethodFailedError, match=r"CohortError: .*no such cohort CSV"):
        benchmark.evaluate_apart(
            Variant(METHOD), cohort.with_name("none.csv"), tmp_path / METHOD, identity, {"device": "cpu"}
        )
    assert not list((tmp_path / METHOD).iterdir())


def test_bundles_are_chosen_by_the_columns(cohort, tmp_path):
    of_t1 = [key for key in available_bundles() if metadata(key)["modalities"] == ["T1"]]
    assert benchmark.fitting_bundles(cohort) == of_t1
    other = tmp_path / "cohort.csv"
    other.write_text("subject,split,PET,lesion\ns,test,s.nii,\n", encoding="utf-8")
    with pytest.raises(CohortError, match="no bundle works on PET"):
        benchmark.fitting_bundles(other)
    with pytest.raises(CohortError, match=f"no column T1, which {METHOD} needs"):
        benchmark.fitting_bundles(other, [METHOD])
    with pytest.raises(BundleError, match="no such bundle"):
        benchmark.fitting_bundles(cohort, ["nonsense"])


def test_a_variant_of_a_bundle_has_a_row_of_its_own(measured, cohort):
    method = "ae"  # with its sign the map of `METHOD` is 0 on brains as small as these
    smooth = f"{method}:network_def::smoothing_vox=2,network_def::mirror=true"
    done = CliRunner().invoke(
        app, ["benchmark", str(cohort), "-o", str(measured), "-m", method, "-m", smooth, "--seed", "3"]
    )
    assert done.exit_code == 0, done.output
    methods = {found["key"]: found for found in read(measured / "benchmark.json")["methods"]}
    key = f"{method}_network_def_smoothing_vox=2_network_def_mirror=true"
    assert {method, key} <= set(methods)
    assert methods[key]["items"] == ["network_def::smoothing_vox=2", "network_def::mirror=true"]
    assert methods[key]["auprc"]["value"] != methods[method]["auprc"]["value"]
    assert (measured / key / "result.json").is_file()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("vae:nonsense=1", "nonsense: the bundle's configs have no such item"),
        ("vae:sigma", "sigma: is not ITEM=VALUE"),
        ("nonsense:sigma=1", "nonsense: no such bundle"),
    ],
)
def test_settings_that_there_are_not(cohort, tmp_path, method, message):
    done = CliRunner().invoke(app, ["benchmark", str(cohort), "-o", str(tmp_path), "-m", method])
    assert done.exit_code != 0
    assert message in done.stderr
    assert not list(tmp_path.iterdir())
