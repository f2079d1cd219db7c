"""What a running study shows on stderr: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from lowrank_tune.records import TrialOutcome
from lowrank_tune.study import StudyProgress


class TerminalProgress(StudyProgress):
    """A bar with a rate and an ETA for the part at work, and a line for each part and each trial that ended."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._bars = Progress(
            TextColumn("         {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._bar: TaskID | None = None
        self._bar_started = 0.0
        self._started = time.monotonic()
        self._trials = self._ended = 0

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def stage(self, text: str) -> None:
        """Begin a part of the story on a line of its own."""
        if self._bar is not None:
            self._bars.remove_task(self._bar)
            self._bar = None
        self._say(text)

    def images(self, done: int, total: int) -> None:
        """Move the bar of the images."""
        self._move("extracting", done, total, "images/s")

    def trials(self, total: int) -> None:
        """Open the bar of the trials, or of the repetitions after them."""
        self._trials, self._ended = total, 0
        self._move("training", 0, total, "trials/s")

    def trial_epoch(self, metrics: dict[str, Any]) -> None:
        """Show the figure of the trial that moved last, on the bar."""
        note = f"{metrics['trial_id']} epoch {metrics['epoch']}: ρ {metrics['val_residual_ratio']:.4f}"
        if self._bar is None:
            self._move("training", 0, 1, "trials/s")
        if self._bar is not None:
            self._bars.update(self._bar, note=note)

    def trial_ended(self, outcome: TrialOutcome) -> None:
        """Give the trial its line and move the bar."""
        self._ended += 1
        ratio = outcome.best.get("val_residual_ratio")
        figure = f"ρ {ratio:.4f} at epoch {outcome.best_epoch} of {outcome.epochs}" if ratio else "no model"
        reason = f": {outcome.reason}" if outcome.reason else ""
        count = f"{self._ended}/{self._trials} " if self._trials else ""
        self._say(f"{count}{outcome.config.trial_id}  {figure}, stopped by {outcome.stopped_by}{reason}")
        self._move("training", self._ended, max(self._trials, self._ended), "trials/s")

    def _say(self, text: str) -> None:
        self._console.print(f"{time.monotonic() - self._started:6.1f} s  {text}", markup=False, soft_wrap=True)

    def _move(self, what: str, done: int, total: int, unit: str) -> None:
        if self._bar is None:
            self._bar_started = time.monotonic()
            self._bar = self._bars.add_task(what, total=total, rate="", note="")
        rate = done / max(time.monotonic() - self._bar_started, 1e-9)
        self._bars.update(self._bar, completed=done, total=total, rate=f"{rate:.1f} {unit}" if done else "")
