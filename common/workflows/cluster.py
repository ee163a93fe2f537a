"""Many cases by the workers of a Dask cluster, of processes on this machine or on others: detect, prepare, evaluate.

A worker loads the model once and takes one case after the other. The client writes what becomes of them; what a worker
that was killed had not finished is done by another one.
"""

from __future__ import annotations

import functools
import logging
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from monai.utils import optional_import
from torch import Tensor

from ..bundle import load_workflow
from ..errors import ClusterError, SettingError, UADError, settings_said_as, settings_words
from ..images.check import typed_errors
from ..metrics.baselines import HealthyBaselines
from ..outputs import INPUT_KEYS
from ..progress import Progress
from .batch import CaseDone, CaseRunner, case_lock, part_of, run_case, write_outcomes
from .evaluation import Evaluate, MeasureCases, Measured, healthy_volume
from .prepare import Preparation

P = ParamSpec("P")
R = TypeVar("R")
distributed, HAS_DISTRIBUTED = optional_import("distributed")

START_AGAIN = "start the same command again: finished cases are kept"
_one_at_a_time = threading.Lock()  # the threads of a worker share its model
_runners: dict[str, CaseRunner] = {}  # of the run that this process works for, by its key


@dataclass(frozen=True)
class Job:
    """What a worker needs to do the cases of a run as this process would.

    override: items of the bundle's configs. threads, gpus: of each worker, and of this machine to share among them;
    None to leave both to the worker. words: how errors advise settings. key: of the run. configs: names.
    """

    bundle: str
    override: Mapping[str, Any]
    output_dir: str
    overwrite: bool = False
    threads: int | None = None
    gpus: int = 0
    words: Mapping[str, str] = field(default_factory=settings_words)
    key: str = field(default_factory=lambda: secrets.token_hex(8))
    configs: Sequence[str] = ("inference.json",)

    def runner(self, worker: object) -> CaseRunner:
        """With the model loaded, in this process. Raises UADError.

        worker: its name, a number for those of this machine, by which each takes a GPU of its own.
        """
        if self.key not in _runners:
            _runners.clear()  # of an earlier run
            own_gpu = {"device": f"$torch.device('cuda:{int(str(worker)) % self.gpus}')"} if self.gpus > 1 else {}
            override = {**own_gpu, **self.override}
            workflow = load_workflow(self.bundle, [*self.configs], output_dir=self.output_dir, **override)
            workflow.initialize()
            _runners[self.key] = CaseRunner(workflow)
        return _runners[self.key]


def _task(do: Callable[P, R]) -> Callable[P, R | UADError]:
    """What a worker does, with the error of an input as its result: what caused it may not pass between processes."""

    @functools.wraps(do)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R | UADError:
        try:
            with typed_errors():
                return do(*args, **kwargs)
        except UADError as error:
            return type(error)(error.source, error.fact, error.advice, **error.settings)

    return wrapped


def _checked(result: Any) -> Any:
    """The result of a task. Raises the UADError that it is."""
    if isinstance(result, UADError):
        raise result
    return result


@_task
def detect_in_worker(job: Job, item: Mapping[str, Any]) -> CaseDone:
    """Do a case, in a worker; where another process is at it, wait, and find it finished. Raises UADError."""
    with _at_work(job.threads, job.words):
        runner = job.runner(distributed.get_worker().name)
        with case_lock(runner.saver.output_dir, item):
            return run_case(runner, item, job.overwrite)


@contextmanager
def _at_work(threads: int | None, words: Mapping[str, str]) -> Iterator[None]:
    """One thread of a worker at a time; what MONAI and ignite say of a failed case is said once, by the client."""
    with _one_at_a_time, settings_said_as(words):
        if threads is not None:
            torch.set_num_threads(threads)
        before = logging.root.manager.disable
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(before)


@contextmanager
def connected(jobs: int | None, scheduler: str | None) -> Iterator[Any]:
    """A client of as many workers on this machine, which end with the block, or of the scheduler at an address.

    Raises SettingError where both are given or Dask is not installed, ClusterError where the scheduler cannot be
    reached.
    """
    if jobs is not None and scheduler is not None:
        raise SettingError(scheduler, "of a cluster, beside processes of this machine", "choose one of them")
    if not HAS_DISTRIBUTED:
        raise SettingError("a cluster", "needs Dask distributed", 'pip install "uad-bundles[dask]"')
    if scheduler is None:
        options = {"threads_per_worker": 1, "memory_limit": 0, "dashboard_address": None}
        with (
            _environment_kept(),
            distributed.LocalCluster(n_workers=jobs, silence_logs=logging.CRITICAL, **options) as cluster,
            distributed.Client(cluster) as client,
        ):
            yield client
        return
    try:
        client = distributed.Client(scheduler)
    except (OSError, ValueError) as error:
        fact = f"no Dask scheduler answers ({type(error).__name__})"
        raise ClusterError(scheduler, fact, "start one, or give its address as it says it itself") from error
    with client:
        yield client


@contextmanager
def _environment_kept() -> Iterator[None]:
    """Dask puts what its workers shall have into the environment of this process, too, and leaves it there."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def detect_by_workers(
    bundle: str,
    override: Mapping[str, Any],
    output: Path,
    items: Sequence[Mapping[str, Any]],
    part: tuple[int, int] = (1, 1),
    overwrite: bool = False,
    jobs: int | None = None,
    scheduler: str | None = None,
) -> int:
    """Detect in all items by `jobs` processes of this machine, or by the cluster of a scheduler; how many failed.

    Each process of this machine has its share of the threads, and a GPU of its own where there are enough.
    Raises UADError, see `connected` and `detect_on`.
    """
    job = Job(bundle, override, str(output.resolve()), overwrite, threads_each(jobs), gpus_of(jobs))
    with connected(jobs, scheduler) as client:
        return detect_on(client, job, items if scheduler is None else [_absolute(item) for item in items], part)


def _absolute(item: Mapping[str, Any]) -> dict[str, Any]:
    """With paths that lead to the same files from any folder."""
    paths = {key: item[key] for key in INPUT_KEYS if key in item}
    resolved = {
        key: str(Path(value).absolute()) if isinstance(value, (str, Path)) else [str(Path(x).absolute()) for x in value]
        for key, value in paths.items()
    }
    return dict(item) | resolved


def detect_on(client: Any, job: Job, items: Sequence[Mapping[str, Any]], part: tuple[int, int] = (1, 1)) -> int:
    """`detect_cases` by the workers of a client: same files, same status, same sum; how many failed.

    Raises OutputError, UADError of a bundle that a worker cannot load, ClusterError where the scheduler is lost.
    """
    mine = part_of(items, part)
    with Progress(len(mine)) as progress:
        done = _outcomes(client, functools.partial(detect_in_worker, job), mine)
        return write_outcomes(progress.each(done, lambda case: case.case), Path(job.output_dir), items, part)


def _outcomes(client: Any, do: Callable[..., Any], items: Sequence[Mapping[str, Any]]) -> Iterator[CaseDone]:
    """Of each item, as it is done by the task `do`."""
    futures = client.map(do, items, pure=False)
    cases = {future.key: str(item["subject"]) for future, item in zip(futures, items, strict=True)}
    try:
        for future in distributed.as_completed(futures):
            try:
                yield _result(client, future)
            except distributed.KilledWorker:
                fact = "each worker that took this case died, of memory perhaps"
                yield CaseDone(cases[future.key], 0, {}, failure=("KilledWorker", f"{fact}; try it alone"))
    finally:
        if client.status == "running":
            client.cancel(futures)


def _result(client: Any, future: Any) -> Any:
    """Raises what the task raised, ClusterError where the scheduler is lost."""
    try:
        return _checked(future.result())
    except distributed.CancelledError as error:
        fact = "the scheduler was lost, or has cancelled the cases"
        raise ClusterError(client.scheduler.address, fact, START_AGAIN) from error


def prepare_by_workers(
    preparation: Preparation,
    items: Sequence[Mapping[str, Any]],
    jobs: int | None = None,
    scheduler: str | None = None,
) -> int:
    """`prepare_cohort` by `jobs` processes of this machine, or by the cluster of a scheduler; how many failed.

    Raises UADError, see `connected`, and ClusterError where the scheduler is lost.
    """
    if scheduler is not None:
        preparation = replace(preparation, output=preparation.output.absolute())
        items = [_absolute(item) for item in items]
    with connected(jobs, scheduler) as client, Progress(len(items), "subject") as progress:
        do = functools.partial(prepare_in_worker, preparation, threads_each(jobs), settings_words())
        done = _outcomes(client, do, items)
        return preparation.write(progress.each(done, lambda case: case.case), items)


@_task
def prepare_in_worker(
    preparation: Preparation, threads: int | None, words: Mapping[str, str], item: Mapping[str, Any]
) -> CaseDone:
    """Prepare a subject, in a worker; where another process is at it, wait, and find it done."""
    with _at_work(threads, words), case_lock(preparation.output, item):
        return preparation.run(item)


def evaluate_by_workers(
    bundle: str, override: Mapping[str, Any], jobs: int | None = None, scheduler: str | None = None
) -> None:
    """Measure a bundle on a labelled cohort by `jobs` processes of this machine, or by the cluster of a scheduler.

    The result is that of one process, but for the run time, which is that of a worker.

    override: items of inference.json and evaluate.json, with paths that lead to the same files from any folder.
    Raises UADError, see `connected`; one case that cannot be measured ends it.
    """
    configs, result = ("inference.json", "evaluate.json"), Path(override["result"])
    target = {"task::_target_": f"{MeasureCases.__module__}.{MeasureCases.__name__}"}
    with connected(jobs, scheduler) as client, typed_errors():
        workflow = load_workflow(bundle, [*configs], output_dir=str(result.parent), **override)
        workflow.initialize()
        evaluator, task, dataset = map(workflow.parser.get_parsed_content, ("evaluator", "task", "dataset"))
        evaluator.load()
        task.check()
        override = {**override, **target}
        job = Job(bundle, override, str(result.parent), True, threads_each(jobs), gpus_of(jobs), configs=configs)
        evaluate_on(client, job, task, dataset.data)


def evaluate_on(client: Any, job: Job, task: Evaluate, items: Sequence[Mapping[str, Any]]) -> None:
    """Measure the items of a datalist for a task by the workers of a client, and write the result.

    Raises the UADError of a case, ClusterError where the scheduler is lost, or each worker that took a case dies.
    """
    volumes = client.map(functools.partial(healthy_in_worker, job), task.healthy_subjects(), pure=False)
    healthy = client.submit(fit_in_worker, job, volumes, pure=False) if volumes else None
    futures = client.map(functools.partial(measure_in_worker, job), items, healthy=healthy, pure=False)
    try:
        task.use_baselines(_measured(client, healthy) if volumes else None)
        with Progress(len(items)) as progress:
            for _ in progress.each(items, lambda item: str(item["subject"])):
                task.add(_measured(client, futures.pop(0)))
    finally:
        if client.status == "running":
            client.cancel([*volumes, *futures])
    task.finish()


def _measured(client: Any, future: Any) -> Any:
    try:
        return _result(client, future)
    except distributed.KilledWorker as error:
        fact = "each worker that took a certain case died, of memory perhaps"
        raise ClusterError(client.scheduler.address, fact, "give each more memory, or start fewer") from error


@_task
def healthy_in_worker(job: Job, item: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """`healthy_volume` of a training subject, in a worker. Raises UADError."""
    with _at_work(job.threads, job.words):
        return healthy_volume(job.runner(distributed.get_worker().name).preprocessing(item))


@_task
def fit_in_worker(job: Job, volumes: Sequence[tuple[Tensor, Tensor]]) -> HealthyBaselines:
    """The baselines that have seen the training subjects, in a worker."""
    with _at_work(job.threads, job.words):
        return HealthyBaselines.fit(map(_checked, volumes), len(volumes))


@_task
def measure_in_worker(job: Job, item: Mapping[str, Any], healthy: HealthyBaselines | None) -> Measured:
    """Measure a case, in a worker. Raises UADError."""
    with _at_work(job.threads, job.words):
        runner = job.runner(distributed.get_worker().name)
        task: Any = runner.saver
        task.use_baselines(_checked(healthy))
        runner(item)
        return task.taken()


def gpus_of(jobs: int | None) -> int:
    """How many GPUs several workers of this machine share; of workers elsewhere, for which jobs is None, 0."""
    return torch.cuda.device_count() if jobs is not None and torch.cuda.is_available() else 0


def threads_each(jobs: int | None) -> int | None:
    """How many threads each of several workers of this machine has, so that together they have as many as one."""
    return None if jobs is None else max(1, torch.get_num_threads() // jobs)
