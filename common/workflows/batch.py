"""Detection over many cases: finished ones are skipped, a bad one stops none of the others, each has its status."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from monai.bundle import ConfigWorkflow
from monai.data import DataLoader, Dataset
from tqdm import tqdm

from ..detection.reliability import OK, UNRELIABLE
from ..errors import OutputError
from ..files import discard_partial, replacing
from ..images.check import root_cause
from ..locks import locked
from ..outputs import case_place, check_places
from ..progress import Progress
from .engines import DetectionEvaluator
from .inference import SaveDetections

logger = logging.getLogger("uad")


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
        row = tuple(_cell(value) for value in (case, status, f"{seconds:.2f}", message))
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

    def add_error(self, case: str, error: Exception, seconds: float) -> None:
        """Append the line of a case that failed, and say it on stderr."""
        cause = root_cause(error)
        self.add(case, type(cause).__name__, seconds, str(cause))
        logger.error("%s: %s: %s", case, type(cause).__name__, cause, exc_info=error)
        _say(f"{type(cause).__name__}: {cause}")

    def add_verdict(self, case: str, verdict: Mapping[str, Any], seconds: float) -> None:
        """Append the line of a case that was written, and say it on stderr where it is not reliable."""
        doubts = "; ".join(verdict.get("doubts", ()))
        logger.info("%s: %s in %.2f s %s", case, verdict.get("reliability", OK), seconds, doubts)
        self.add(case, verdict.get("reliability", OK), seconds, doubts)
        if doubts:
            _say(f"unreliable: {case}: {doubts}")

    def is_done(self, case: str) -> bool:
        """Whether the case is there and was written, in this process or in another one."""
        case = _cell(case)
        if case not in self.rows or self.rows[case][1] not in (OK, UNRELIABLE):
            self.rows |= read_status(self.path) | self._unwritten
        return case in self.rows and self.rows[case][1] in (OK, UNRELIABLE)


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


def _cell(text: str) -> str:
    """Text in one line, of characters that UTF-8 has: those of a name that is not UTF-8 are written as escapes."""
    return " ".join(text.encode("utf-8", "backslashreplace").decode().split())


def _say(message: str) -> None:
    """One line on stderr, whatever is in it; a stderr that is closed stops nothing."""
    with suppress(OSError, ValueError):
        tqdm.write(_cell(message), file=sys.stderr)


def claimed(folder: Path, items: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The items of a datalist one by one, each while no other process is at a case of its name in this folder.

    Those that another process is at come last, when it is done with them: finished, or not if it was killed.
    """
    waiting = []
    for item in items:
        with locked(folder, f"case {item['subject']}", wait=False) as free:
            if free:
                yield item
            else:
                waiting.append(item)
    for item in waiting:
        with locked(folder, f"case {item['subject']}"):
            yield item


class CaseRunner:
    """Takes items one by one through the evaluator of a bundle's inference workflow; the model is loaded once.

    Args:
        workflow: initialised, of `inference.json`.
    """

    def __init__(self, workflow: ConfigWorkflow) -> None:
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

    def __call__(self, item: Mapping[str, Any]) -> None:
        """Detect, and write the case. Raises what went wrong, with a UADError as its cause if the input is to blame."""
        self._error = None
        self.evaluator.data_loader = DataLoader(Dataset([item], self.preprocessing))
        self.evaluator.run()
        if self._error is not None:
            raise self._error


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
    check_places(output_dir, items, bundle, others, [table])
    read_status(table)


def detect_cases(
    workflow: ConfigWorkflow,
    items: Sequence[Mapping[str, Any]],
    part: tuple[int, int] = (1, 1),
    overwrite: bool = False,
) -> int:
    """Detect in all items and return how many failed. Progress and failures go to stderr, the sum to stdout.

    Args:
        workflow: initialised, of `inference.json`.
        items: a datalist.
        part: (i, n): only the i-th of n parts of the datalist, with a status file of its own.
        overwrite: do finished cases again.
    Raises OutputError where the output folder cannot be written.
    """
    runner, failed = CaseRunner(workflow), 0
    output_dir, mine = runner.saver.output_dir, items[part[0] - 1 :: part[1]]
    with StatusTable(output_dir / status_name(part)) as table, Progress(len(mine)) as progress:
        for item in progress.each(claimed(output_dir, mine), lambda item: str(item["subject"])):
            case, started = str(item["subject"]), time.perf_counter()
            try:
                record = None if overwrite else runner.saver.finished(item)
                if record is None:
                    folder, entities = case_place(output_dir, item, runner.evaluator.bundle)
                    discard_partial(folder.parent, entities or folder.name)
                    runner(item)
                    table.add_verdict(case, runner.saver.verdicts[case], time.perf_counter() - started)
                elif not table.is_done(case):
                    table.add_verdict(case, record, 0)
            except Exception as error:
                failed += 1
                table.add_error(case, error, time.perf_counter() - started)
    print(f"{len(mine) - failed} of {len(mine)} cases done: {table.path}")
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
