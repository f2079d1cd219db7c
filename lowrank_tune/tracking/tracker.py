"""A study's tracker: it hears of what happens on the driver, and a thread tells MLflow of it from the files."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from lowrank_tune.config.plan import Plan
from lowrank_tune.errors import LowrankTuneError, TrackingError
from lowrank_tune.measured import Comparison
from lowrank_tune.records import TrialConfig, TrialOutcome, TrialTracker
from lowrank_tune.tracking.database import database_state
from lowrank_tune.tracking.reach import reach_store
from lowrank_tune.tracking.reconcile import Others, open_sync
from lowrank_tune.tracking.sync import RunStatus, StudySync, is_passing, reason_of
from lowrank_tune.trials.outcomes import read_trial

logger = logging.getLogger(__name__)

PATIENCE_S = 90.0
"""How long a study that is over waits for a store that is away; one at work waits for it however long that takes."""
PAUSE_S, _LONGEST_PAUSE_S = 1.0, 15.0
_COMPARISON, _STUDY = "/comparison", "/study"
"""What is told beside trials, after them; no trial's id has a slash."""


class Tracker(TrialTracker):
    """Tracks one study in MLflow: a parent run, and a child a trial.

    As a context manager it ends every run with the status that the block ended with. A server is asked for the study's
    run at once, so that a refusal costs no training; for a local database MLflow is imported on the thread, which takes
    longer than starting a trial.

    Raises:
        TrackingError: the store does not answer, or refuses; raised by the constructor or on entering the block.
    """

    def __init__(self, plan: Plan, others: Others = tuple) -> None:
        self.store = reach_store(plan.spec, plan.results)
        self._plan, self._others = plan, others
        self._sync: StudySync | None = None
        self._lock = threading.Lock()
        self._dirty: dict[str, None] = {}
        self._running: set[str] = set()
        self._failed: dict[str, str] = {}  # why something could not be told
        self._compared: tuple[Comparison, Sequence[TrialOutcome]] | None = None
        self._status: RunStatus = "RUNNING"
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self.store.database and database_state(self.store.database) == "older":
            open_sync(self._plan, self.store, self._others)  # brings it up to date, or says why not
        if not self.store.is_local:
            try:
                self._begin()
            except LowrankTuneError:
                raise
            except Exception as error:
                raise TrackingError(
                    f"tracking server {self.store.shown} refuses the study: {self.store.hide(error)}; check its "
                    "address and credentials, or name another in tracking.uri"
                ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._status = "FINISHED" if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED"
        left, self._running = self._running, set()
        # A study that fails before its first trial leaves no run in a local database.
        if kind is None or self._thread or self._sync:
            self._mark(*left, _STUDY)
        self._closing.set()
        if self._thread is not None:
            try:
                self._thread.join()
            except BaseException:  # a second Ctrl-C, while a store that is away is waited for
                self._failed.setdefault(_STUDY, "interrupted before all was told")
                raise

    @property
    def problems(self) -> tuple[str, ...]:
        """What MLflow was not told and why."""
        if not self._failed:
            return ()
        n, reasons = len(self._failed), list(dict.fromkeys(self._failed.values()))[:10]
        remedy = f"the study's files have it all: `lowrank-tune reconcile {self._plan.study_id}` tells MLflow later"
        return (f"{n} record{'s' * (n > 1)} could not be delivered", *reasons, remedy)

    def trial_started(self, config: TrialConfig) -> None:
        self._running.add(config.trial_id)
        self._mark(config.trial_id)

    def trial_epoch(self, trial_id: str, epoch: int, metrics: dict[str, float]) -> None:
        self._mark(trial_id)

    def trial_ended(self, outcome: TrialOutcome) -> None:
        self._running.discard(outcome.config.trial_id)
        self._mark(outcome.config.trial_id)

    def compared(self, comparison: Comparison, outcomes: Sequence[TrialOutcome]) -> None:
        """Tell of the comparison before the block ends."""
        self._compared = comparison, outcomes
        self._mark(_COMPARISON)

    def _mark(self, *keys: str) -> None:
        with self._lock:
            self._dirty |= dict.fromkeys(keys)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="mlflow-sync", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        pause = PAUSE_S
        while not self._closing.wait(pause):
            pause = min(2 * pause, _LONGEST_PAUSE_S) if self._tell_all() else PAUSE_S
        deadline, pause = time.monotonic() + PATIENCE_S, PAUSE_S
        self._mark(*self._failed)  # what was refused has its last chance
        told = False
        while away := self._tell_all():
            left = deadline - time.monotonic()
            if not told:
                logger.warning("MLflow is waited for, %.0f s at most: %s", left, away)
                told = True
            if left <= 0:
                self._failed |= dict.fromkeys(self._dirty, away)
                return
            time.sleep(min(pause, left))
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def _tell_all(self) -> str:
        """Tell all that is new; where the store is away, what is left stays for later, and why is returned."""
        with self._lock:
            keys = sorted(self._dirty, key=lambda key: (key == _STUDY, key == _COMPARISON))
            self._dirty = {}
        for done, key in enumerate(keys):
            try:
                self._tell(self._sync or self._begin(), key)
                self._failed.pop(key, None)
            except Exception as error:
                reason = reason_of(error)
                logger.debug("MLflow was not told of %s: %s", key, reason)
                if self._sync is not None:
                    self._sync.forget()
                if is_passing(error):
                    with self._lock:
                        self._dirty = dict.fromkeys(keys[done:]) | self._dirty
                    return reason
                self._failed[key] = reason
        return ""

    def _begin(self) -> StudySync:
        sync = open_sync(self._plan, self.store, self._others)
        sync.study("RUNNING", 0)
        self._sync = sync
        return sync

    def _tell(self, sync: StudySync, key: str) -> None:
        trials = self._plan.study_dir / "trials"
        if key == _STUDY:
            # An answer may have been lost, and its request have been obeyed since.
            sync.forget()
            sync.without_files(folder.name for folder in trials.glob("*"))
            sync.study(self._status, time.time_ns() // 1_000_000)
        elif key == _COMPARISON and self._compared:
            sync.comparison(*self._compared)
        else:
            running = key in self._running  # before its files are read: it may end meanwhile
            if record := read_trial(trials / key):
                sync.trial(record, running)
