"""Detection over many cases by the workers of a Dask cluster: of processes on this machine, or on others.

A worker loads the model once and takes one case after the other. The client writes the status of each as it comes; what
a worker that was killed had not finished is done by another one.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from monai.utils import optional_import

from ..bundle import load_workflow
from ..errors import ClusterError, SettingError, settings_said_as, settings_words
from ..images.check import typed_errors
from ..outputs import INPUT_KEYS
from ..progress import Progress
from .batch import CaseDone, CaseRunner, case_lock, part_of, run_case, write_outcomes

distributed, HAS_DISTRIBUTED = optional_import("distributed")

START_AGAIN = "start the same command again: finished cases are kept"
_one_at_a_time = threading.Lock()  # the threads of a worker share its model
_runners: dict[str, CaseRunner] = {}  # of the run that this process works for, by its key


@dataclass(frozen=True)
class Job:
    """What a worker needs to do the cases of a run as this process would.

    override: items of the bundle's inference.json. threads, gpus: of each worker, and of this machine to share among
    them; None to leave both to the worker. words: how errors advise settings. key: of the run.
    """

    bundle: str
    override: Mapping[str, Any]
    output_dir: str
    overwrite: bool = False
    threads: int | None = None
    gpus: int = 0
    words: Mapping[str, str] = field(default_factory=settings_words)
    key: str = field(default_factory=lambda: secrets.token_hex(8))

    def runner(self, worker: object) -> CaseRunner:
        """With the model loaded, in this process. Raises UADError.

        worker: its name, a number for those of this machine, by which each takes a GPU of its own.
        """
        if self.key not in _runners:
            _runners.clear()  # of an earlier run
            own_gpu = {"device": f"$torch.device('cuda:{int(str(worker)) % self.gpus}')"} if self.gpus > 1 else {}
            if self.threads is not None:
                torch.set_num_threads(self.threads)
            with typed_errors():
                override = {**own_gpu, **self.override}
                workflow = load_workflow(self.bundle, ["inference.json"], output_dir=self.output_dir, **override)
                workflow.initialize()
                _runners[self.key] = CaseRunner(workflow)
        return _runners[self.key]


def detect_in_worker(job: Job, item: Mapping[str, Any]) -> CaseDone:
    """Do a case, in a worker; where another process is at it, wait, and find it finished. Raises UADError."""
    with _one_at_a_time, settings_said_as(job.words), _quiet():
        runner = job.runner(distributed.get_worker().name)
        with case_lock(runner.saver.output_dir, item):
            return run_case(runner, item, job.overwrite)


@contextmanager
def _quiet() -> Iterator[None]:
    """What MONAI and ignite say of a failed case is said once, by the client."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def connected(jobs: int | None, scheduler: str | None) -> Iterator[Any]:
    """A client of as many workers on this machine, which end with the block, or of the scheduler at an address.

    Raises SettingError where Dask is not installed, ClusterError where the scheduler cannot be reached.
    """
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
    if jobs is not None and scheduler is not None:
        raise SettingError(scheduler, "of a cluster, beside processes of this machine", "choose one of them")
    threads, gpus = (None, 0) if jobs is None else (threads_each(jobs), gpus_here())
    job = Job(bundle, override, str(output.resolve()), overwrite, threads, gpus)
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
        outcomes = progress.each(_outcomes(client, job, mine), lambda done: done.case)
        return write_outcomes(outcomes, Path(job.output_dir), items, part)


def _outcomes(client: Any, job: Job, items: Sequence[Mapping[str, Any]]) -> Iterator[CaseDone]:
    """Of each item, as it is done."""
    address = client.scheduler.address
    keys = [f"case-{job.key}-{number}" for number in range(len(items))]
    futures = client.map(partial(detect_in_worker, job), items, key=keys, pure=False)
    cases = {future.key: str(item["subject"]) for future, item in zip(futures, items, strict=True)}
    try:
        for future in distributed.as_completed(futures):
            try:
                yield future.result()
            except distributed.KilledWorker:
                fact = "each worker that took this case died, of memory perhaps"
                yield CaseDone(cases[future.key], 0, {}, failure=("KilledWorker", f"{fact}; try it alone"))
            except distributed.CancelledError as error:
                fact = "the scheduler was lost, or has cancelled the cases"
                raise ClusterError(address, fact, START_AGAIN) from error
    finally:
        if client.status == "running":
            client.cancel(futures)


def gpus_here() -> int:
    """How many GPUs this machine has."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def threads_each(jobs: int) -> int:
    """How many threads each of several workers of this machine has, so that together they have as many as one."""
    return max(1, torch.get_num_threads() // jobs)
