"""Detection over many cases: finished ones are skipped, a bad one stops none of the others, each has its status."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ignite.engine import Engine, Events
from monai.bundle import ConfigWorkflow
from monai.data import DataLoader, Dataset
from tqdm import tqdm

from ..detection.reliability import OK, UNRELIABLE
from ..devices import keep_freed_memory
from ..errors import OutputError
from ..files import discard_partial, replacing
from ..images.check import root_cause
from ..locks import locked
from ..outputs import case_place, check_places
from ..progress import Progress
from ..results.read import one_cell
from ..results.tables import COLUMNS, check_tables, write_tables
from .ahead import one_ahead
from .engines import DetectionEvaluator
from .inference import SaveDetections

T = TypeVar("T")
Item = Mapping[str, Any]
logger = logging.getLogger("uad")


@dataclass(frozen=True)
class CaseDone:
    """What became of a case, in plain values, which pass from one process to another.

    verdict: `reliability` and `doubts` of a case that is written. failure: the kind of error, and what is wrong.
    was_there: the case was written by an earlier run.
    """

    case: str
    seconds: float
    verdict: Mapping[str, Any]
    was_there: bool = False
    failure: tuple[str, str] | None = None


class StatusTable:
    """`status.tsv`: one line a case with what became of it.

    A line is appended in one piece when its case is done, so that a process that is killed leaves whole lines; a case
    that is done again has its older line removed when the table is opened or closed. Several processes may write to one
    table: each adds its lines to what the others have written meanwhile. A line that cannot be written, because the
    disk is full, is said on stderr, and tried again when the table is closed.

    Raises OutputError where the file is not such a table, or cannot be written when it is opened or closed.
    """

    columns = ("case", "status", "seconds", "message")

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, tuple[str, ...]] = {}
        self._unwritten: dict[str, tuple[str, ...]] = {}

    def __enter__(self) -> StatusTable:
        self._merge()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self._merge()
        except OutputError:
            if kind is None:  # else what ended the block is said
                raise

    def _merge(self) -> None:
        """Bring the file and this process to the same, newest lines, one a case."""
        try:
            with locked(self.path.parent, self.path.name):
                self.rows = read_status(self.path) | self._unwritten
                with replacing(self.path) as temporary:
                    lines = ["\t".join(row) + "\n" for row in (self.columns, *self.rows.values())]
                    temporary.write_text("".join(lines), encoding="utf-8")
        except OSError as error:
            remedy = "choose another output folder, or make room in it"
            raise OutputError(self.path.parent, f"cannot be written ({error.strerror or error})", remedy) from error
        self._unwritten = {}

    def add(self, case: str, status: str, seconds: float, message: str = "") -> None:
        """Append the line of a case."""
        row = tuple(one_cell(value) for value in (case, status, f"{seconds:.2f}", message))
        self.rows[row[0]] = row
        try:
            with locked(self.path.parent, self.path.name), self.path.open("a+b", buffering=0) as file:
                if not file.seek(0, os.SEEK_END):
                    file.write(("\t".join(self.columns) + "\n").encode())
                file.seek(-1, os.SEEK_END)
                before = b"" if file.read(1) == b"\n" else b"\n"  # a line that was cut, when the disk was full
                file.write(before + ("\t".join(row) + "\n").encode())
        except OSError as error:
            self._unwritten[row[0]] = row
            _say(f"{self.path}: the line of {row[0]} cannot be written ({error.strerror or error})")

    def add_failure(self, case: str, kind: str, message: str, seconds: float) -> None:
        """Append the line of a case that failed with this kind of error, and say it on stderr."""
        self.add(case, kind, seconds, message)
        _say(f"{kind}: {message}")

    def add_case(self, done: CaseDone) -> None:
        """Append the line of a case, unless it was there before and has one."""
        if done.failure is not None:
            self.add_failure(done.case, *done.failure, done.seconds)
        elif not (done.was_there and self.is_done(done.case)):
            self.add_verdict(done.case, done.verdict, done.seconds)

    def add_verdict(self, case: str, verdict: Mapping[str, Any], seconds: float) -> None:
        """Append the line of a case that was written, and say it on stderr where it is not reliable."""
        doubts = "; ".join(verdict.get("doubts", ()))
        logger.info("%s: %s in %.2f s %s", case, verdict.get("reliability", OK), seconds, doubts)
        self.add(case, verdict.get("reliability", OK), seconds, doubts)
        if doubts:
            _say(f"unreliable: {case}: {doubts}")

    def is_done(self, case: str) -> bool:
        """Whether the case is there and was written, in this process or in another one."""
        if not is_done(self.rows, case):
            self.rows |= read_status(self.path) | self._unwritten
        return is_done(self.rows, case)


def is_done(rows: Mapping[str, Sequence[str]], case: str) -> bool:
    """Whether the rows of a status table, by case, say that the case was written."""
    row = rows.get(one_cell(case))
    return row is not None and row[1] in (OK, UNRELIABLE)


def read_status(path: Path) -> dict[str, tuple[str, ...]]:
    """The last whole line of each case in a status table, by case; none where there is no file.

    Raises OutputError where the file is something else.
    """
    if not path.exists():
        return {}
    header, *lines = path.read_bytes().decode("utf-8", "backslashreplace").split("\n")
    if header and header != "\t".join(StatusTable.columns):
        raise OutputError(path, "is not a status table of this program", "choose another output folder")
    rows = [tuple(line.split("\t")) for line in lines]
    return {row[0]: row for row in rows if len(row) == len(StatusTable.columns)}


def _say(message: str) -> None:
    """One line on stderr, whatever is in it; a stderr that is closed stops nothing."""
    with suppress(OSError, ValueError):
        tqdm.write(one_cell(message), file=sys.stderr)


def claimed(
    folder: Path, items: Sequence[Item], make: Callable[[Item], T], ahead: bool = False
) -> Generator[T, None, None]:
    """What is made of the items of a datalist, one by one, each while no other process is at a case of its name there.

    Those that another process is at come last, when it is done with them: finished, or not if it was killed.

    ahead: the next one is made while the caller is at the present one, see `one_ahead`; not of those that come last.
    """
    waiting: list[Item] = []
    claims = _free(folder, items, make, waiting)
    with closing(one_ahead(claims, lambda claim: claim[1].close()) if ahead else claims) as each:
        for made, lock in each:
            with lock:
                yield made
    for item in waiting:
        with case_lock(folder, item):
            yield make(item)


def _free(
    folder: Path, items: Sequence[Item], make: Callable[[Item], T], waiting: list[Item]
) -> Generator[tuple[T, ExitStack], None, None]:
    """What is made of the items, each with the lock of its case; those that another process is at go to `waiting`."""
    for item in items:
        with ExitStack() as lock:
            if lock.enter_context(case_lock(folder, item, wait=False)):
                yield make(item), lock.pop_all()
            else:
                waiting.append(item)


def case_lock(folder: Path, item: Item, wait: bool = True) -> AbstractContextManager[bool]:
    """The lock of whoever is at a case; see `locked`."""
    return locked(folder, f"case {item['subject']}", wait)


VERDICT = ("reliability", "doubts")


class PreparedItem(Dataset):
    """One item of a datalist, which may be brought through the preprocessing before it is asked for.

    What goes wrong is raised when it is asked for. `seconds` is how long it took ahead.
    """

    def __init__(self, item: Item, preprocessing: Callable[..., Any]) -> None:
        super().__init__([item], preprocessing)
        self.item = item
        self.seconds = 0.0
        self._made: list[Any] = []
        self._error: Exception | None = None

    def prepare(self) -> None:
        """Do it now, and keep the outcome for the one who asks."""
        started = time.perf_counter()
        try:
            self._made.append(self[0])
        except Exception as error:
            self._error = error
        self.seconds = time.perf_counter() - started

    def _transform(self, index: int) -> Any:
        if self._error is not None:
            raise self._error
        return self._made.pop() if self._made else super()._transform(index)


class CaseRunner:
    """Takes items one by one through the evaluator of a bundle's inference workflow; the model is loaded once.

    Args:
        workflow: initialised, of `inference.json`.
    """

    def __init__(self, workflow: ConfigWorkflow) -> None:
        keep_freed_memory()
        content = workflow.parser.get_parsed_content
        self.evaluator: DetectionEvaluator = content("evaluator")
        self.preprocessing = content("preprocessing")
        self.saver: SaveDetections = content("task")
        self._error: BaseException | None = None
        self.evaluator.add_event_handler(Events.EXCEPTION_RAISED, self._keep)

    def _keep(self, engine: Engine, error: BaseException) -> None:
        if not isinstance(error, Exception):
            raise error  # Ctrl-C stops everything
        self._error = error

    def case(self, item: Item) -> PreparedItem:
        """The item, to be prepared when it is asked for."""
        return PreparedItem(item, self.preprocessing)

    def __call__(self, item: Item | PreparedItem) -> None:
        """Detect, and write the case. Raises what went wrong, with a UADError as its cause if the input is to blame."""
        self._error = None
        self.evaluator.data_loader = DataLoader(item if isinstance(item, PreparedItem) else self.case(item))
        self.evaluator.state.epoch_length = 1  # whatever the length of the workflow's own data was
        self.evaluator.run()
        self.evaluator.state.batch = self.evaluator.state.output = None  # a case fills memory
        if self._error is not None:
            raise self._error

    def ahead(self, item: Item, overwrite: bool) -> PreparedItem:
        """The item, prepared unless its case is finished. Raises nothing: what is wrong comes up when the case runs."""
        case = self.case(item)
        with suppress(Exception):
            self.evaluator.load()
            if overwrite or self.saver.finished(item) is None:
                case.prepare()
        return case


def failure_of(case: str, error: Exception) -> tuple[str, str]:
    """The kind of error that a case failed with, and what is wrong; the log gets it with its traceback."""
    cause = root_cause(error)
    logger.error("%s: %s: %s", case, type(cause).__name__, cause, exc_info=error)
    return type(cause).__name__, str(cause)


def run_case(runner: CaseRunner, item: Item | PreparedItem, overwrite: bool) -> CaseDone:
    """Detect in an item of a datalist unless it is finished already; what is wrong with it is said in the result."""
    prepared = item if isinstance(item, PreparedItem) else runner.case(item)
    item, started = prepared.item, time.perf_counter() - prepared.seconds
    case = str(item["subject"])
    try:
        record = None if overwrite else runner.saver.finished(item)
        if record is not None:
            return CaseDone(case, 0, {name: record[name] for name in VERDICT if name in record}, was_there=True)
        folder, entities = case_place(runner.saver.output_dir, item, runner.evaluator.bundle)
        discard_partial(folder.parent, entities or folder.name)
        runner(prepared)
        return CaseDone(case, time.perf_counter() - started, runner.saver.verdicts[case])
    except Exception as error:
        return CaseDone(case, time.perf_counter() - started, {}, failure=failure_of(case, error))


def status_name(part: tuple[int, int]) -> str:
    """The status table of the i-th of n parts, (i, n), of the cases."""
    return "status.tsv" if part[1] == 1 else f"status_{part[0]}-of-{part[1]}.tsv"


def check_detection(
    output_dir: Path,
    items: Sequence[Mapping[str, Any]],
    bundle: str,
    others: Sequence[str | Path],
    part: tuple[int, int] = (1, 1),
) -> None:
    """Refuse, before the model is loaded and an image is read, to write results where they do not belong.

    others: what is read beside the images. See `check_places`. Raises OutputError.
    """
    table = output_dir / status_name(part)
    several = [output_dir / name for name in COLUMNS] if len(items) > 1 else []
    check_places(output_dir, items, bundle, others, [table, *several])
    read_status(table)
    if several:
        check_tables(output_dir)


def detect_cases(
    workflow: ConfigWorkflow,
    items: Sequence[Mapping[str, Any]],
    part: tuple[int, int] = (1, 1),
    overwrite: bool = False,
    ahead: bool | None = None,
) -> int:
    """Detect in all items and return how many failed. Progress and failures go to stderr, the sum to stdout.

    Args:
        workflow: initialised, of `inference.json`.
        items: a datalist.
        part: (i, n): only the i-th of n parts of the datalist, with a status file of its own.
        overwrite: do finished cases again.
        ahead: prepare the next case, in a thread, while the network is at the present one; None: where the network is
            not on the CPU, whose cores the two would share.
    Raises OutputError where the output folder cannot be written.
    """
    runner = CaseRunner(workflow)
    output_dir, mine = runner.saver.output_dir, part_of(items, part)
    if ahead is None:
        ahead = runner.evaluator.state.device.type != "cpu"
    ahead = ahead and len(mine) > 1
    make = partial(runner.ahead, overwrite=overwrite) if ahead else runner.case
    with Progress(len(mine)) as progress, closing(claimed(output_dir, mine, make, ahead)) as cases:
        each = progress.each(cases, lambda case: str(case.item["subject"]))
        return write_outcomes((run_case(runner, case, overwrite) for case in each), output_dir, items, part)


def part_of(items: Sequence[Mapping[str, Any]], part: tuple[int, int]) -> Sequence[Mapping[str, Any]]:
    """The i-th of n parts, (i, n), of a datalist."""
    return items[part[0] - 1 :: part[1]]


def write_outcomes(
    outcomes: Iterable[CaseDone], output_dir: Path, items: Sequence[Mapping[str, Any]], part: tuple[int, int]
) -> int:
    """Write the status of each case as it comes, and at the end the tables of several cases; how many failed.

    items: the whole datalist, of which the outcomes are the part. Raises OutputError.
    """
    failed, total = 0, len(part_of(items, part))
    with StatusTable(output_dir / status_name(part)) as table:
        for done in outcomes:
            failed += done.failure is not None
            table.add_case(done)
    if len(items) > 1:
        write_tables(output_dir)
    print(f"{total - failed} of {total} cases done: {table.path}")
    return failed


def chosen_part(text: str | None) -> tuple[int, int]:
    """(i, n) of `--part i/n`, else of the array job that SLURM runs this in, else (1, 1)."""
    if text is not None:
        number, parts = text.split("/")
        return int(number), int(parts)
    if "SLURM_ARRAY_TASK_ID" not in os.environ:
        return 1, 1
    task, first, count, step = (
        int(os.environ.get(f"SLURM_ARRAY_TASK_{name}", default))
        for name, default in (("ID", 0), ("MIN", 0), ("COUNT", 1), ("STEP", 1))
    )
    return (task - first) // step + 1, count
