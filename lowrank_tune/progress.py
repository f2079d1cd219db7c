"""What a study tells while it runs."""

from __future__ import annotations

from typing import Any

from lowrank_tune.cluster.status import StatusFile
from lowrank_tune.records import TrialOutcome


class StudyProgress:
    """What a study tells while it runs; each method may be overridden, and none needs to be."""

    def stage(self, text: str) -> None:
        """A new part of the story begins."""

    def images(self, done: int, total: int) -> None:
        """So many of the images that the cache lacked are in it now."""

    def trials(self, total: int) -> None:
        """So many trainings begin: the search's trials, then the repetitions of its best."""

    def trial_epoch(self, metrics: dict[str, Any]) -> None:
        """A trial finished an epoch: its `trial_id`, `epoch` and figures."""

    def trial_ended(self, outcome: TrialOutcome) -> None:
        """A trial is over."""


class Told(StudyProgress):
    """Passes on what happens, and puts the part of the story at work into status.json."""

    def __init__(self, progress: StudyProgress, status: StatusFile) -> None:
        self._progress = progress
        self._status = status
        self.images, self.trials = progress.images, progress.trials  # type: ignore[method-assign]
        self.trial_epoch, self.trial_ended = progress.trial_epoch, progress.trial_ended  # type: ignore[method-assign]

    def stage(self, text: str) -> None:
        """Put it into status.json as well."""
        self._status.update(stage=text)
        self._progress.stage(text)
