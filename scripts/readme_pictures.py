"""Makes the README's pictures from a real run of the quickstart: scripts/pictures/*.png, each under 200 KB.

    .venv/bin/python scripts/readme_pictures.py [--results DIR]

Without --results the quickstart is run first, in an empty results directory, which takes some minutes; with it, the
newest study there is shown. Needs Debian's chromium and chromium-driver, and the packages of `scripts/setup dev`.
"""

from __future__ import annotations

import argparse
import base64
import io
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

PICTURES = Path(__file__).parent / "pictures"
LARGEST = 200_000
WAIT_S = 120
FLAGS = (
    "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
    "disable-component-update", "disable-sync", "hide-scrollbars",
)  # fmt: skip


def main() -> None:
    """Run the quickstart where no results are given, and take the pictures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, help="a results directory with a finished quickstart")
    given = parser.parse_args().results
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        results = given or Path(scratch) / "results"
        if given is None:
            command = [sys.executable, "-m", "lowrank_tune", "run", "studies/quickstart.yaml"]
            subprocess.run([*command, "--results", str(results)], check=True)
        reports = (results / "studies").glob("quickstart-*/report.html")
        study = max(reports, key=lambda path: path.stat().st_mtime).parent
        with chromium(scratch) as window:
            report(window, study)
            mlflow(window, results)
    for picture in sorted(PICTURES.glob("*.png")):
        size = picture.stat().st_size
        print(f"{picture}: {size / 1000:.0f} kB")
        if size > LARGEST:
            sys.exit(f"{picture} is above {LARGEST / 1000:.0f} kB")


def report(window: webdriver.Chrome, study: Path) -> None:
    """The report's first screen on a desk and on a phone, its curves and its maps."""
    window.get((study / "report.html").as_uri())
    for name, width, selector, height in (
        ("report", 1100, "header", 900),
        ("report-phone", 400, "header", 900),
        ("ranks", 1100, "#ranks", 640),
        ("places", 820, "#places", 1010),
        ("learning", 1100, "#learning", 560),
    ):
        resize(window, width)
        section = window.find_element(By.CSS_SELECTOR, selector)
        window.execute_script("arguments[0].scrollIntoView()", section)
        wait(window, "return [...document.querySelectorAll('[data-figure]')].filter((e) => {"
                     "const r = e.getBoundingClientRect(); return r.top < innerHeight && r.bottom > 0})"
                     ".every((e) => e.querySelector('svg.main-svg'))")  # fmt: skip
        time.sleep(2)
        top = window.execute_script("return arguments[0].getBoundingClientRect().top + scrollY", section)
        save(name, shot(window, 0, top, width, height))


def mlflow(window: webdriver.Chrome, results: Path) -> None:
    """The study's runs in the MLflow UI."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    command = [sys.executable, "-m", "lowrank_tune", "ui", "--results", str(results), "--port", port]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as server:
        try:
            page = (server.stderr.readline() if server.stderr else "").removeprefix("Open ").strip()
            resize(window, 1280)
            open_patiently(window, page)
            wait(window, "return document.body.innerText.includes('quickstart-')")
            for button in window.find_elements(By.CSS_SELECTOR, "button[data-component-id*=runnamecellrenderer]"):
                button.click()
            wait(window, "return document.body.innerText.includes('r064-')")
            time.sleep(2)
            save("mlflow", shot(window, 0, 0, 950, 900))
        finally:
            server.terminate()


def open_patiently(window: webdriver.Chrome, page: str) -> None:
    """Open a page of a server that is on its way up."""
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            window.get(page)
            return
        except WebDriverException:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)


@contextmanager
def chromium(scratch: str) -> Iterator[webdriver.Chrome]:
    """A headless browser."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not browser or not driver:
        sys.exit("chromium and chromedriver are needed: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, f"user-data-dir={scratch}/profile"):
        options.add_argument(f"--{flag}")
    window = webdriver.Chrome(options, webdriver.ChromeService(driver))
    try:
        yield window
    finally:
        window.quit()


def resize(window: webdriver.Chrome, width: int) -> None:
    """Give the page a width in CSS pixels, that of a phone below 600."""
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    window.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    time.sleep(1)


def wait(window: webdriver.Chrome, script: str) -> None:
    """Wait until a script returns what is true."""
    WebDriverWait(window, WAIT_S, 0.3).until(lambda page: page.execute_script(script), script)


def shot(window: webdriver.Chrome, x: float, y: float, width: float, height: float) -> Image.Image:
    """A part of the page as a picture."""
    clip = {"x": x, "y": y, "width": width, "height": height, "scale": 1}
    options = {"format": "png", "captureBeyondViewport": True, "clip": clip}
    taken = window.execute_cdp_cmd("Page.captureScreenshot", options)
    return Image.open(io.BytesIO(base64.b64decode(taken["data"])))


def save(name: str, picture: Image.Image) -> None:
    """Write a PNG, with a palette of 256 colours: screenshots lose nothing that can be seen."""
    picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(PICTURES / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
