"""report.html and the MLflow UI as a person meets them, in a real browser."""

import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from mlflow import MlflowClient
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException, WebDriverException
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from lowrank_tune.past_study import open_study, visualize
from tests.e2e.conftest import Ran

# Every failure of a script or of a request counts; these two are MLflow's own, on a server without accounts.
MLFLOWS_OWN = ("users/current", "ResizeObserver loop")
CHARTS = ("learning-direct", "learning-sketch", "coordinates", "timeline", "pareto-search", "pareto-storage",
          "rates", "compression-0", "spectrum", "left")  # fmt: skip


_FLAGS = (
    "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
    "disable-component-update", "disable-sync", "disable-dev-shm-usage", "hide-scrollbars",
)  # fmt: skip


def resize(window: Chrome, width: int) -> None:
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    window.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)


def wait(window: Chrome, condition: Callable[[Chrome], Any], what: str) -> Any:
    return WebDriverWait(window, 60, 0.2).until(condition, f"{what} did not appear in {window.current_url}")


def shows(window: Chrome, *texts: str) -> None:
    """Wait until every text stands on the page."""

    def all_there(page: Chrome) -> bool:
        body = page.find_element(By.TAG_NAME, "body").text
        return all(text in body for text in texts)

    wait(window, all_there, f"one of {texts}")


def complaints(window: Chrome, levels: tuple[str, ...] = ("SEVERE", "WARNING")) -> list[str]:
    """What the console has said since the last call."""
    messages = [entry["message"] for entry in window.get_log("browser") if entry["level"] in levels]
    return [message for message in messages if not any(own in message for own in MLFLOWS_OWN)]


def failures(window: Chrome) -> list[str]:
    # MLflow's own grid warns of its own deprecated options: only failures count here.
    return complaints(window, ("SEVERE",))


@pytest.fixture(scope="module")
def window() -> Iterator[Chrome]:
    """A headless Chromium, with its console's log."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not browser or not driver:
        lacking = "chromium" if not browser else "chromedriver"
        pytest.skip(f"no {lacking} on the PATH: on Debian, apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*_FLAGS, f"user-data-dir={profile}"):
            options.add_argument(f"--{flag}")
        try:
            opened = webdriver.Chrome(options, webdriver.ChromeService(driver))
        except WebDriverException as error:
            pytest.skip(f"Chromium does not start here: {str(error).splitlines()[0]}")
        try:
            yield opened
        finally:
            opened.quit()


@pytest.fixture(scope="module")
def report(window: Chrome, ran: Ran) -> Chrome:
    # A headless window may have no focus, and then tells no page of it.
    window.execute_cdp_cmd("Emulation.setFocusEmulationEnabled", {"enabled": True})
    window.get((ran.result.directory / "report.html").as_uri())
    return window


def drawn(page: Chrome, name: str) -> bool:
    (place,) = page.find_elements(By.ID, f"chart-{name}")
    page.execute_script("arguments[0].scrollIntoView()", place)
    return bool(place.find_elements(By.CSS_SELECTOR, "svg.main-svg .trace, svg.main-svg .scatterlayer .trace"))


def test_the_report_draws_every_chart_without_a_complaint(report: Chrome) -> None:
    resize(report, 1280)
    # What is folded is drawn when it is opened.
    report.execute_script("document.getElementById('factors').open = true")
    for name in CHARTS:
        wait(report, lambda page, name=name: drawn(page, name), f"the chart {name}")  # type: ignore[misc]
    report.execute_script("document.querySelector('.places').scrollIntoView()")
    wait(report, lambda page: len(page.find_elements(By.CSS_SELECTOR, "[data-panel] svg.main-svg")) >= 8, "the maps")
    images = report.execute_script("return [...document.images].filter((i) => i.src && !i.naturalWidth).length")
    assert images == 0
    assert complaints(report) == []


@pytest.mark.parametrize("width", [1280, 400])
def test_the_report_never_scrolls_sideways(report: Chrome, width: int) -> None:
    resize(report, width)
    report.execute_script("window.scrollTo(0, document.body.scrollHeight)")
    fits = "return innerWidth === arguments[0] && document.documentElement.scrollWidth <= innerWidth"
    # The charts follow the window a moment later.
    wait(report, lambda page: page.execute_script(fits, width), "a page that fits its window")
    assert complaints(report) == []


def test_the_choosers_show_another_image_rank_and_channel(report: Chrome) -> None:
    resize(report, 1280)
    places = report.find_element(By.ID, "places-view")
    report.execute_script("arguments[0].scrollIntoView()", places)
    told = places.find_element(By.CSS_SELECTOR, "[data-told]")
    wait(report, lambda page: told.text, "the sentence below the choosers")
    for name, word in (("image", "test image 5"), ("rank", "rank 2"), ("channel", "channel 2")):
        Select(places.find_element(By.CSS_SELECTOR, f"[data-choose={name}]")).select_by_visible_text(word)
    assert told.text.startswith("Test image 5 at rank 2. svd: token cosine 0.")
    wait(report, lambda page: "channel 2: original" in places.text, "the channel's map")
    label = places.find_element(By.CSS_SELECTOR, "[data-panel=map-1]").get_attribute("aria-label")
    assert "4 by 4 tokens" in (label or "")
    assert complaints(report) == []


def test_a_keyboard_reaches_links_choosers_and_tables(report: Chrome, ran: Ran) -> None:
    resize(report, 1280)
    report.execute_script("document.activeElement.blur(); window.scrollTo(0, 0)")
    reached: set[tuple[str, str]] = set()
    table = f"Rank x method: {ran.result.comparison.data}"
    wanted = {("select", name) for name in ("image", "rank", "channel")} | {("div", table), ("a", "")}
    for _ in range(250):
        if wanted <= reached:
            break
        report.switch_to.active_element.send_keys(Keys.TAB)
        here = report.switch_to.active_element
        reached.add((here.tag_name, here.get_attribute("aria-label") or here.get_attribute("data-choose") or ""))
    assert wanted <= reached


def test_a_trial_is_filtered_marked_and_pointed_at_in_the_table_and_in_every_chart(report: Chrome, ran: Ran) -> None:
    resize(report, 1280)
    linked = report.find_element(By.ID, "trials-linked")
    told = linked.find_element(By.CSS_SELECTOR, "[data-told]")
    for name in ("learning-sketch", "timeline", "coordinates", "pareto-search"):
        wait(report, lambda page, name=name: drawn(page, name), f"the chart {name}")  # type: ignore[misc]

    def marked(kind: str, name: str) -> str:
        path = report.find_element(By.CSS_SELECTOR, f"#chart-{name} .above .{kind}.dots")
        return path.get_attribute("d") or ""

    Select(linked.find_element(By.CSS_SELECTOR, "[data-choose=best]")).select_by_visible_text("1")
    best = {rank: min((o for o in ran.result.outcomes if o.config.rank == rank and o.best),
                      key=lambda o: o.best["val_residual_ratio"]) for rank in (2, 4)}  # fmt: skip
    assert all(outcome.config.trial_id in told.text for outcome in best.values())
    for name in ("timeline", "pareto-search"):
        drawn(report, name)
        wait(report, lambda page, name=name: marked("marked", name), f"the best in {name}")  # type: ignore[misc]
    Select(linked.find_element(By.CSS_SELECTOR, "[data-choose=family]")).select_by_visible_text("sketch")
    rows = report.find_elements(By.CSS_SELECTOR, "#trials tr[data-trial]")
    assert {row.text.split()[0].split("-")[1] for row in rows if row.is_displayed()} == {"sketch"}
    assert told.text.startswith("4 of 8 trials; marked: ")
    Select(linked.find_element(By.CSS_SELECTOR, "[data-choose=family]")).select_by_visible_text("all")
    Select(linked.find_element(By.CSS_SELECTOR, "[data-choose=best]")).select_by_visible_text("none")
    report.execute_script("arguments[0].focus()", rows[0])
    drawn(report, "timeline")
    wait(report, lambda page: marked("pointed", "timeline"), "the focused trial in the timeline")
    report.switch_to.active_element.send_keys(Keys.ARROW_DOWN, Keys.ENTER)
    here = report.switch_to.active_element
    assert here.get_attribute("aria-current") == "true" and here.text.split()[0].rstrip(",") in told.text
    here.send_keys(Keys.ENTER)
    assert told.text == "8 of 8 trials"
    assert complaints(report) == []


def test_everything_seen_has_words_for_those_who_cannot_see_it(report: Chrome) -> None:
    mute = report.execute_script(
        "return [...document.querySelectorAll('[data-figure], figure > div > img, .scroll')]"
        ".filter((e) => !(e.alt || e.getAttribute('aria-label'))).map((e) => e.outerHTML.slice(0, 80))"
    )
    assert mute == []
    assert report.execute_script("return [...document.querySelectorAll('th')].filter((e) => !e.scope).length") == 0


def test_print_shows_the_pictures_in_place_of_the_choosers_and_every_chart(report: Chrome) -> None:
    report.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        pictures = report.execute_script(
            "return [...document.querySelectorAll('.still img')].filter((e) => e.offsetParent).length"
        )
        hidden = report.execute_script(
            "return [...document.querySelectorAll('.charts, .places')].map((e) => !e.offsetParent)"
        )
        # Of the rates there is a picture, too.
        assert (pictures, hidden.count(True)) == (3, 2)
    finally:
        report.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_the_page_of_places_works_by_itself(window: Chrome, ran: Ran) -> None:
    *pictures, page = visualize(open_study(ran.results, ran.result.study_id), [4], rank=4, channels=[2, 0])
    assert [path.name for path in pictures] == ["spatial-004-r004.png"]
    window.get(page.as_uri())
    shows(window, "Test image 4 at rank 4", "channel 2: original", "sketch: error")
    assert complaints(window) == []


@pytest.fixture(scope="module")
def ui(ran: Ran, window: Chrome) -> Iterator[str]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "lowrank_tune", "ui", "--results", str(ran.results), "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            page = server.stderr.readline().removeprefix("Open ").strip()
            while not answers(f"http://127.0.0.1:{port}/health"):
                assert server.poll() is None
            yield page
        finally:
            server.terminate()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except OSError:
        return False


def page_of(ui: str, ran: Ran, name: str) -> str:
    """The address of a run's page, by the run's name: the study's or a trial's id."""
    client = MlflowClient(f"sqlite:///{ran.results / 'mlflow.db'}")
    wanted = f"tags.`lowrank.study_id` = '{ran.result.study_id}' and attributes.run_name = '{name}'"
    (run,) = client.search_runs([client.get_experiment_by_name("small").experiment_id], wanted)
    return f"{ui.partition('?')[0]}/{run.info.run_id}"


def test_mlflow_opens_on_a_view_for_comparing_trials(window: Chrome, ui: str, ran: Ran) -> None:
    resize(window, 1800)
    window.get(ui)
    best = min(ran.result.outcomes, key=lambda outcome: outcome.best["val_residual_ratio"])
    shows(window, "rank", "family", "lr", "best_val_residual_ratio", "lowrank.stopped_by", best.stopped_by)
    first = window.find_elements(By.CSS_SELECTOR, "[data-component-id*=runnamecellrenderer], .ag-row a")
    assert best.config.trial_id in [link.text for link in first][0]
    # Only a fresh page reads a view.
    window.get("about:blank")
    window.get(f"{ui}&compareRunsMode=CHART")
    shows(window, "Trials of lowrank_tune", "Parallel Coordinates", "val_residual_ratio", "test.svd.residual_ratio vs")
    assert failures(window) == []


def test_mlflow_shows_the_parent_and_its_children(window: Chrome, ui: str, ran: Ran) -> None:
    resize(window, 1280)
    window.get("about:blank")
    window.get(ui.partition("&")[0])
    shows(window, ran.result.study_id)
    names = [outcome.config.trial_id for outcome in (*ran.result.outcomes, *ran.result.confirmations)]

    def opened(page: Chrome) -> bool:
        try:
            if names[0] in page.find_element(By.TAG_NAME, "body").text:
                return True
            for button in page.find_elements(By.CSS_SELECTOR, "button[data-component-id*=runnamecellrenderer]"):
                button.click()
        except StaleElementReferenceException:
            pass
        return False

    wait(window, opened, "a trial below its study")
    shows(window, *names)
    assert failures(window) == []


@pytest.mark.parametrize("width", [1280, 400])
def test_mlflow_draws_a_trials_metrics(window: Chrome, ui: str, ran: Ran, width: int) -> None:
    resize(window, width)
    window.get(f"{page_of(ui, ran, ran.result.outcomes[-1].config.trial_id)}/model-metrics")
    shows(window, "best_val_residual_ratio" if width == 1280 else "Model metrics")
    wait(window, lambda page: page.find_elements(By.CSS_SELECTOR, ".js-plotly-plot svg.main-svg"), "a metric's chart")
    assert failures(window) == []


def test_mlflow_has_the_studys_artifacts_and_rank_curves(window: Chrome, ui: str, ran: Ran) -> None:
    resize(window, 1280)
    run = page_of(ui, ran, ran.result.study_id)
    window.get(f"{run}/artifacts")
    shows(window, "report.html", "comparison.json", "per_image.parquet", "pareto.json", "study.yaml", "plots")
    window.get(f"{run}/model-metrics")
    shows(window, "test.direct.residual_ratio", "test.direct.token_cosine")
    assert failures(window) == []


def test_the_report_opens_inside_mlflow(window: Chrome, ui: str, ran: Ran) -> None:
    resize(window, 1280)
    window.get(f"{page_of(ui, ran, ran.result.study_id)}/artifacts/report.html")
    frame = wait(window, lambda page: page.find_elements(By.TAG_NAME, "iframe"), "the report's frame")[0]
    window.switch_to.frame(frame)
    try:
        shows(window, "Study small", "In words")
        wait(window, lambda page: drawn(page, "left"), "a chart of the report")
    finally:
        window.switch_to.default_content()
