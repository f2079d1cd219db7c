"""What Tune's driver sees of the trials, passed on to whoever watches; nothing that a watcher does can stop a study."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ray.tune import Callback
from ray.tune.experiment import Trial

from lowrank_tune.records import TrialConfig, TrialOutcome, TrialTracker
from lowrank_tune.trials.outcome import outcome_of

logger = logging.getLogger(__name__)

EPOCH_METRICS = (
    "epoch",
    "train_loss",
    "val_mse",
    "val_token_cosine",
    "val_residual_ratio",
    "lr",
    "seconds",
    "best_epoch",
    "best_val_mse",
    "best_val_token_cosine",
    "best_val_residual_ratio",
)


class TrialListener(Protocol):
    """Whoever shows a study's progress."""

    def trial_epoch(self, metrics: dict[str, Any]) -> None:
        """An epoch ended: its figures as `Trainer.step` gives them, and `trial_id`."""

    def trial_ended(self, outcome: TrialOutcome) -> None:
        """A trial is over."""


@dataclass(frozen=True, slots=True)
class Audience:
    """Who is told of a study's trials.

    Attributes:
        trials_dir: `studies/<study_id>/trials`.
        tracker: told first.
        listener: told next, when there is one.
        outcomes: of the trials that are over, by trial id.
    """

    trials_dir: Path
    tracker: TrialTracker
    listener: TrialListener | None = None
    outcomes: dict[str, TrialOutcome] = field(default_factory=dict)


@contextmanager
def told_to(audience: Audience) -> Iterator[str]:
    """Let the callback of a study that is run in this block tell `audience`.

    Yields:
        What RAY_TUNE_CALLBACKS must hold. A callback that Tuner is handed as an object makes Ray import MLflow, only to
        count it in its usage statistics: two seconds before the first trial.
    """
    token = _AUDIENCE.set(audience)
    try:
        yield f"{WatchTrials.__module__}.{WatchTrials.__name__}"
    finally:
        _AUDIENCE.reset(token)


class WatchTrials(Callback):
    """Tells its audience of every trial's start, epochs and end; Tune makes it by its name."""

    def __init__(self) -> None:
        self._audience = _AUDIENCE.get()
        self._seconds: dict[str, float] = {}
        self._epochs: dict[str, int] = {}

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial has an actor to run on."""
        _tell(self._audience.tracker.trial_started, _config(trial))

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """An epoch ended."""
        trial_id = _config(trial).trial_id
        metrics = {key: result[key] for key in EPOCH_METRICS if key in result}
        # Tune's own clock would count the imports of an actor's first trial as training.
        self._seconds[trial_id] = result["trained_seconds"]
        if metrics["epoch"] <= self._epochs.get(trial_id, 0):
            # A retry begins at its checkpoint, which may lie some epochs back.
            return
        self._epochs[trial_id] = int(metrics["epoch"])
        _tell(self._audience.tracker.trial_epoch, trial_id, int(result["epoch"]), metrics)
        if self._audience.listener is not None:
            _tell(self._audience.listener.trial_epoch, {"trial_id": trial_id, **metrics})

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial is over by its own word or the scheduler's."""
        self._end(trial, crash="")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial's process raised or died."""
        self._end(trial, crash=_crash(trial))

    def _end(self, trial: Trial, crash: str) -> None:
        config, last = _config(trial), trial.last_result or {}
        directory = self._audience.trials_dir / config.trial_id
        outcome = outcome_of(config, last, directory, self._seconds.pop(config.trial_id, 0.0), crash)
        self._epochs.pop(config.trial_id, None)
        self._audience.outcomes[config.trial_id] = outcome
        _tell(self._audience.tracker.trial_ended, outcome)
        if self._audience.listener is not None:
            _tell(self._audience.listener.trial_ended, outcome)
        _forget(trial)


def _forget(trial: Trial) -> None:
    """Let go of what Tune keeps of each trial until its very end: most of what a driver grows by."""
    # What an actor answered when it was asked where it is; Ray keeps the answer and its task for as long as this lives.
    trial._default_result_or_future = None
    trial.run_metadata.metric_analysis.clear()
    trial.run_metadata.metric_n_steps.clear()


_AUDIENCE: ContextVar[Audience] = ContextVar("audience")


def _config(trial: Trial) -> TrialConfig:
    return TrialConfig(**trial.config["trial"])


def _tell(hear: Callable[..., None], *said: Any) -> None:
    try:
        hear(*said)
    except Exception:
        logger.exception("a watcher of the trials failed; the study goes on")


def _crash(trial: Trial) -> str:
    """The line of Tune's error file that says what happened: a traceback's last, else the message's first."""
    try:
        lines = [line.strip() for line in Path(trial.error_file).read_text(encoding="utf-8").splitlines()]
    except (OSError, TypeError):
        return "its process died"
    # Tune opens the file with a heading of its own.
    said = [line for line in lines if line][1:]
    traceback = any(line.startswith(("Traceback", "File ", "ray::")) for line in said)
    return said[-1 if traceback else 0] if said else "its process died"
