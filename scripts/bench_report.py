"""report.html of a study of many trials, in a real browser: its size, its first paint, a filter and a mark.

    .venv/bin/python scripts/bench_report.py [--trials 2000] [--rounds 5] [--keep FOLDER]

About a minute; needs chromium and chromedriver. The trials are made up, of
three families at three ranks, with histories as ASHA leaves them and a search journal; a real page's pictures of test
images add some 0.2 MB each. Every figure is the middle one of the rounds, by the browser's clock:

- first paint: from the start of loading the file to the first text on the screen, at 1280 x 900
- a filter: from the choice of a family to the frame that shows what is on the screen anew
- a mark: likewise, from the choice of the best of each rank, and from the pointer on another trial

Wanted for 2,000 trials: a page below 3 MB, a first paint below 2 s, a filter below 200 ms.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path

import optuna
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState, create_trial
from safetensors.torch import save_file
from selenium import webdriver
from selenium.webdriver import Chrome
from selenium.webdriver.support.ui import WebDriverWait

from lowrank_tune.config.plan import make_plan
from lowrank_tune.config.schema import StudySpec
from lowrank_tune.measured import Comparison, Front, FrontPoint
from lowrank_tune.records import FeatureRow, FeatureSet, Split, TrialConfig, TrialOutcome
from lowrank_tune.report.report import write_report
from lowrank_tune.trials.outcomes import write_history

FAMILIES, RANKS, EPOCHS, RUNGS = ("direct", "sketch", "refined"), (32, 64, 128), 20, (3, 9)
BEGAN = datetime(2026, 1, 1, tzinfo=UTC)
# Until table and charts are drawn anew: what a change has begun ends before the frame after the next.
CHANGED = """
const [change, done] = [arguments[0], arguments[1]], began = performance.now();
new Function(change)();
requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now() - began)));
"""
CHOOSE = """
const chooser = document.querySelector("[data-choose={name}]");
chooser.value = "{value}";
chooser.dispatchEvent(new Event("change"));
"""
POINT = (
    'document.querySelectorAll("tr[data-trial]")[{place}].dispatchEvent(new Event("pointerover", {{bubbles: true}}));'
)


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--keep", type=Path, help="where the page is left, to be looked at")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        page = make_page(Path(folder), given.trials)
        print(
            f"{given.trials} trials: report.html written in {time.perf_counter() - began:.1f} s with what it is made of"
        )
        print(f"page {page.stat().st_size / 1e6:.2f} MB")
        if given.keep:
            given.keep.mkdir(parents=True, exist_ok=True)
            shutil.copy(page, given.keep)
        with browser() as window:
            paints = [first_paint(window, page) for _ in range(given.rounds)]
            print(f"first paint {statistics.median(paints):.0f} ms")
            for part, name in (("#chart-learning-direct", "learning"), ("#trials tbody", "the table")):
                place = window.find_element("css selector", part)
                window.execute_script("arguments[0].scrollIntoView()", place)
                WebDriverWait(window, 60).until(lambda page: page.find_elements("css selector", "svg.above"))
                time.sleep(2)  # what came near is drawn
                choices = [CHOOSE.format(name="family", value=value) for value in (1, 0) * given.rounds]
                print(f"with {name} on the screen: a filter {changes(window, choices)}", end="; ")
                changes(window, [CHOOSE.format(name="family", value="")])
                marks = [CHOOSE.format(name="best", value=value) for value in (10, 1) * given.rounds]
                print(f"the best marked {changes(window, marks)}", end="; ")
                points = [POINT.format(place=place) for place in range(given.rounds * 2)]
                print(f"a trial pointed at {changes(window, points)}")


def changes(window: Chrome, scripts: Sequence[str]) -> str:
    """The middle and the longest of the times that changes take."""
    took = [float(window.execute_async_script(CHANGED, script)) for script in scripts]
    return f"{statistics.median(took):.0f} ms, {max(took):.0f} at most"


def first_paint(window: Chrome, page: Path) -> float:
    """Milliseconds until a page shows its first text."""
    window.get("about:blank")
    window.get(page.as_uri())
    script = "return performance.getEntriesByName('first-contentful-paint').map((entry) => entry.startTime)[0]"
    return float(WebDriverWait(window, 60, 0.1).until(lambda opened: opened.execute_script(script)))


@contextmanager
def browser() -> Iterator[Chrome]:
    """A headless Chromium."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1280,900"):
        options.add_argument(f"--{flag}")
    window = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield window
    finally:
        window.quit()


def make_page(home: Path, trials: int) -> Path:
    """Make a study up and write its report."""
    families = {"direct": {}, "sketch": {}, "refined": {}}
    search = {"method": "random", "trials": trials, "space": {"families": families, "rank": list(RANKS)}}
    source = {"features": {"source": {"samples": 20}}, "split": {"validation": 4, "test": 4, "group_by": None}}
    spec = StudySpec.model_validate({"name": "many", **source, "search": search, "training": {"epochs": EPOCHS}})
    plan = make_plan(spec, home, BEGAN)
    directory, cache = plan.study_dir, home / "features"
    (directory / "tune").mkdir(parents=True)
    (cache / "shards").mkdir(parents=True)
    (directory / "study.yaml").write_text("name: many\n")
    save_file({"features": torch.randn(20, 16, 160)}, cache / "shards" / "0.safetensors")
    rows = tuple(FeatureRow(f"{image:064x}", "0.safetensors", image) for image in range(20))
    features = FeatureSet(
        str(cache), "0" * 16, "synthetic", "random", "float32", 16, 160, rows, str(home / "records.parquet")
    )
    split = Split(tuple(range(12)), tuple(range(12, 16)), tuple(range(16, 20)))
    outcomes = make_trials(directory, trials)
    points = tuple(
        FrontPoint(o.config.family, o.config.rank, o.config.rank, o.best["val_mse"], o.config.trial_id)
        for o in outcomes
    )
    fronts = (Front("search", "rank", "val_mse", "lower", points),)
    comparison = Comparison((), "per_image.parquet", "made up", fronts=fronts)
    return write_report(plan, features, split, outcomes, comparison, directory)[-1]


def make_trials(directory: Path, trials: int) -> list[TrialOutcome]:
    """Trials as ASHA leaves them: one in three goes on at each rung; eight at a time, a second an epoch."""
    chance, free, outcomes, known = random.Random(0), [0.0] * 8, [], []
    storage = JournalStorage(JournalFileBackend(str(directory / "tune" / "optuna.journal")))
    study = optuna.create_study(storage=storage, study_name="many")
    for number in range(trials):
        family, rank = FAMILIES[number % 3], RANKS[number // 3 % 3]
        params = {"lambda_b": chance.uniform(1e-6, 1e-2)} if family == "direct" else {}
        lr, good = 10 ** chance.uniform(-4, -2), chance.random()
        epochs = next((rung for rung, share in zip(RUNGS, (2 / 3, 8 / 9), strict=True) if good < share), EPOCHS)
        config = TrialConfig(
            f"r{rank:03d}-{family}-{number:04d}", number, 0, family, rank, lr, 1e-5, 8, EPOCHS, 10, params
        )
        ratios = [1.01 + (1.3 - good) * (0.1 + 5 / epoch) * chance.uniform(0.9, 1.1) for epoch in range(1, epochs + 1)]
        best = {
            "val_residual_ratio": min(ratios),
            "val_mse": min(ratios) / rank,
            "val_token_cosine": 1 - min(ratios) / 50,
        }
        stopped = "budget" if epochs == EPOCHS else "asha"
        path = directory / "trials" / config.trial_id
        status = "finished" if stopped == "budget" else "pruned"
        outcome = TrialOutcome(config, status, stopped, epochs, epochs, best, str(path), float(epochs))
        path.mkdir(parents=True)
        write_history(path, [{"epoch": place + 1, "val_residual_ratio": ratio} for place, ratio in enumerate(ratios)])
        # A picture of each trial's losses is a file beside the page, and takes a while: it is there already.
        (path / "loss_curves.png").write_bytes(b"")
        os.utime(path / "history.json", (0, 0))
        outcomes.append(outcome)
        worker = free.index(min(free))
        start, free[worker] = free[worker], free[worker] + epochs * chance.uniform(0.9, 1.1)
        trial = create_trial(state=TrialState.COMPLETE, value=min(ratios), user_attrs={"config": asdict(config)})
        trial.datetime_start, trial.datetime_complete = (BEGAN + timedelta(seconds=at) for at in (start, free[worker]))
        known.append(trial)
    study.add_trials(known)
    return outcomes


if __name__ == "__main__":
    main()
