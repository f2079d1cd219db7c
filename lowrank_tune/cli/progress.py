"""What a running study shows on stderr: one live view on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from lowrank_tune.records import StoppedFor, StudyProgress, TrialConfig, TrialOutcome, leading
from lowrank_tune.report.text import LEADING_LABELS, STOPPED, duration_text, leading_text, rate_text

_STDERR = 2
_MOST_RUNNING = 6
_LINES = 4  # about the images, where there is no terminal


class TerminalProgress(StudyProgress):
    """A bar with rate and ETA, the best of each rank and what trains; without a terminal a line now and then."""

    def __init__(self, epochs: int = 0, console: Console | None = None, doing: str = "extracting") -> None:
        self._epochs, self._doing, self._started = epochs, doing, time.monotonic()
        self._console = console or Console(stderr=True, highlight=False)
        count, what = TextColumn("{task.fields[done]}/{task.total:.0f}"), TextColumn("{task.description}")
        # Of its speed all is remembered: a trial may take minutes.
        columns = (TimeElapsedColumn(), what, BarColumn(24), count, _PaceColumn())
        self._bar = Progress(*columns, console=self._console, speed_estimate_period=3600)
        self._live = Live(get_renderable=self._view, console=self._console, transient=True, refresh_per_second=4)
        self._best: dict[int, tuple[float, str, int, str]] = {}
        self._configs: dict[str, TrialConfig] = {}
        self._running: dict[str, tuple[int, str]] = {}
        self._labels: dict[str, None] = {}
        self._ends: Counter[str] = Counter()

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def stage(self, text: str) -> None:
        self._end_work()
        self._running.clear()
        self._say(text)

    def images(self, done: int, total: int) -> None:
        """Count the images; what a cache held already says nothing of the rate."""
        self._count_images(self._doing, done, total)

    def asked(self, done: int, total: int) -> None:
        self._count_images("asking", done, total)

    def _count_images(self, what: str, done: int, total: int) -> None:
        before = self._bar.tasks[0].fields["done"] if self._bar.tasks else done
        task = self._count(what, done, total, unit="images")
        part = max(1, -(-total // _LINES))
        if not self._console.is_terminal and done != before and (done // part != before // part or done == total):
            self._say(", ".join(text for text in (f"{done}/{total} images", _pace(task)) if text))

    def trials(self, total: int) -> None:
        self._end_work()
        self._ends.clear()
        self._count("training", 0, total)

    def trial_started(self, config: TrialConfig) -> None:
        self._configs[config.trial_id] = config

    def trial_epoch(self, trial_id: str, epoch: int, metrics: dict[str, Any]) -> None:
        name, shown = leading(metrics), leading_text(metrics, labelled=False)
        value = float(metrics.get(name, math.nan))
        self._labels[LEADING_LABELS[name]] = None
        self._running[trial_id] = (epoch, shown)
        config = self._configs[trial_id]
        # What lacks something that is required is no rank's best.
        if math.isfinite(value) and config.excess(metrics) == 0:
            found = (value, trial_id, epoch, shown)
            self._best[config.rank] = min(self._best.get(config.rank, found), found)
        self._count_trials()

    def trial_ended(self, outcome: TrialOutcome) -> None:
        trial_id = outcome.config.trial_id
        self._running.pop(trial_id, None)
        self._configs.pop(trial_id, None)
        self._ends[outcome.stopped_by] += 1
        task = self._count_trials()
        if not self._console.is_terminal or outcome.status == "failed":
            figure = "no model"
            if outcome.best:
                figure = f"{leading_text(outcome.best)} at epoch {outcome.best_epoch} of {outcome.epochs}"
            ending = STOPPED[outcome.stopped_by] + (f": {outcome.reason}" if outcome.reason else "")
            line = f"{task.fields['done']}/{task.total:.0f} {trial_id}  {figure}"
            self._say(", ".join(text for text in (line, ending, _pace(task)) if text))

    def search_ended(self, stopped_for: StoppedFor, told: str) -> None:
        if told:
            self._say(told)

    def _count_trials(self) -> Task:
        """Those that train count by their epochs."""
        done, total = self._ends.total(), self._bar.tasks[0].total if self._bar.tasks else None
        most = max(done, int(total or 0))
        begun = sum(min(epoch / self._epochs, 1.0) for epoch, _ in self._running.values() if self._epochs)
        return self._count("training", done, most, completed=min(done + begun, most))

    def _count(self, what: str, done: int, total: int, completed: float | None = None, unit: str = "") -> Task:
        completed = done if completed is None else completed
        if not self._bar.tasks:
            self._bar.add_task(what, total=total, completed=completed, done=done, unit=unit)  # type: ignore[arg-type]
        self._bar.update(self._bar.task_ids[0], total=total, completed=completed, done=done)
        return self._bar.tasks[0]

    def _end_work(self) -> None:
        for task_id in self._bar.task_ids:
            self._bar.remove_task(task_id)

    def _view(self) -> Group:
        below: list[Text | Table] = []
        training = any(not task.fields["unit"] for task in self._bar.tasks)
        if training and self._ends:
            ends = (f"{self._ends[stop]} {text}" for stop, text in STOPPED.items() if self._ends[stop])
            below.append(Text(", ".join(ends)))
        if training and self._best:
            best = [(rank, *found, shown) for rank, (_, *found, shown) in sorted(self._best.items())]
            below.append(_table(("best at rank", "trial", "epoch", " or ".join(self._labels)), best))
        if training and self._running:
            of = f"/{self._epochs}" if self._epochs else ""
            shown = list(self._running.items())[-_MOST_RUNNING:]
            rows = [(trial_id, f"{epoch}{of}", figure) for trial_id, (epoch, figure) in shown]
            below.append(_table(("training now", "epoch", " or ".join(self._labels)), rows))
        return Group(self._bar, *below)

    def _say(self, text: str) -> None:
        self._console.print(f"{time.monotonic() - self._started:6.1f} s  {text}", markup=False, soft_wrap=True)


class _PaceColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(_pace(task))


def _pace(task: Task) -> str:
    """Its rate and what is left: `12 images/s, about 3 s left`."""
    unit, left = task.fields["unit"], task.time_remaining
    rate = f"{rate_text(task.speed)} {unit}/s" if unit and task.speed else ""
    return ", ".join(text for text in (rate, f"about {duration_text(left)} left" if left else "") if text)


def _table(head: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> Table:
    """Names to the left and numbers to the right, what tells of a trial last."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in head:
        table.add_column(name, justify="left" if name in {"trial", "training now"} else "right", no_wrap=True)
    for *cells, figure in rows:
        table.add_row(*map(str, cells), Text(figure, style="bold"))
    return table


@contextmanager
def shown_progress(epochs: int = 0, quiet: bool = False, doing: str = "extracting") -> Iterator[StudyProgress]:
    with _pythons_stderr_only():
        if quiet:
            yield StudyProgress()
            return
        with TerminalProgress(epochs, doing=doing) as progress:
            yield progress


@contextmanager
def _pythons_stderr_only() -> Iterator[None]:
    """Keep what Ray's C++ core writes to file descriptor 2, past every logger, off the terminal."""
    try:
        silent = sys.stderr.fileno() == _STDERR and logging.getLogger().level >= logging.ERROR
    except (OSError, ValueError, AttributeError):
        silent = False
    if not silent:
        yield
        return
    before = sys.stderr
    before.flush()
    kept = os.dup(_STDERR)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), _STDERR)
    with os.fdopen(kept, "w", buffering=1, encoding=before.encoding, errors="backslashreplace") as sys.stderr:
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, _STDERR)
            sys.stderr = before
