"""Detection over many cases: finished ones are skipped, a bad one stops none of the others, each has its status."""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from monai.bundle import ConfigWorkflow
from monai.data import DataLoader, Dataset
from tqdm import tqdm

from .engines import DetectionEvaluator
from .errors import OutputError
from .files import replacing
from .handlers.inference import SaveDetections
from .transforms.check import root_cause

OK = "ok"


class StatusTable:
    """`status.tsv`: one line a case with what became of it.

    A line is appended in one piece when its case is done, so that a process that is killed leaves whole lines; a case
    that is done again has its older line removed when the table is opened or closed.

    Raises OutputError where the file cannot be written.
    """

    columns = ("case", "status", "seconds", "message")

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, tuple[str, ...]] = {}

    def __enter__(self) -> StatusTable:
        try:
            if self.path.is_file():
                with self.path.open(newline="", encoding="utf-8") as file:
                    self.rows = {row[0]: tuple(row) for row in list(csv.reader(file, delimiter="\t"))[1:] if row}
            self._rewrite()
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            remedy = "choose another output folder, or make room in it"
            raise OutputError(self.path.parent, f"cannot be written ({error})", remedy) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._rewrite()

    def _rewrite(self) -> None:
        with replacing(self.path) as temporary:
            lines = ["\t".join(row) + "\n" for row in (self.columns, *self.rows.values())]
            temporary.write_text("".join(lines), encoding="utf-8")

    def add(self, case: str, status: str, seconds: float, message: str = "") -> None:
        """Append the line of a case."""
        row = tuple(" ".join(value.split()) for value in (case, status, f"{seconds:.2f}", message))
        with self.path.open("ab", buffering=0) as file:
            file.write(("\t".join(row) + "\n").encode())
        self.rows[case] = row

    def add_error(self, case: str, error: Exception, seconds: float) -> None:
        """Append the line of a case that failed, and say it on stderr."""
        cause = root_cause(error)
        self.add(case, type(cause).__name__, seconds, str(cause))
        tqdm.write(f"{type(cause).__name__}: {self.rows[case][-1]}", file=sys.stderr)

    def is_ok(self, case: str) -> bool:
        """Whether the case is there and went well."""
        return case in self.rows and self.rows[case][1] == OK


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
    number, parts = part
    name = "status.tsv" if parts == 1 else f"status_{number}-of-{parts}.tsv"
    mine = items[number - 1 :: parts]
    with StatusTable(runner.saver.output_dir / name) as table:
        for item in tqdm(mine, unit="case", disable=None):
            case, started = str(item["subject"]), time.perf_counter()
            try:
                if overwrite or not runner.saver.is_finished(item):
                    runner(item)
                    table.add(case, OK, time.perf_counter() - started)
                elif not table.is_ok(case):
                    table.add(case, OK, 0, "was finished before")
            except Exception as error:
                failed += 1
                table.add_error(case, error, time.perf_counter() - started)
    print(f"{len(mine) - failed} of {len(mine)} cases done: {table.path}")
    return failed
