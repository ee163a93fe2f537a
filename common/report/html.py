"""The report: one HTML file that opens without a network, of a case, of many cases, or of a benchmark."""

from __future__ import annotations

import base64
import hashlib
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image, UnidentifiedImageError

from ..detection.calibration import origin_in_words, percentile_in_words
from ..detection.reliability import UNRELIABLE
from ..errors import OutputError, ResultError
from ..files import replacing
from ..outputs import GENERATOR, REPORT, check_file
from ..results.read import CaseFiles, Outcome, located_lesions, read_outcomes, read_run, records_in
from .benchmark_page import benchmark_content
from .viewer import NIIVUE_VERSION, STATIC, niivue, viewer_data

MAX_LESIONS = 200  # rows in a case's page; all are in lesions.csv
MAX_MOSAICS = 100  # in a cohort's page: those with the highest scores; the others have the small picture
MOSAIC_PIXELS, STRIP_PIXELS = 900, 420  # widths in a cohort's page


def write_report(folder: str | Path, scan: str | Path | None = None) -> Path:
    """Write `folder/report.html` and return its path; an older one is replaced.

    folder: of one case, of many (with a status.tsv, or cases below it), or of a benchmark (with a benchmark.json).
    scan: of one case, where it is no longer where `uad detect` found it.
    Raises ResultError where the folder holds no results or broken ones, OutputError where the file cannot be written,
    and UADError where the scan cannot be read.
    """
    folder = Path(folder)
    check_file(folder / REPORT, _is_report(folder / REPORT), "a report of this program")
    page = render(folder, None if scan is None else Path(scan))
    try:
        with replacing(folder / REPORT) as temporary:
            temporary.write_text(page, encoding="utf-8")
    except OSError as error:
        fact = f"cannot be written ({error.strerror or error})"
        raise OutputError(folder / REPORT, fact, "make room, or copy the folder to where you may write") from error
    return folder / REPORT


def _is_report(path: Path) -> bool:
    marker = f'<meta name="generator" content="{GENERATOR}">'
    return path.is_file() and marker.encode() in path.read_bytes()[:4096]


def render(folder: Path, scan: Path | None = None) -> str:
    """The page of a folder; which kind it is is told by its files. Raises ResultError."""
    remedy = "give the folder of a case, the output folder of uad detect, or that of uad benchmark"
    if not folder.is_dir():
        raise ResultError(folder, "no such folder", remedy)
    if not any(folder.iterdir()):
        raise ResultError(folder, "an empty folder", remedy)
    if (folder / "benchmark.json").is_file():
        return _page("benchmark.html", ["table.js"], **benchmark_content(folder))
    records, outcomes = records_in(folder), read_outcomes(folder)
    if not records and not outcomes:
        raise ResultError(folder, "no results: neither run.json nor status.tsv nor benchmark.json", remedy)
    if len(records) != 1 or any(outcome.failed for outcome in outcomes):
        if scan is not None:
            raise ResultError(folder, "many cases, of which one scan is given", "give the folder of its case")
        return _page("cohort.html", ["table.js"], **cohort_content(folder, records, outcomes))
    return _page("case.html", ["viewer.js"], with_viewer=True, **case_content(CaseFiles.of_record(records[0]), scan))


def case_content(files: CaseFiles, scan: Path | None = None) -> dict[str, Any]:
    """What the page of a case shows. Raises ResultError."""
    run = read_run(files)
    lesions = located_lesions(files)
    return {
        "title": files.name,
        "run": run,
        "threshold_origin": origin_in_words(run.get("threshold_origin") or {}),
        "percentile": percentile_in_words(run),
        "is_unreliable": run["reliability"] == UNRELIABLE,
        "lesions": lesions[:MAX_LESIONS],
        "more_lesions": len(lesions) - MAX_LESIONS,
        "is_registered": any(lesion["mni_mm"] for lesion in lesions),
        "mosaic": data_uri(_picture(files).read_bytes(), "png"),
        "viewer": viewer_data(files, run, scan),
    }


def cohort_content(folder: Path, records: list[Path], outcomes: list[Outcome]) -> dict[str, Any]:
    """What the page of many cases shows: cases by falling score, and those that failed with what was wrong."""
    cases: list[dict[str, Any]] = []
    failures = {each.case: (each.status, each.message) for each in outcomes if each.failed}
    for record in records:
        files = CaseFiles.of_record(record)
        try:
            cases.append(cohort_case(files, folder))
        except ResultError as error:  # one broken case does not hide the others
            failures[files.name] = (type(error).__name__, str(error))
    cases.sort(key=lambda case: (-case["run"]["volume_score"], case["name"]))
    for rank, case in enumerate(cases):
        case["mosaic"] = jpeg(_open_picture(case["files"]), MOSAIC_PIXELS) if rank < MAX_MOSAICS else None
    done = {case["name"] for case in cases}
    failed = [(case, *failure) for case, failure in failures.items() if case not in done]
    bundles = sorted({case["run"]["bundle"] for case in cases})
    return {"title": folder.resolve().name, "cases": cases, "failures": failed, "bundles": bundles}


def cohort_case(files: CaseFiles, folder: Path) -> dict[str, Any]:
    """What the page of a cohort says of a case; with a link to its own report, where there is one."""
    picture, run = _open_picture(files), read_run(files)
    has_report = files.entities is None and (files.folder / REPORT).is_file()
    return {
        "files": files,
        "name": files.name,
        "run": run,
        "percentile": percentile_in_words(run, short=True),
        "is_unreliable": run["reliability"] == UNRELIABLE,
        "lesions": located_lesions(files),
        "strip": jpeg(picture.crop(map_row(picture)), STRIP_PIXELS),
        "link": quote(f"{files.folder.relative_to(folder).as_posix()}/{REPORT}") if has_report else None,
    }


def _picture(files: CaseFiles) -> Path:
    path = files.path("preview.png")
    if not path.is_file():
        raise ResultError(path, "no such picture", "run uad detect on this case again")
    return path


def _open_picture(files: CaseFiles) -> Image.Image:
    path = _picture(files)
    try:
        return Image.open(path).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise ResultError(path, "not a picture", "run uad detect on this case again") from error


def map_row(picture: Image.Image) -> tuple[int, int, int, int]:
    """Where a preview has the map over the scan, as `save_preview` notes it: left, top, right, bottom."""
    numbers = [int(part) for part in str(picture.info.get("map_row", "")).split() if part.isdecimal()]
    if len(numbers) == 4:
        return numbers[0], numbers[1], numbers[2], numbers[3]
    return 0, picture.height // 2, picture.width, 3 * picture.height // 4  # of earlier versions, four equal rows


def jpeg(picture: Image.Image, width: int) -> str:
    """A small version as a data URI."""
    buffer = BytesIO()
    small = picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)
    small.save(buffer, "JPEG", quality=82, optimize=True)
    return data_uri(buffer.getvalue(), "jpeg")


def data_uri(content: bytes, kind: str) -> str:
    """A picture for `src`."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _page(template: str, scripts: list[str], with_viewer: bool = False, **content: Any) -> str:
    """Fill a template. The page's policy allows it nothing but its own pictures, styles and these very scripts."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sources = [niivue()] if with_viewer else []
    sources += [(STATIC / name).read_text(encoding="utf-8") for name in scripts]
    hashes = [base64.b64encode(hashlib.sha256(source.encode()).digest()).decode() for source in sources]
    return environment.get_template(template).render(
        **content,
        scripts=[Markup(source) for source in sources],  # noqa: S704 files of this package, nothing of a result
        script_hashes=hashes,
        niivue_version=NIIVUE_VERSION,
        generator=GENERATOR,
    )
