"""A study's tracker: it takes what happens on the driver and never makes it wait."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from lowrank_tune.errors import TrackingError, redact
from lowrank_tune.records import Comparison, TrialConfig, TrialOutcome
from lowrank_tune.spec.plan import Plan
from lowrank_tune.tracking.events import Compared, Epoch, EpochsEnded, RunStatus, StudyEnded, TrialEnded, TrialStarted
from lowrank_tune.tracking.store import probe, resolve_store, set_mlflow_defaults
from lowrank_tune.tracking.writer import Deliver, EventWriter


class StudyTracker:
    """Tracks one study in MLflow: a parent run, and a child a trial.

    As a context manager it ends every run with the status that the block ended with. A server is asked for the study's
    run at once, so that a refusal costs no training. A local database needs no such question: MLflow is then imported
    on a thread when the first trial starts, for importing it takes longer than starting that trial.

    Args:
        plan: the study.
        past: whether it is over and only looked at again; its run is then not told that the study goes on.

    Raises:
        TrackingError: the store does not answer, or refuses; raised by the constructor or on entering the block.
    """

    def __init__(self, plan: Plan, *, past: bool = False) -> None:
        set_mlflow_defaults()
        self._plan = plan
        self._past = past
        self.store = resolve_store(plan.spec.tracking.uri, plan.results)
        probe(self.store)
        self._writer = EventWriter(self._connect, _is_passing)
        self._deliver: Deliver | None = None

    def __enter__(self) -> Self:
        if not self.store.is_local:
            try:
                self._deliver = self._connect()
            except TrackingError:
                raise
            except Exception as error:
                raise TrackingError(
                    f"tracking server {self.store.shown} refuses the study: {redact(str(error))}; check its address "
                    "and credentials, or name another in tracking.uri"
                ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish("FINISHED")
        else:
            self.finish("FAILED" if issubclass(kind, Exception) else "KILLED")

    @property
    def problems(self) -> tuple[str, ...]:
        """What MLflow was not told and why, for people; empty when it knows everything."""
        problems = self._writer.problems
        remedy = f"the study's files have it all: `lowrank-tune reconcile {self._plan.study_id}` tells MLflow later"
        return (*problems, remedy) if problems else ()

    def trial_started(self, config: TrialConfig) -> None:
        """A trial begins; its run is found again, or made."""
        self._writer.put(TrialStarted(config, _now()))

    def trial_epoch(self, trial_id: str, epoch: int, metrics: dict[str, float]) -> None:
        """An epoch ended; `epoch` counts from 1."""
        self._writer.put(EpochsEnded(trial_id, (Epoch(epoch, dict(metrics), _now()),)))

    def trial_ended(self, outcome: TrialOutcome) -> None:
        """A trial is over, whichever way."""
        self._writer.put(TrialEnded(outcome, _now()))

    def log_comparison(self, comparison: Comparison, outcomes: Sequence[TrialOutcome], directory: Path) -> None:
        """Hand over the post-study work; it is delivered before `finish` returns.

        Args:
            comparison: the figures.
            outcomes: every trial's and every repetition's.
            directory: `studies/<study_id>`, where plots, report and study file lie.
        """
        self._writer.put(Compared(comparison, tuple(outcomes), directory, _now()))

    def finish(self, status: RunStatus | None) -> None:
        """Deliver what is left and end the runs; what a dead store did not take is in `problems` then.

        Args:
            status: the parent's, which keeps the time it ended at where it has that status already; trials that never
                ended are KILLED. None leaves all runs as they are.
        """
        if status is not None and (status == "FINISHED" or self._deliver is not None or self._writer.started):
            self._writer.put(StudyEnded(status, _now()))
        self._writer.close()

    def _connect(self) -> Deliver:
        if self._deliver is not None:
            return self._deliver
        from lowrank_tune.tracking.runs import StudyRuns

        runs = StudyRuns(self._plan, self.store)
        if not self._past:
            runs.begin()
        return runs.deliver


def _is_passing(error: Exception) -> bool:
    from lowrank_tune.tracking.runs import is_passing

    return is_passing(error)


def _now() -> int:
    return time.time_ns() // 1_000_000
