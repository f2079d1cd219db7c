"""What a running study shows on stderr: one live view on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from rich.console import Console, ConsoleRenderable, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lowrank_tune.records import StudyProgress, TrialOutcome
from lowrank_tune.report.text import STOPPED, duration_text, rate_text, ratio_text

_RANK = re.compile(r"^r(\d+)-")
_STDERR = 2
_MOST_RUNNING = 6
_PARTS = 4
"""Lines about the extraction where there is no terminal."""


@dataclass(slots=True)
class _Best:
    """The best of a rank so far."""

    ratio: float
    trial_id: str
    epoch: int


@dataclass(slots=True)
class _Work:
    """A part of the story that is counted.

    Attributes:
        what: `training`, or what is done with images: `extracting`, `decomposing`.
        unit: of what is counted.
        total: how many there are.
        done: how many are over.
        began: when, and how many were over then: what a cache held already says nothing of the rate.
    """

    what: str
    unit: str
    total: int
    done: int = 0
    began: tuple[float, int] = (0.0, 0)


class TerminalProgress(StudyProgress):
    """A view of the part at work that is redrawn in place: a bar with rate and ETA, the best of each rank, what trains.

    Args:
        epochs: of a trial at most; tells how far one that trains is.
        console: where to show it; stderr by default.
        doing: what is done with images.
    """

    def __init__(self, epochs: int = 0, console: Console | None = None, doing: str = "extracting") -> None:
        self._doing = doing
        self._console = console or Console(stderr=True, highlight=False)
        self._epochs = epochs
        self._started = time.monotonic()
        self._stage = ""
        self._work: _Work | None = None
        self._best: dict[int, _Best] = {}
        self._running: dict[str, dict[str, Any]] = {}
        self._ends: dict[str, int] = {}
        self._live = Live(console=self._console, get_renderable=self.view, refresh_per_second=4, transient=True)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def stage(self, text: str) -> None:
        """Begin a part of the story on a line of its own."""
        self._work, self._stage = None, text
        self._running.clear()
        self._say(text)

    def images(self, done: int, total: int) -> None:
        """Count the images."""
        work = self._counted(self._doing, "images/s", total, done)
        before, work.done = work.done, done
        part = max(1, -(-total // _PARTS))
        if not self._console.is_terminal and done != before and (done // part != before // part or done == total):
            self._say(f"{done}/{total} images{self._rate(work)}")

    def trials(self, total: int) -> None:
        """Count the trials, or the repetitions after them."""
        self._work, self._ends = None, {}
        self._counted("training", "trials/s", total, 0)

    def trial_epoch(self, trial_id: str, epoch: int, metrics: dict[str, Any]) -> None:
        """Take note of an epoch."""
        ratio = float(metrics.get("val_residual_ratio", math.nan))
        self._running[trial_id] = {**metrics, "epoch": epoch}
        rank = _rank(trial_id)
        if rank is not None and math.isfinite(ratio) and (rank not in self._best or ratio < self._best[rank].ratio):
            self._best[rank] = _Best(ratio, trial_id, epoch)

    def trial_ended(self, outcome: TrialOutcome) -> None:
        """Count a trial; where there is no terminal, and where it failed, it gets a line."""
        trial_id = outcome.config.trial_id
        self._running.pop(trial_id, None)
        work = self._counted("training", "trials/s", 0, 0)
        work.done += 1
        work.total = max(work.total, work.done)
        self._ends[outcome.stopped_by] = self._ends.get(outcome.stopped_by, 0) + 1
        if not self._console.is_terminal or outcome.status == "failed":
            ratio = outcome.best.get("val_residual_ratio")
            figure = f"ρ {ratio_text(ratio)} at epoch {outcome.best_epoch} of {outcome.epochs}" if ratio else "no model"
            reason = f": {outcome.reason}" if outcome.reason else ""
            ending = f"{STOPPED[outcome.stopped_by]}{reason}"
            self._say(f"{work.done}/{work.total} {trial_id}  {figure}, {ending}{self._left(work)}")

    def view(self) -> ConsoleRenderable:
        """What the terminal shows now."""
        parts: list[ConsoleRenderable] = []
        if self._work is not None:
            parts.append(self._bar(self._work))
        if self._work is not None and self._work.what == "training":
            if self._best:
                parts.append(self._best_table())
            if self._running:
                parts.append(self._running_table())
        return Group(*parts)

    def _counted(self, what: str, unit: str, total: int, done: int) -> _Work:
        if self._work is None or self._work.what != what:
            self._work = _Work(what, unit, total, done, (time.monotonic(), done))
        self._work.total = max(total, self._work.total)
        return self._work

    def _bar(self, work: _Work) -> ConsoleRenderable:
        row = Table.grid(padding=(0, 2, 0, 0))
        ends = ", ".join(f"{self._ends[stop]} {words}" for stop, words in STOPPED.items() if stop in self._ends)
        bar = ProgressBar(total=max(work.total, 1), completed=self._progress(work), width=24)
        texts = [f"{work.done}/{work.total}", f"{self._rate(work)}{self._left(work)}".removeprefix(", ")]
        row.add_row(Text(f"{self._seconds()}  {work.what}"), bar, *map(Text, texts))
        return Group(row, Text(f"{' ' * 10}{ends}", style="dim")) if ends else row

    def _best_table(self) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), title_justify="left")
        table.add_column(" " * 10 + "best at rank", justify="right")
        for name in ("trial", "epoch", "ρ"):
            table.add_column(name, justify="left" if name == "trial" else "right", no_wrap=True)
        for rank, best in sorted(self._best.items()):
            table.add_row(str(rank), best.trial_id, str(best.epoch), Text(ratio_text(best.ratio), style="bold"))
        return table

    def _running_table(self) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), style="dim")
        for name in (" " * 10 + "training now", "epoch", "ρ"):
            table.add_column(name, justify="left" if "now" in name else "right", no_wrap=True)
        shown = list(self._running.items())[-_MOST_RUNNING:]
        for trial_id, metrics in shown:
            epochs = f"{metrics['epoch']}/{self._epochs}" if self._epochs else str(metrics["epoch"])
            ratio = float(metrics.get("val_residual_ratio", math.nan))
            table.add_row(" " * 10 + trial_id, epochs, ratio_text(ratio))
        return table

    def _progress(self, work: _Work) -> float:
        """How much is done, those that train counted by their epochs."""
        if work.what != "training" or not self._epochs:
            return work.done
        begun: float = sum(min(int(metrics["epoch"]) / self._epochs, 1.0) for metrics in self._running.values())
        return min(work.done + begun, work.total)

    def _rate(self, work: _Work) -> str:
        began, before = work.began
        seconds = time.monotonic() - began
        if work.what != self._doing or work.done <= before or seconds <= 0:
            return ""
        return f", {rate_text((work.done - before) / seconds)} {work.unit}"

    def _left(self, work: _Work) -> str:
        began, before = work.began
        done = self._progress(work)
        if done <= before or done >= work.total:
            return ""
        return f", about {duration_text((time.monotonic() - began) * (work.total - done) / (done - before))} left"

    def _seconds(self) -> str:
        return f"{time.monotonic() - self._started:6.1f} s"

    def _say(self, text: str) -> None:
        self._console.print(f"{self._seconds()}  {text}", markup=False, soft_wrap=True)


@contextmanager
def shown_progress(epochs: int = 0, quiet: bool = False, doing: str = "extracting") -> Iterator[StudyProgress]:
    """What a command shows while it works.

    Args:
        epochs: of a trial at most.
        quiet: show nothing.
        doing: what is done with images.
    """
    with _pythons_stderr_only():
        if quiet:
            yield StudyProgress()
            return
        with TerminalProgress(epochs, doing=doing) as progress:
            yield progress


@contextmanager
def _pythons_stderr_only() -> Iterator[None]:
    """Keep what Ray's C++ core writes to file descriptor 2, past every logger, off the terminal; not with --debug."""
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


def _rank(trial_id: str) -> int | None:
    found = _RANK.match(trial_id)
    return int(found.group(1)) if found else None
