"""A study's tracker: it takes what happens on the driver and never makes it wait."""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from lowrank_tune.config.plan import Plan
from lowrank_tune.errors import TrackingError, redact
from lowrank_tune.records import Comparison, TrialConfig, TrialOutcome
from lowrank_tune.tracking.store import probe, resolve_store, set_mlflow_defaults

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


logger = logging.getLogger(__name__)

_REASON_LENGTH = 300

Deliver = Callable[[Event], None]


class EventWriter:
    """Delivers events one after another on a thread of its own.

    A delivery that fails for a passing reason is tried again, and the events behind it wait; one that fails for good is
    dropped and counted. At `close`, what still fails after `patience_s` is given up.

    Args:
        connect: makes the function that delivers an event; called on the thread, with the first event.
        is_passing: whether an error may go away by itself.
        pause_s: rest between deliveries, in which events gather to be sent together.
        patience_s: how long a closing writer keeps trying a store that does not answer.
    """

    def __init__(
        self,
        connect: Callable[[], Deliver],
        is_passing: Callable[[Exception], bool],
        *,
        pause_s: float = 0.5,
        patience_s: float = 90.0,
    ) -> None:
        self._connect = connect
        self._is_passing = is_passing
        self._pause_s = pause_s
        self._patience_s = patience_s
        self._queue: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._deliver: Deliver | None = None
        self._thread: threading.Thread | None = None
        self._given_up = False
        self._undelivered = 0
        self._reasons: list[str] = []

    @property
    def started(self) -> bool:
        """Whether any event was ever reported."""
        return self._thread is not None

    @property
    def problems(self) -> tuple[str, ...]:
        """What could not be delivered and why, for people; empty when all went well."""
        if not self._undelivered:
            return ()
        return (f"{self._undelivered} records could not be delivered", *self._reasons)

    def put(self, event: Event) -> None:
        """Report an event; returns at once."""
        self._queue.put(event)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="mlflow-writer", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Deliver what is left, or give it up, and end the thread."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            for event in coalesce(self._gather()):
                self._deliver_patiently(event)
            if self._closing.wait(self._pause_s) and self._queue.empty():
                return

    def _gather(self) -> list[Event]:
        events: list[Event] = []
        try:
            events.append(self._queue.get(timeout=self._pause_s))
            while True:
                events.append(self._queue.get_nowait())
        except queue.Empty:
            return events

    def _deliver_patiently(self, event: Event) -> None:
        wait, deadline = 1.0, math.inf
        while not self._given_up:
            try:
                self._deliver = self._deliver or self._connect()
                self._deliver(event)
                return
            except Exception as error:
                failure = error
            if not self._may_pass(failure):
                self._drop(failure)
                return
            logger.debug("tracking delayed: %s", redact(str(failure)))
            if self._closing.is_set():
                deadline = min(deadline, time.monotonic() + self._patience_s)
                self._given_up = time.monotonic() >= deadline
                if self._given_up:
                    self._drop(failure)
                    return
                time.sleep(min(wait, max(0.0, deadline - time.monotonic())))
            else:
                self._closing.wait(wait)
            wait = min(2 * wait, 15.0)
        self._undelivered += 1

    def _may_pass(self, failure: Exception) -> bool:
        try:
            return self._is_passing(failure)
        except Exception:
            logger.debug("cannot tell whether a failure may pass", exc_info=True)
            return False

    def _drop(self, error: Exception) -> None:
        self._undelivered += 1
        reason = redact(f"{type(error).__name__}: {error}".splitlines()[0])[:_REASON_LENGTH]
        if reason not in self._reasons and len(self._reasons) < 10:
            self._reasons.append(reason)
            logger.debug("tracking failed: %s", reason)


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
        from lowrank_tune.tracking.sync import StudyRuns

        runs = StudyRuns(self._plan, self.store)
        if not self._past:
            runs.begin()
        return runs.deliver


def _is_passing(error: Exception) -> bool:
    from lowrank_tune.tracking.sync import is_passing

    return is_passing(error)


def _now() -> int:
    return time.time_ns() // 1_000_000
