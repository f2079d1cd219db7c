"""What happened in a study, as a tracker is told it, each with the moment it happened.

The moment is part of the event: delivered twice, it says the same thing twice, which MLflow keeps once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lowrank_tune.records import Comparison, TrialConfig, TrialOutcome

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True, slots=True)
class TrialStarted:
    """A trial began; `at` is in milliseconds since 1970, as in every event here."""

    config: TrialConfig
    at: int


@dataclass(frozen=True, slots=True)
class Epoch:
    """One epoch's figures."""

    epoch: int
    metrics: dict[str, float]
    at: int


@dataclass(frozen=True, slots=True)
class EpochsEnded:
    """Epochs of one trial ended, oldest first."""

    trial_id: str
    epochs: tuple[Epoch, ...]


@dataclass(frozen=True, slots=True)
class TrialEnded:
    """A trial is over."""

    outcome: TrialOutcome
    at: int


@dataclass(frozen=True, slots=True)
class Compared:
    """The post-study work is done; its files lie in `directory`."""

    comparison: Comparison
    outcomes: tuple[TrialOutcome, ...]
    directory: Path
    at: int


@dataclass(frozen=True, slots=True)
class StudyEnded:
    """The study is over."""

    status: RunStatus
    at: int


Event = TrialStarted | EpochsEnded | TrialEnded | Compared | StudyEnded


@dataclass(slots=True)
class Repairs:
    """What a reconciliation changed; all zero where MLflow held the truth already.

    Attributes:
        runs_made: trials that MLflow did not know.
        runs_removed: second runs of one trial, which are deleted as MLflow's UI does and can be restored.
        runs_ended: runs whose status or reason was not the truth.
        epochs_added: epochs whose figures were missing.
        comparison_added: whether the post-study figures were missing.
    """

    runs_made: int = 0
    runs_removed: int = 0
    runs_ended: int = 0
    epochs_added: int = 0
    comparison_added: bool = False


def coalesce(events: Iterable[Event]) -> list[Event]:
    """Join the epochs of each trial that no other event of that trial stands between: one request instead of many."""
    joined: list[Event] = []
    open_at: dict[str, tuple[int, EpochsEnded]] = {}
    for event in events:
        if isinstance(event, EpochsEnded) and event.trial_id in open_at:
            index, earlier = open_at[event.trial_id]
            event = EpochsEnded(event.trial_id, earlier.epochs + event.epochs)
            joined[index] = event
            open_at[event.trial_id] = index, event
            continue
        if isinstance(event, EpochsEnded):
            open_at[event.trial_id] = len(joined), event
        elif isinstance(event, TrialStarted):
            open_at.pop(event.config.trial_id, None)
        elif isinstance(event, TrialEnded):
            open_at.pop(event.outcome.config.trial_id, None)
        joined.append(event)
    return joined
