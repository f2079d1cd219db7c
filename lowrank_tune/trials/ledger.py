"""Each trial's outcome as a file of its own, so that a study that goes on knows which trials are over."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from lowrank_tune.lowrank.files import write_whole
from lowrank_tune.records import TrialConfig, TrialOutcome, TrialTracker
from lowrank_tune.trials.outcome import outcome_of
from lowrank_tune.trials.paths import CHECKPOINT

OUTCOME = "outcome.json"


class Ledger:
    """A tracker that puts every outcome on file before the study's own tracker hears of it.

    Args:
        trials_dir: `studies/<study_id>/trials`.
        tracker: told everything as well.
    """

    def __init__(self, trials_dir: Path, tracker: TrialTracker) -> None:
        self._trials_dir = trials_dir
        self._tracker = tracker

    def trial_started(self, config: TrialConfig) -> None:
        """Pass it on."""
        self._tracker.trial_started(config)

    def trial_epoch(self, trial_id: str, epoch: int, metrics: dict[str, float]) -> None:
        """Pass it on."""
        self._tracker.trial_epoch(trial_id, epoch, metrics)

    def trial_ended(self, outcome: TrialOutcome) -> None:
        """Write it down, and pass it on."""
        write_outcome(self._trials_dir, outcome)
        self._tracker.trial_ended(outcome)


def write_outcome(trials_dir: Path, outcome: TrialOutcome) -> None:
    """Write `trials/<trial_id>/outcome.json`; what the trial would have needed to go on is removed."""
    directory = trials_dir / outcome.config.trial_id
    text = json.dumps(asdict(outcome), indent=1) + "\n"
    write_whole(directory / OUTCOME, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    (directory / CHECKPOINT).unlink(missing_ok=True)


def read_outcomes(trials_dir: Path) -> dict[str, TrialOutcome]:
    """Every outcome on file, of trials and of repetitions, by trial id."""
    outcomes = (TrialOutcome.read(path) for path in trials_dir.glob(f"*/{OUTCOME}"))
    return {outcome.config.trial_id: outcome for outcome in outcomes}


def remove_checkpoints(trials_dir: Path, outcomes: Iterable[TrialOutcome]) -> None:
    """Remove what trials that are over have kept to go on: an actor may write once more while it is stopped."""
    for outcome in outcomes:
        (trials_dir / outcome.config.trial_id / CHECKPOINT).unlink(missing_ok=True)


def recovered_outcome(trial: FrozenTrial, trials_dir: Path) -> TrialOutcome:
    """The outcome of a trial that Optuna was told the end of just before the driver died, from its history.

    Args:
        trial: Optuna's, over, with the user attribute `config`.
        trials_dir: `studies/<study_id>/trials`.
    """
    config = TrialConfig(**trial.user_attrs["config"])
    directory = trials_dir / config.trial_id
    try:
        history = json.loads((directory / "history.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        history = []
    last: dict[str, Any] = dict(history[-1]) if history else {}
    if trial.state == TrialState.COMPLETE:
        last["stopped_by"] = "budget" if last.get("epoch") == config.epochs else "patience"
    crash = "the driver died before it could write the reason down" if trial.state == TrialState.FAIL else ""
    return outcome_of(config, last, directory, sum(row["seconds"] for row in history), crash)
