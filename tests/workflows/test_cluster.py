"""Cases that the workers of a Dask cluster do: the same results and status, whatever becomes of a worker."""

from __future__ import annotations

import csv
import functools
import json
import os
import re
import signal
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from common.cli import app
from common.errors import BundleError, ClusterError, SettingError, UADError, settings_said_as
from common.metrics import DetectionMetrics
from common.workflows import cluster
from common.workflows.batch import CaseDone
from common.workflows.cluster import Job, connected, detect_by_workers, detect_on, evaluate_on

dask = pytest.importorskip("dask", reason='pip install "uad-bundles[dask]"')
distributed = pytest.importorskip("distributed")

MEASURED = dict.fromkeys(("seconds_per_volume", "network_seconds_per_slice", "peak_memory_mb"))
ITEMS = [{"subject": name, "image": f"{name}.nii.gz"} for name in "abcd"]


@pytest.fixture(scope="module")
def cluster_client():
    """Of two workers that are threads of this process."""
    options = {"n_workers": 2, "threads_per_worker": 1, "processes": False, "dashboard_address": None}
    with distributed.LocalCluster(**options) as local, distributed.Client(local) as client:
        yield client


@pytest.fixture
def client(cluster_client):
    """A task that was cancelled runs on, and changes the logging of this process until it is done: it is waited for."""
    yield cluster_client
    for worker in cluster_client.scheduler_info(n_workers=-1)["workers"]:  # its one thread takes this when it is free
        cluster_client.submit(int, pure=False, workers=[worker]).result(60)


@pytest.fixture
def loaded(monkeypatch, tmp_path):
    """Runners without a model: they say `ok` of each case. The list of the workers that have loaded one."""
    workers = []
    saver = SimpleNamespace(output_dir=tmp_path / "out")

    def runner(job, worker):
        if job.key not in cluster._runners:
            cluster._runners.clear()
            workers.append(worker)
            cluster._runners[job.key] = SimpleNamespace(saver=saver)
        return cluster._runners[job.key]

    monkeypatch.setattr(Job, "runner", runner)
    monkeypatch.setattr(cluster, "run_case", lambda runner, item, overwrite: CaseDone(item["subject"], 1.0, {}))
    return workers


@pytest.fixture
def job(tmp_path):
    return Job("dae", {}, str(tmp_path / "out"))


def statuses(folder, name="status.tsv"):
    with (folder / name).open(newline="", encoding="utf-8") as file:
        return [(row["case"], row["status"], row["message"]) for row in csv.DictReader(file, delimiter="\t")]


def thin_brain(phantom, save_nifti, path, brightness):
    """A brain of four slices, which are too thick for a result to be relied on."""
    (height, width, depth), affine = phantom.grid(spacing_mm=(4, 4, 4))
    affine[:3, 3] += affine[:3, :3] @ (0, 0, depth // 2 - 2)
    image = phantom.on_grid((height, width, 4), affine)[0]
    return save_nifti(path, image + (image > 0) * np.float32(brightness), affine)


def test_all_cases_are_done_once_with_one_model(client, job, loaded, tmp_path):
    assert detect_on(client, job, ITEMS) == 0
    assert sorted(statuses(tmp_path / "out")) == [(name, "ok", "") for name in "abcd"]
    assert len(loaded) == 1  # of a process, which both workers are threads of
    assert not list((tmp_path / "out").glob(".*"))
    assert detect_on(client, Job("dae", {}, job.output_dir), ITEMS) == 0
    assert len(loaded) == 2  # another run may have other weights


def test_part_of_the_cases(client, job, loaded, tmp_path):
    assert detect_on(client, job, ITEMS, (2, 2)) == 0
    assert sorted(statuses(tmp_path / "out", "status_2-of-2.tsv")) == [("b", "ok", ""), ("d", "ok", "")]


def test_errors_of_a_worker_advise_what_this_command_knows(client, loaded, monkeypatch, tmp_path):
    def failing(runner, item, overwrite):
        message = str(UADError(item["image"], "no brain", "look at it", strip="atlas"))
        return CaseDone(item["subject"], 1.0, {}, failure=("SkullStripError", message))

    monkeypatch.setattr(cluster, "run_case", failing)
    with settings_said_as({"strip": "give --strip {}"}):
        assert detect_on(client, Job("dae", {}, str(tmp_path / "out")), ITEMS[:1]) == 1
    advice = "a.nii.gz: no brain; look at it, or give --strip atlas"
    assert statuses(tmp_path / "out") == [("a", "SkullStripError", advice)]


def test_case_that_no_worker_survives_is_said_and_the_others_are_done(client, job, loaded, monkeypatch, tmp_path):
    def dying(runner, item, overwrite):
        if item["subject"] == "b":
            raise distributed.KilledWorker("b", SimpleNamespace(address="tcp://10.0.0.1:1"), 3)
        return CaseDone(item["subject"], 1.0, {})

    monkeypatch.setattr(cluster, "run_case", dying)
    assert detect_on(client, job, ITEMS) == 1
    found = {case: status for case, status, _ in statuses(tmp_path / "out")}
    assert found == {"a": "ok", "b": "KilledWorker", "c": "ok", "d": "ok"}


def test_lost_scheduler_is_one_line_and_what_is_done_stays(client, job, loaded, monkeypatch, tmp_path):
    """Its futures are cancelled when the client notices."""
    lost = threading.Event()

    def waiting(runner, item, overwrite):
        if item["subject"] != "a":
            client.cancel([distributed.Future(key, client) for key in list(client.futures)], force=True)
            lost.wait(30)
        return CaseDone(item["subject"], 1.0, {})

    monkeypatch.setattr(cluster, "run_case", waiting)
    with pytest.raises(ClusterError, match=r"was lost.*start the same command again"):
        detect_on(client, job, ITEMS[:2])
    lost.set()
    assert statuses(tmp_path / "out") in ([("a", "ok", "")], [])


def test_bundle_that_no_worker_can_load_ends_the_run(client, job, monkeypatch):
    def runner(job, worker):
        cause = ValueError(threading.Lock())  # does not pass between processes
        raise BundleError("model.pt", "no such file", "give others", items="weights=PATH") from cause

    monkeypatch.setattr(Job, "runner", runner)
    with pytest.raises(BundleError, match=r"^model.pt: no such file; give others"):
        detect_on(client, job, ITEMS)


@pytest.mark.parametrize(("worker", "gpus", "device"), [(0, 2, 0), (3, 2, 1), ("1", 4, 1), (0, 1, None), (2, 0, None)])
def test_each_worker_has_a_gpu_of_its_own(worker, gpus, device, monkeypatch, tmp_path):
    given = []

    def load(bundle, configs, **override):
        given.append(override)
        raise BundleError(bundle, "not in this test", "-")

    monkeypatch.setattr(cluster, "load_workflow", load)
    for override in ({}, {"device": "$torch.device('cpu')"}):
        with pytest.raises(BundleError):
            Job("dae", override, str(tmp_path), gpus=gpus).runner(worker)
    expected = {} if device is None else {"device": f"$torch.device('cuda:{device}')"}
    assert given == [{"output_dir": str(tmp_path)} | expected, {"output_dir": str(tmp_path)} | override]


def test_paths_are_absolute_for_workers_elsewhere(monkeypatch, tmp_path):
    sent = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cluster, "connected", contextmanager(lambda jobs, scheduler: (yield None)))
    monkeypatch.setattr(cluster, "detect_on", lambda client, job, items, part: sent.append((job, items)))
    items = [{"subject": "a", "image": ["t1.nii.gz", "t2.nii.gz"], "brain": "b.nii.gz", "series": "t1"}]
    detect_by_workers("dae", {}, tmp_path / "out", items, scheduler="tcp://10.0.0.1:8786")
    (job, (item,)), here = sent.pop(), str(tmp_path)
    assert item == {
        "subject": "a",
        "image": [f"{here}/t1.nii.gz", f"{here}/t2.nii.gz"],
        "brain": f"{here}/b.nii.gz",
        "series": "t1",
    }
    assert (job.threads, job.gpus) == (None, 0)  # the cluster's own
    detect_by_workers("dae", {}, tmp_path / "out", items, jobs=1)
    job, sent_items = sent.pop()
    assert sent_items == items
    assert job.threads == torch.get_num_threads()


def test_no_scheduler_at_the_address():
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "0.3s"}),
        pytest.raises(ClusterError, match=r"^tcp://127.0.0.1:9: no Dask scheduler answers"),
        connected(None, "tcp://127.0.0.1:9"),
    ):
        pass


def test_jobs_and_scheduler_together_are_refused(tmp_path):
    with pytest.raises(SettingError, match="choose one of them"):
        detect_by_workers("dae", {}, tmp_path, ITEMS, jobs=2, scheduler="tcp://127.0.0.1:9")


def test_without_dask_the_package_is_named(monkeypatch):
    monkeypatch.setattr(cluster, "HAS_DISTRIBUTED", False)
    with pytest.raises(SettingError, match=r"uad-bundles\[dask\]"), connected(2, None):
        pass


def test_command_writes_what_one_process_writes(client, phantom, save_nifti, monkeypatch, tmp_path):
    """To the bit; and starts again where it was."""
    scans = [thin_brain(phantom, save_nifti, tmp_path / f"{name}.nii.gz", 9 * n) for n, name in enumerate("ab")]
    scans.append(tmp_path / "none.nii.gz")
    command = ["detect", *map(str, scans), "-m", "dae", "--device", "cpu"]
    one = CliRunner().invoke(app, [*command, "-o", str(tmp_path / "one")])
    many = in_threads(client, monkeypatch, *command, "-o", tmp_path / "many")
    assert one.exit_code == many.exit_code == 3
    assert sorted(statuses(tmp_path / "many")) == sorted(statuses(tmp_path / "one"))
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*"))
    assert files == sorted(path.relative_to(tmp_path / "many") for path in (tmp_path / "many").rglob("*"))
    for file in files:
        first, second = tmp_path / "one" / file, tmp_path / "many" / file
        if file.name.endswith(".nii.gz"):
            assert np.array_equal(nib.load(first).get_fdata(), nib.load(second).get_fdata()), file
        if file.name in ("preview.png", "lesions.csv", "lesions_all.csv"):
            assert first.read_bytes() == second.read_bytes(), file
        if file.name == "run.json":
            records = [json.loads(path.read_text(encoding="utf-8")) | {"seconds": 0} for path in (first, second)]
            assert records[0] == records[1]
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("many/*/run.json")}
    again = in_threads(client, monkeypatch, *command[:3], *command[4:], "-o", tmp_path / "many")
    assert again.exit_code == 0, again.output
    assert {path: path.stat().st_mtime_ns for path in written} == written


def in_threads(client, monkeypatch, *arguments):
    """The command by the workers of a client, with the threads that this process has."""
    with monkeypatch.context() as patch:
        patch.setattr(cluster, "connected", contextmanager(lambda jobs, scheduler: (yield client)))
        patch.setattr(cluster, "threads_each", lambda jobs: None)
        return CliRunner().invoke(app, [*map(str, arguments), "--jobs", "2"])


def contents(folder):
    """Of all files of a folder, by their names; voxels of images, of a status all but the seconds."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name.endswith(".nii.gz"):
            image = nib.load(path)
            found[name] = np.asarray(image.dataobj).tobytes(), image.affine.tobytes()
        else:
            found[name] = sorted(statuses(folder)) if name == "status.tsv" else path.read_text(encoding="utf-8")
    return found


def test_prepare_writes_what_one_process_writes(client, cohort, monkeypatch, tmp_path):
    """To the bit, a subject that is refused too; and what is there stays."""
    source = tmp_path / "cohort.csv"
    rows = cohort.read_text(encoding="utf-8").replace("b.nii.gz", "none.nii.gz", 1)
    source.write_text(re.sub(r",(\w+\.nii\.gz)", rf",{cohort.parent}/\1", rows), encoding="utf-8")
    command = ["prepare", source, "--spacing-mm", 4, "-o"]
    one = CliRunner().invoke(app, [*map(str, command), str(tmp_path / "one")])
    many = in_threads(client, monkeypatch, *command, tmp_path / "many")
    assert one.exit_code == many.exit_code == 3
    assert contents(tmp_path / "one") == contents(tmp_path / "many")
    assert [case for case, status, _ in statuses(tmp_path / "many") if status != "ok"] == ["b"]
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("many/*/T1.nii.gz")}
    assert in_threads(client, monkeypatch, *command, tmp_path / "many").exit_code == 3
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_evaluate_writes_what_one_process_writes(client, cohort, monkeypatch, tmp_path):
    """To the bit, but for the run time; baselines that see healthy subjects too."""
    few = functools.partialmethod(DetectionMetrics.compute, n_bootstrap=20)  # which takes most of the time
    monkeypatch.setattr(DetectionMetrics, "compute", few)
    command = ["evaluate", cohort, "-m", "dae", "--device", "cpu", "-o"]
    one = CliRunner().invoke(app, [*map(str, command), str(tmp_path / "one.json")])
    many = in_threads(client, monkeypatch, *command, tmp_path / "many.json")
    assert one.exit_code == many.exit_code == 0, many.output
    results = [json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8")) for name in ("one", "many")]
    times = [result.pop("run_time") for result in results]
    assert results[0] == results[1]
    assert "mean_healthy_image" in results[1]["baselines"]
    assert {**times[0], **MEASURED} == {**times[1], **MEASURED} and times[1]["seconds_per_volume"] > 0
    replicates = [(tmp_path / f"{name}.replicates.json").read_bytes() for name in ("one", "many")]
    assert replicates[0] == replicates[1]


def test_a_subject_that_cannot_be_measured_ends_an_evaluation(client, cohort, monkeypatch, tmp_path):
    """With its own error; nothing is written."""
    scan = tmp_path / "c.nii.gz"
    scan.write_bytes((cohort.parent / "c.nii.gz").read_bytes()[:1000])
    (tmp_path / "cohort.csv").write_text("subject,split,T1,lesion\nc,test,c.nii.gz,\n", encoding="utf-8")
    command = ["evaluate", tmp_path / "cohort.csv", "-m", "dae", "-o", tmp_path / "result.json", "--device", "cpu"]
    failed = in_threads(client, monkeypatch, *command)
    assert (failed.exit_code, failed.stderr.splitlines()[-1].split(":")[0]) == (3, "ImageFileError"), failed
    assert not (tmp_path / "result.json").exists()


def test_case_that_no_worker_survives_ends_an_evaluation(client, job, monkeypatch):
    """In one line; nothing is written."""
    task = SimpleNamespace(healthy_subjects=list, use_baselines=lambda healthy: None, add=print, finish=print)

    def dying(job, item, healthy):
        raise distributed.KilledWorker("a", SimpleNamespace(address="tcp://10.0.0.1:1"), 3)

    monkeypatch.setattr(cluster, "measure_in_worker", dying)
    with pytest.raises(ClusterError, match="each worker that took a certain case died"):
        evaluate_on(client, job, task, ITEMS)


def test_environment_of_this_process_stays(monkeypatch):
    """A cluster of this machine changes it for its workers."""

    class Workers:
        def __init__(self, *arguments, **options):
            monkeypatch.setitem(os.environ, "OPENBLAS_NUM_THREADS", "17")

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "3")
    monkeypatch.setattr(distributed, "LocalCluster", Workers)
    monkeypatch.setattr(distributed, "Client", Workers)
    with connected(2, None):
        assert os.environ["OPENBLAS_NUM_THREADS"] == "17"
    assert os.environ["OPENBLAS_NUM_THREADS"] == "3"


@pytest.mark.slow
def test_cases_of_a_killed_worker_are_done_by_another(phantom, save_nifti, tmp_path):
    """In the middle of a case; nothing is lost, nothing is done twice, no line is there twice."""
    items = []
    for number in range(8):
        path = thin_brain(phantom, save_nifti, tmp_path / f"{number}.nii.gz", number)
        items.append({"subject": str(number), "image": str(path)})
    out, failed, seen = tmp_path / "out", [], {}
    job = Job("dae", {"device": "$torch.device('cpu')"}, str(out), threads=1)
    with connected(2, None) as client:
        victim = next(iter(client.run(os.getpid).values()))
        run = threading.Thread(target=lambda: failed.append(detect_on(client, job, items)))
        run.start()
        deadline, is_killed = time.monotonic() + 600, False
        is_over = False
        while not is_over and time.monotonic() < deadline:
            is_over = not run.is_alive()  # then there is one more look
            for record in out.glob("[!.]*/run.json"):
                written = record.stat().st_mtime_ns
                assert seen.setdefault(record.parent.name, written) == written, f"{record} was done twice"
            if len(seen) >= 2 and not is_killed:
                os.kill(victim, signal.SIGKILL)
                is_killed = True
            time.sleep(0.02)
        run.join(1)
    assert is_killed and failed == [0]
    assert sorted(seen) == [item["subject"] for item in items]
    assert sorted(case for case, _, _ in statuses(out)) == sorted(seen)
    assert {status for _, status, _ in statuses(out)} == {"unreliable"}
    assert not list(out.glob(".*"))
