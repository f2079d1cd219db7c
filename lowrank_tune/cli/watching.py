"""What `watch` shows: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lowrank_tune.cluster.watching import WatchedTrial
from lowrank_tune.records import leading
from lowrank_tune.report.text import STOPPED, duration_text, leading_text

_OTHER_LINES = 6  # above and below the table
_LEAST_ROWS = 4

Look = tuple[Mapping[str, Any], Mapping[str, WatchedTrial]]
"""A study's status, and its trials by id."""


def show_watched(looks: Iterable[Look]) -> None:
    """Show a study until it is over."""
    console = Console(highlight=False)
    shown, started = dict[str, str](), time.monotonic()
    with Live(console=console, auto_refresh=False) if console.is_terminal else nullcontext() as live:
        for status, trials in looks:
            if live:
                live.update(_view(status, trials, console.size.height - _OTHER_LINES), refresh=True)
                continue
            state = str(status["state"])
            for trial in trials.values():
                stood = _state(trial, state)
                if shown.get(trial.trial_id) != stood:
                    shown[trial.trial_id] = stood
                    line = "  ".join((*_cells(trial, state), _figure(trial)))
                    console.print(f"{time.monotonic() - started:6.1f} s  {line}", markup=False, soft_wrap=True)
            if state == "running" and shown.get("") != status["stage"]:
                shown[""] = status["stage"]
                console.print(f"{time.monotonic() - started:6.1f} s  {status['stage']}", markup=False, soft_wrap=True)


def _view(status: Mapping[str, Any], trials: Mapping[str, WatchedTrial], rows: int) -> Group:
    """Those that train come first, then the others, the best of a rank before the next best."""
    state, progress = str(status["state"]), status["progress"]
    head = f"{status['study_id']}: {state}"
    if progress:
        head += f", {progress['done']} of {progress['trials']} trials"
        if progress.get("eta_s") is not None:
            head += f", about {duration_text(progress['eta_s'])} left"
    order = sorted(trials.values(), key=lambda trial: (bool(trial.stopped_by), _value(trial), trial.trial_id))
    rows = max(_LEAST_ROWS, rows)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("trial", "rank", "family", "state", "epoch", "best"):
        table.add_column(name, justify="right" if name in ("rank", "epoch", "best") else "left", no_wrap=True)
    for trial in order[:rows]:
        trial_id, rank, family, stood, epoch = _cells(trial, state)
        cells = (trial_id, rank.removeprefix("rank "), family, stood, epoch.removeprefix("epoch "))
        table.add_row(*cells, Text(_figure(trial), style="bold"))
    left = len(order) - rows
    below = [Text(f"and {left} more")] if left > 0 else []
    return Group(Text(head, style="bold"), Text(status["stage"] if state == "running" else ""), table, *below)


def _cells(trial: WatchedTrial, state: str) -> tuple[str, str, str, str, str]:
    place = f"epoch {trial.epoch}/{trial.epochs}"
    return trial.trial_id, f"rank {trial.rank}", trial.family, _state(trial, state), place


def _state(trial: WatchedTrial, study: str) -> str:
    if trial.stopped_by:
        return STOPPED[trial.stopped_by]
    return "trains" if study == "running" else STOPPED["interruption"]


def _figure(trial: WatchedTrial) -> str:
    return leading_text(trial.best) if trial.best else ""


def _value(trial: WatchedTrial) -> float:
    value = trial.best.get(leading(trial.best), math.inf)
    return value if math.isfinite(value) else math.inf
