"""The report in Chromium, from file://, with the network off: the viewer draws, and what is moved there moves."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import contextmanager
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from common.report.html import write_report
from common.results.read import CaseFiles, read_lesions

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SOFTWARE_GL = ["--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist"]
PATIENCE_MS = 180_000  # WebGL in software, on a busy machine

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium; apt-get install chromium")
playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")


@pytest.fixture(scope="module")
def launch():
    """Start a browser with more arguments."""
    with playwright.sync_playwright() as driver:
        yield lambda arguments: driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *arguments])


@pytest.fixture(scope="module")
def browser(launch):
    browser = launch(SOFTWARE_GL)
    yield browser
    browser.close()


@contextmanager
def opened(browser, path):
    """The page of a report; it may log no error and ask for nothing but itself."""
    context = browser.new_context(offline=True, viewport={"width": 1200, "height": 900})
    context.set_default_timeout(PATIENCE_MS)
    page, requests, errors = context.new_page(), [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("dialog", lambda dialog: errors.append("a dialog"))
    page.goto(path.as_uri())
    yield page
    assert [url for url in requests if not url.startswith(("data:", "blob:"))] == [path.as_uri()]
    assert errors == []
    context.close()


@pytest.fixture(scope="module")
def case(make_case, tmp_path_factory):
    folder = make_case(tmp_path_factory.mktemp("case") / "out", "a <script>document.title='broken'<")
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def viewer_page(browser, case):
    with opened(browser, case / "report.html") as page:
        page.wait_for_selector("body[data-viewer=ready]")
        yield page


@pytest.fixture
def page(viewer_page):
    """With everything as it was at first."""
    yield viewer_page
    viewer_page.locator("#reset").click()
    viewer_page.locator("#under").select_option("scan")
    slide(viewer_page, "opacity", 0.7)


def canvas(page):
    """What the viewer shows, (H, W, 3) in 0 to 255."""
    picture = Image.open(BytesIO(page.locator("#canvas").screenshot())).convert("RGB")
    return np.asarray(picture).astype(int)


def coloured(picture):
    """Pixels of the map: much redder than blue, unlike the scan and the crosshair."""
    return int((picture[..., 0] - picture[..., 2] > 60).sum())


def slide(page, name, value):
    page.locator(f"#{name}").evaluate(
        "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input')); }", value
    )


def test_viewer_draws_scan_and_map(page):
    picture = canvas(page)
    grey = (np.ptp(picture, axis=-1) < 10) & (picture[..., 0] > 60)
    assert grey.mean() > 0.1
    assert coloured(picture) > 500


def test_sliders_change_the_picture(page, case):
    before = canvas(page)
    shown = float(page.locator("#volume").inner_text().split()[0])
    assert shown == pytest.approx(sum(row["volume_ml"] for row in read_lesions(CaseFiles("", case))), abs=0.06)
    slide(page, "opacity", 0.2)
    assert np.abs(canvas(page) - before).sum() > 0
    slide(page, "opacity", 0)
    assert coloured(canvas(page)) == 0
    slide(page, "opacity", 0.7)
    assert np.array_equal(canvas(page), before)
    slide(page, "threshold", 0.25)  # above the highest value of the map
    assert coloured(canvas(page)) == 0
    assert page.locator("#volume").inner_text() == "0.0 ml"
    page.locator("#reset").click()
    assert np.array_equal(canvas(page), before)
    assert page.locator("#threshold-value").inner_text() == "0.100"


def test_reconstruction_lies_under_the_map(page):
    """The phantom's reconstruction is flat, the phantom is not."""
    slide(page, "opacity", 0)
    scan = canvas(page)
    page.locator("#under").select_option("reconstruction")
    reconstruction = canvas(page)
    inside = scan[..., 0] > 60
    assert scan[inside].std() > 2 * reconstruction[inside].std()


def test_row_moves_the_crosshair(page, case):
    lesion = read_lesions(CaseFiles("", case))[0]
    page.locator("#canvas").click(position={"x": 100, "y": 100})
    elsewhere = page.locator("#place").inner_text()
    page.locator("tr.jump").first.click()
    place = page.locator("#place").inner_text()
    assert place != elsewhere
    sides = (("x_mm", "RL"), ("y_mm", "AP"), ("z_mm", "SI"))
    for (letter, number), (axis, letters) in zip(re.findall(r"([A-Z]) (\d+)", place), sides, strict=True):
        assert letter in letters
        assert (int(number) if letter == letters[0] else -int(number)) == pytest.approx(lesion[axis], abs=2.1)


def test_name_stays_text_and_nothing_else_runs(browser, case):
    page = browser.new_page()
    page.set_default_timeout(PATIENCE_MS)
    page.goto((case / "report.html").as_uri())
    assert page.locator("h1").inner_text() == case.name
    assert page.title() == case.name
    added = "const s = document.createElement('script'); s.textContent = 'window.ran = 1'; document.body.append(s);"
    with page.expect_console_message(lambda message: "Content Security Policy" in message.text):
        page.evaluate(f"() => {{ try {{ {added} }} catch {{}} }}")
    assert page.evaluate("window.ran === undefined")
    page.close()


def test_without_webgl_the_pictures_stay(launch, case):
    browser = launch(["--disable-3d-apis"])
    page = browser.new_page()
    page.set_default_timeout(PATIENCE_MS)
    page.goto((case / "report.html").as_uri())
    page.wait_for_selector("body[data-viewer=failed]")
    assert "WebGL 2" in page.locator("#failed").inner_text()
    assert page.locator("img.mosaic").evaluate("picture => picture.naturalWidth") > 100
    browser.close()


def test_cohort_is_sorted_by_clicks(browser, cohort_folder):
    write_report(cohort_folder)
    with opened(browser, cohort_folder / "report.html") as page:
        names = page.locator("#cases tbody tr td:first-child")
        scores = {
            path.parent.name: json.loads(path.read_text(encoding="utf-8"))["volume_score"]
            for path in cohort_folder.glob("*/run.json")
        }
        falling = sorted(scores, key=scores.get, reverse=True)
        assert names.all_inner_texts() == falling
        page.get_by_role("button", name=re.compile("^Score( [↓↑])?$")).click()
        assert names.all_inner_texts() == falling[::-1]
        page.get_by_role("button", name="Volume").click()
        assert names.all_inner_texts()[-1] == "low"
        page.get_by_role("button", name="Case").click()
        assert names.all_inner_texts()[1:] == ["high", "low"]
        page.get_by_role("link", name="high").click()
        assert page.locator("details[open] summary").inner_text().startswith("high")
        assert page.title() == "out"


def test_benchmark_opens(browser, benchmark_folder):
    write_report(benchmark_folder)
    with opened(browser, benchmark_folder / "report.html") as page:
        assert page.locator("figure svg").count() == 4
        assert page.locator("figure svg").first.bounding_box()["width"] > 200
        assert page.title() == benchmark_folder.name
