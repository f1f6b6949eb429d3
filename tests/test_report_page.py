"""The report page: its figures, that it is one file without what identifies, its viewers, and how it looks and works in a browser."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from evaluated_runs import ALL_PATTERNS, SEQUENCES, SUBSETS, begin, flat, write_cohort, write_run, write_translation
from headless import chrome
from PIL import Image
from trained_run import make_run

from mstkd import attempts
from mstkd.errors import UserError
from mstkd.evaluate.classification import CONVENTIONS, Decision, summarise_decisions, write_decisions
from mstkd.evaluate.run import evaluate_run
from mstkd.files import write_json
from mstkd.report.charts import Series, box_chart, line_chart
from mstkd.report.figures import MOST_POINTS, thinned
from mstkd.report.page import write_page
from mstkd.report.viewer import COLUMNS, sprite
from mstkd.track.jsonl import JsonlTracker
from mstkd.trained_run import open_run

HOST, SCRATCH = "node17.hospital.example", "/scratch/of-somebody"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A real run on ten phantoms, evaluated; it has logged figures, and an attempt that ended badly on a host with a name."""
    folder = make_run(tmp_path_factory.mktemp("page"))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["data"]["cache_dir"] = SCRATCH
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    attempts.end(folder, 1, attempts.Ending("failed", f"rank 1 on {HOST} is gone; see {SCRATCH}/core", "distill", 40))
    attempts.begin(folder, world_size=2, job="4711")
    tracker = JsonlTracker(folder / "metrics.jsonl", attempt=1)
    for step in range(1, 101):
        tracker.log_metrics({"train/loss_both": 1000 / step**2, "val/score": step / 100, "time/samples_per_s": 2.5, "startup/total_s": 1.0}, step, "distill")
    evaluate_run(folder)
    return folder


@pytest.fixture(scope="module")
def page(run):
    return write_page([run])


@pytest.fixture(scope="module")
def html(page):
    return page.read_text()


class Tables(HTMLParser):
    """The cells of every table of a page, row by row, hidden words included."""

    def __init__(self, html: str):
        super().__init__()
        self.tables, self._row, self._cell, self._muted = [], None, None, 0
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self._row = []
        if tag in ("td", "th"):
            self._cell = ""
        if tag == "span" and self._cell is not None:
            self._muted += dict(attrs).get("aria-hidden") == "true" or self._muted > 0

    def handle_endtag(self, tag):
        if tag == "span" and self._muted:
            self._muted -= 1
        if tag in ("td", "th") and self._cell is not None:
            self._row.append(self._cell.strip())
            self._cell = None
        if tag == "tr":
            self.tables[-1].append(self._row)

    def handle_data(self, data):
        if self._cell is not None and not self._muted:
            self._cell += data


def cases(html: str) -> dict:
    return json.loads(re.search(r'id="cases-data">(.*?)</script>', html, re.DOTALL)[1])


def labels(packed: str, case: dict):
    return np.frombuffer(zlib.decompress(base64.b64decode(packed)), np.uint8).reshape(case["slices"], case["height"], case["width"])


def test_the_page_is_one_file_without_what_identifies(run, html):
    index = json.loads((run.parents[1] / "shards" / "index.json").read_text())
    entries = [entry for shard in index["shards"] for entry in shard["subjects"]]
    for word in {HOST, SCRATCH, "4711", str(run.parents[1]), *(entry[key] for entry in entries for key in ("subject", "patient"))}:
        assert word not in html
    assert not re.search(r"(?i)(?:https?|file|ftp):|<link|@import|url\(", html)
    assert all(source.startswith(("data:", "#")) for source in re.findall(r'(?:src|href)="([^"]*)"', html))
    assert "default-src 'none'" in html and len(html) < 2e6


def test_heat_maps_hold_the_figures_of_the_summary(run, html):
    student, teacher = (json.loads((run / "evaluation" / name).read_text()) for name in ("summary.json", "summary_teacher.json"))
    maps = [table for table in Tables(html).tables if table[-1][0] == "mean"]
    assert len(maps) == 6  # Dice and HD95, each over all cases, over those that have the region, and by lesion
    keys = ("dice", "hd95_mm", "dice_nonempty", "hd95_nonempty_mm", "lesion_dice", "lesion_hd95_mm")
    for table, key, factor in zip(maps, keys, (100, 1) * 3, strict=True):
        assert table[0] == ["given sequences", "WT", "TC", "ET"] and table[1] == ["student", "teacher"] * 3
        rows = {**{name.replace("+", ", "): name for name in student["subsets"]}, "mean": "mean"}
        assert [row[0] for row in table[2:]] == list(rows)
        for name, *texts in table[2:]:
            cells = [summary["mean"] if name == "mean" else summary["subsets"][rows[name]] for summary in (student, teacher)]
            figures = [cell[region][key] for region in ("WT", "TC", "ET") for cell in cells]
            assert texts == ["" if figure is None else f"{factor * figure:.1f}" for figure in figures]


def test_it_is_told_how_long_a_case_took(run, html):
    seconds = json.loads((run / "evaluation" / "cost.json").read_text())["student"]["seconds_per_case"]
    (row,) = [row for table in Tables(html).tables for row in table if row[0] == "one case"]
    assert row[1] == f"{seconds:.3g} s (CPU)"


def test_viewers_hold_what_the_run_predicts_and_what_was_scored(run, html):
    found, trained = cases(html), open_run(run)
    subjects = trained.source.subjects("test")
    rows = [line.split(",") for line in (run / "evaluation" / "per_case.csv").read_text().splitlines() if line.startswith("student")]
    mean = {subject: np.mean([float(row[4]) for row in rows if row[1] == subject]) for subject in subjects}
    best = max(subjects, key=mean.get)
    case, sample = found["cases"][0], trained.source.subject(best)
    assert [case["rank"] for case in found["cases"]] == ["best", "worst"]  # of two there is no other
    assert case["mean_dice"] == pytest.approx(mean[best], abs=1e-4)
    truth = labels(case["truth"], case)
    assert np.array_equal(truth[7, 0], sample.label[::-1, -1, 7])  # top row: the most anterior voxels, from the patient's right
    assert found["subsets"][0] == {"name": "flair+t1+t1ce+t2", "given": [True] * 4}
    for subset in found["subsets"]:
        predicted = labels(case["predictions"]["toy"][subset["name"]], case)
        either = (truth > 0).sum() + (predicted > 0).sum()
        dice = 2 * ((truth > 0) & (predicted > 0)).sum() / either if either else 1.0
        assert case["dice"]["toy"][subset["name"]]["WT"] == pytest.approx(dice, abs=1e-4)


def test_a_sprite_holds_every_slice_where_the_viewer_looks_for_it():
    volume = np.zeros((20, 13, 23), np.float32)
    volume[2:18, 2:11] = np.random.default_rng(0).uniform(1, 5, (16, 9, 23)).cumsum(0)
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(sprite(volume).partition(",")[2]))), float)
    assert sheet.shape == (3 * 16, COLUMNS * 24)  # tiles of whole JPEG blocks
    for k in (0, 9, 10, 22):
        top, left = k // COLUMNS * 16, k % COLUMNS * 24
        shown = sheet[top : top + 13, left : left + 20]
        assert np.corrcoef(shown.ravel(), volume[::-1, ::-1, k].T.ravel())[0, 1] > 0.97


def test_a_large_case_is_thinned_so_that_pages_stay_small():
    large = np.zeros((300, 260, 170), np.float32)
    large[::7] = 1
    sheet = Image.open(io.BytesIO(base64.b64decode(sprite(large).partition(",")[2])))
    assert sheet.size == (COLUMNS * 152, 6 * 136)  # every third slice, every second pixel


def test_without_its_shards_or_weights_a_run_still_has_a_page(run, tmp_path):
    copy = tmp_path / "runs" / "toy"
    shutil.copytree(run, copy)
    config = yaml.safe_load((copy / "config.yaml").read_text())
    config["data"]["shards"][0]["path"] = str(tmp_path / "moved")
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    html = write_page([copy]).read_text()
    assert "No case can be shown" in html and "cannot be read where the run found it" in html and str(tmp_path) not in html
    assert "cases-data" not in html and len(Tables(html).tables) > 6


def test_several_runs_stand_side_by_side(tmp_path):
    shards = write_cohort(tmp_path / "shards", {f"scan{n}": f"P{n}" for n in range(8)})
    runs = [write_run(shards, name, flat(level), seed=seed) for seed, (name, level) in enumerate({"one": 0.5, "other": 0.6}.items())]
    path = write_page(runs)
    html = path.read_text()
    assert path == tmp_path / "runs" / "report-one-and-other.html"
    dice = next(table for table in Tables(html).tables if table[-1][0] == "mean")
    assert dice[1] == ["one", "other"] * 3 and dice[-1] == ["mean", *["53.5", "63.5"] * 3]
    settings = next(table for table in Tables(html).tables if table[0] == ["key", "one", "other"])
    assert ["seed", "0", "1"] in settings and not any("path" in row[0] or "runs_dir" in row[0] for row in settings)
    assert "scan0" not in html and "mstkd compare" in html


def test_a_synthesis_run_has_a_map_per_measure_by_target(tmp_path):
    shards = write_cohort(tmp_path / "shards", {f"scan{n}": f"P{n}" for n in range(4)})
    measured = {"lpips": True, "texture": True}
    made = write_translation(shards, "translation", lambda subject, pattern: 20 + int(subject[-1]) + pattern.count("+"), patterns=ALL_PATTERNS, **measured)
    tables = [table for table in Tables(write_page([made]).read_text()).tables if table[-1][0] == "mean"]
    assert len(tables) == 9 and tables[0][0] == ["given sequences", "t1", "t1ce", "t2", "flair"]
    assert tables[0][1] == ["flair", "21.50", "21.50", "21.50", ""] and tables[1][1] == ["flair", "0.5375", "0.5375", "0.5375", ""]
    z_gradient, spectrum = tables[4:6]
    assert z_gradient[1] == ["flair", *3 * ["0.5700"], ""] and spectrum[1] == ["flair", *3 * ["18.50"], ""]


def test_a_classification_run_has_accuracy_by_class(tmp_path):
    shards = write_cohort(tmp_path / "shards", {f"scan{n}": f"P{n}" for n in range(4)})
    config = begin(shards, "classes", 0, {"name": "shaspec"}, {"crop": (8, 8, 8)}, {})
    decisions = [
        Decision("student", f"scan{n}", subset, n % 2, n % 2 if n else 1, (0.7, 0.3) if n % 2 == 0 else (0.2, 0.8)) for subset in SUBSETS for n in range(4)
    ]
    write_decisions(config.run_dir / "evaluation" / "per_case.csv", decisions, ("healthy", "ill"))
    summary = summarise_decisions(decisions, SEQUENCES, ("healthy", "ill"), "shaspec", "test", 0, CONVENTIONS)
    write_json(config.run_dir / "evaluation" / "summary.json", summary)
    html = write_page([config.run_dir]).read_text()
    accuracy = next(table for table in Tables(html).tables if table[-1][0] == "mean")
    assert accuracy[0][1:] == ["all", "healthy", "ill"] and accuracy[-1] == ["mean", "75.0", "50.0", "100.0"]
    assert "Probability of the true class" in html and "Missing sequences" in html


def test_what_cannot_be_reported_is_said_in_one_line(tmp_path, run):
    shards = write_cohort(tmp_path / "shards", {f"scan{n}": f"P{n}" for n in range(4)})
    waiting = begin(shards, "waiting", 0, {"name": "kd"}, {"crop": (8, 8, 8)}, {}).run_dir
    one, made = write_run(shards, "one", flat(0.5)), write_translation(shards, "made", lambda subject, pattern: 20.0)
    for folders, words in {
        (tmp_path / "nowhere",): "nowhere is not a run folder",
        (waiting,): f"not evaluated on its test split yet; run `mstkd evaluate {waiting}` first",
        (one, made): "made is a run of synthesis and .*one of segmentation; report them one by one",
        (one, one): "given twice",
    }.items():
        with pytest.raises(UserError, match=words):
            write_page(folders)
    said = subprocess.run([Path(sys.executable).parent / "mstkd", "report", str(waiting)], capture_output=True, text=True)
    assert said.returncode == 2 and said.stdout == "" and said.stderr.count("\n") == 1 and f"run `mstkd evaluate {waiting}` first" in said.stderr


def test_lines_and_boxes_lie_where_their_figures_are():
    chart = line_chart("loss", "", "", "step", [Series(0, "run", [(0, 1.0), (50, 10.0), (100, 1000.0)])])
    assert chart.note == "log scale"  # 1 to 1000
    (x0, y0), (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in chart.lines[0].points.split())
    assert (x0, x2) == (chart.left, chart.right) and x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert (y0, y2) == (chart.bottom, chart.top) and y1 == pytest.approx(y0 + (y2 - y0) / 3, abs=0.1)
    found = box_chart("WT", "Dice %", {"t1": [10, 20, 30, 40, 100]}, (0, 100), 0)
    (box,), width = found.boxes, found.right - found.left
    at = [(x - found.left) / width * 100 for x in (box.low, box.first, box.median, box.third, box.high, *box.outside)]
    assert at == pytest.approx([10, 20, 30, 40, 40, 100], abs=0.05)
    long = thinned([(step, float(step % 2)) for step in range(10 * MOST_POINTS)])
    assert len(long) == MOST_POINTS and all(value == 0.5 for _, value in long)


@pytest.mark.browser
def test_the_page_works_and_looks_right_in_a_browser(page, tmp_path):
    browser = chrome(tmp_path / "profile")
    try:
        browser.get(page.as_uri())
        _drive_the_viewer(browser)
        _change_the_theme(browser, Path(os.environ.get("MSTKD_SCREENSHOTS", tmp_path)))
        metrics = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        assert browser.execute_script("return [innerWidth, document.documentElement.scrollWidth]") == [390, 390]
        assert browser.get_log("browser") == []
    finally:
        browser.quit()


def _drive_the_viewer(browser):
    from selenium.webdriver import ActionChains, Keys
    from selenium.webdriver.common.actions.wheel_input import ScrollOrigin
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    def drawn() -> tuple[str, str]:
        viewer = browser.find_element(By.CSS_SELECTOR, ".viewer")
        return viewer.find_element(By.TAG_NAME, "output").text, browser.execute_script("return document.querySelector('.viewer canvas').toDataURL()")

    def moved(before, by) -> tuple[str, str]:
        by()
        after = drawn()
        assert after[0] != before[0] and after[1] != before[1], "the slice and what is drawn of it"
        return after

    WebDriverWait(browser, 60).until(lambda _: drawn()[0])
    slices, slider = (browser.find_element(By.CSS_SELECTOR, f".viewer {part}") for part in (".slices", "input[type=range]"))
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", slices)
    outlined = drawn()
    slices.send_keys("p", "t")
    bare = drawn()
    assert bare[0] == outlined[0] and bare[1] != outlined[1], "the same slice without outlines"
    now = moved(drawn(), lambda: slider.send_keys(Keys.ARROW_RIGHT))
    now = moved(now, lambda: ActionChains(browser).click_and_hold(slices).move_by_offset(0, 24).release().perform())
    now = moved(now, lambda: slices.send_keys(Keys.PAGE_UP))
    now = moved(now, lambda: ActionChains(browser).scroll_from_origin(ScrollOrigin.from_element(slices), 0, 100).perform())
    moved(now, lambda: slider.send_keys(Keys.HOME))
    assert drawn()[0].startswith("slice 1 of ")
    browser.find_element(By.CSS_SELECTOR, ".viewer .subset").send_keys(Keys.END)
    WebDriverWait(browser, 30).until(lambda _: browser.find_elements(By.CSS_SELECTOR, ".viewer .unknown"))


def _change_the_theme(browser, screenshots: Path):
    from selenium.webdriver.common.by import By

    def looked() -> np.ndarray:
        browser.execute_script("scrollTo({top: 0, behavior: 'instant'})")
        return np.asarray(Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("L"), float)

    shown = {}
    for theme in ("light", "dark"):
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": theme}]})
        shown[theme] = looked()
        browser.save_screenshot(str(screenshots / f"report_{theme}.png"))
        assert min(shown[theme].shape) > 600 and shown[theme].std() > 10  # there is text and colour on it
    assert np.median(shown["light"]) > 230 and np.median(shown["dark"]) < 40
    browser.find_element(By.ID, "theme").click()
    assert np.median(looked()) > 230
