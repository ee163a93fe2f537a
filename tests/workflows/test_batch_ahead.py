"""The next case is prepared while the network is at the present one, and nothing else changes."""

from __future__ import annotations

import csv
import json
import threading

import numpy as np
import pytest
import torch

from common.bundle import load_workflow
from common.progress import quiet
from common.workflows import batch
from common.workflows.batch import CaseRunner, PreparedItem, claimed, detect_cases

pytestmark = pytest.mark.usefixtures("no_picture")

SECONDS = 60  # after which a test that hangs fails
NAMES = ("first", "bad", "second", "third")
OF_THE_RUN = ("seconds", "created")  # of a record: differ from run to run


@pytest.fixture(scope="module")
def items(thin_brain, save_nifti, tmp_path_factory):
    """Three brains of four slices, and between them one of NaN."""
    folder = tmp_path_factory.mktemp("brains")
    image, affine = thin_brain
    for index, name in enumerate(NAMES):
        scan = image * np.nan if name == "bad" else image + (image > 0) * np.float32(index)
        save_nifti(folder / f"{name}.nii.gz", scan, affine)
    return [{"subject": name, "image": str(folder / f"{name}.nii.gz")} for name in NAMES]


@pytest.fixture
def workflow_of():
    """Make the workflow that writes into a folder."""

    def make(folder):
        workflow = load_workflow("dae", ["inference.json"], output_dir=str(folder))
        workflow.initialize()
        return workflow

    return make


def before_each_case(workflow, do):
    """Let `do` be called where the network begins with a case."""
    workflow.parser.get_parsed_content("network_def").register_forward_pre_hook(lambda *_: do())


def results(folder):
    """The bytes of each file by its name; records and tables without what is of the run."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name, content in found.items():
        if name.endswith("run.json"):
            found[name] = without_time(json.loads(content))
    for name, delimiter in (("status.tsv", "\t"), ("cases.csv", ",")):
        rows = csv.DictReader(found[name].decode().splitlines(), delimiter=delimiter)
        found[name] = [without_time(row) for row in rows]
    return found


def without_time(record):
    return {key: value for key, value in record.items() if key not in OF_THE_RUN}


def nothing_is_left(folder):
    return not list(folder.glob(".*")) and not any(thread.name.startswith("ahead") for thread in threading.enumerate())


def test_results_order_and_errors_are_those_of_one_after_the_other(items, workflow_of, tmp_path, capsys):
    said, found = {}, {}
    for ahead in (False, True):
        out = tmp_path / str(ahead)
        with quiet():  # progress depends on the time
            assert detect_cases(workflow_of(out), items, ahead=ahead) == 1
        said[ahead] = capsys.readouterr().err
        found[ahead] = results(out)
        assert nothing_is_left(out)
    assert said[True] == said[False]
    assert found[True].keys() == found[False].keys()
    assert [name for name in found[True] if found[True][name] != found[False][name]] == []
    assert [(row["case"], row["status"]) for row in found[True]["status.tsv"]] == [
        (name, "ImageIntensityError" if name == "bad" else "unreliable") for name in NAMES
    ]
    assert all(json.loads((out / name / "run.json").read_bytes())["seconds"] > 0 for name in ("first", "third"))


def test_finished_cases_are_not_prepared_again(items, workflow_of, tmp_path, monkeypatch):
    assert detect_cases(workflow_of(tmp_path), items[:1], ahead=True) == 0
    before = (tmp_path / "first" / "run.json").stat().st_mtime_ns
    prepared, prepare = [], PreparedItem.prepare
    monkeypatch.setattr(PreparedItem, "prepare", lambda case: prepared.append(case.item["subject"]) or prepare(case))
    assert detect_cases(workflow_of(tmp_path), [items[0], items[2]], ahead=True) == 0
    assert prepared == ["second"]
    assert (tmp_path / "first" / "run.json").stat().st_mtime_ns == before


def test_slow_case_is_prepared_while_the_network_is_at_the_one_before(items, workflow_of, tmp_path, monkeypatch):
    """Each waits for the other: the preparation for the network to begin, the network for the preparation to end."""
    network_began, was_prepared, ahead = threading.Event(), threading.Event(), CaseRunner.ahead

    def slow(runner, item, overwrite):
        assert item["subject"] == "first" or network_began.wait(SECONDS)
        made = ahead(runner, item, overwrite)
        if item["subject"] == "second":
            was_prepared.set()
        return made

    def wait_for_the_next():
        network_began.set()
        assert was_prepared.wait(SECONDS)

    monkeypatch.setattr(CaseRunner, "ahead", slow)
    workflow = workflow_of(tmp_path)
    before_each_case(workflow, wait_for_the_next)
    assert detect_cases(workflow, [items[0], items[2]], ahead=True) == 0


def test_case_that_is_prepared_ahead_is_kept_from_other_processes(tmp_path):
    items, made = [{"subject": name} for name in "abc"], threading.Event()

    def make(item):
        if item["subject"] == "b":
            made.set()
        return item["subject"]

    mine = claimed(tmp_path, items, make, ahead=True)
    assert next(mine) == "a"
    assert made.wait(SECONDS)
    other = claimed(tmp_path, items, dict)
    assert next(other) == {"subject": "c"}
    assert next(mine) == "b"
    other.close()
    assert list(mine) == ["c"]
    assert nothing_is_left(tmp_path)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_run_that_is_stopped_leaves_nothing(error, items, workflow_of, tmp_path):
    def stop():
        raise error

    workflow = workflow_of(tmp_path)
    before_each_case(workflow, stop)
    with pytest.raises(error):
        detect_cases(workflow, items, ahead=True)
    assert nothing_is_left(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["status.tsv"]


def test_next_case_is_prepared_ahead_where_the_network_is_not_on_the_cpu(items, workflow_of, tmp_path, monkeypatch):
    chosen = []

    def no_cases(folder, items, make, ahead):
        chosen.append(ahead)
        yield from ()

    monkeypatch.setattr(batch, "claimed", no_cases)
    workflow = workflow_of(tmp_path)
    for device, several in (("cpu", items), ("cuda", items), ("mps", items), ("cuda", items[:1])):
        workflow.parser.get_parsed_content("evaluator").state.device = torch.device(device)
        detect_cases(workflow, several)
    assert chosen == [False, True, True, False]
