"""status.json: how a study stands, written by the process that works on it and read by everyone else.

    pending    submitted, its driver has not begun
    running    a driver works on it, and holds `.driver.lock`
    stopped    asked to stop: what was trained is kept, `resume` goes on
    finished   compared and reported
    failed     an error, or a driver that died; `resume` goes on where it can

A driver that is killed leaves `running` behind, but no lock: readers then say `failed`.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import psutil
from filelock import FileLock, Timeout

from lowrank_tune.cluster.directory import lineage_of
from lowrank_tune.errors import InputError, redact
from lowrank_tune.records import TrialConfig, TrialOutcome, TrialTracker

State = Literal["pending", "running", "stopped", "finished", "failed"]
OVER: tuple[State, ...] = ("stopped", "finished", "failed")
JOB_VARIABLE = "LOWRANK_TUNE_JOB"
"""The environment variable by which a submitted driver knows its job."""

READY = "study {study_id}: ready"
"""The line by which a driver tells that its cluster, results and tracking answer, and its study has begun."""

_WRITE_EVERY_S = 1.0
_CLAIM_PATIENCE_S = 2.0  # a reader holds the lock for an instant
_LOCK, _STATUS = ".driver.lock", "status.json"
_DIED = "its driver died without a word; go on with `lowrank-tune resume {study_id}`"


class StatusFile:
    """The status of a study that this process works on; written at most once a second, and at every change of state.

    Args:
        directory: the study's folder, claimed by this process.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / _STATUS
        before = _read(directory)
        self._fields: dict[str, Any] = {
            "study_id": directory.name,
            "state": "running",
            "started": before.get("started") or _now(),
            "resumed": _now() if before else None,
            "ended": None,
            "reason": "",
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "pid_started": psutil.Process().create_time(),
            "job": os.environ.get(JOB_VARIABLE, ""),
            "stage": "",
            "progress": before.get("progress", {}),
        }
        self._lock = threading.Lock()
        self._changed, self._ended = threading.Event(), threading.Event()
        self._write()
        self._thread = threading.Thread(target=self._keep_writing, name="status-writer", daemon=True)
        self._thread.start()

    def update(self, **fields: Any) -> None:
        """Change what the file tells; it is written soon."""
        with self._lock:
            self._fields |= fields
        self._changed.set()

    def end(self, state: State, reason: str = "") -> None:
        """Write how the study ended, and write no more."""
        self._ended.set()
        self._changed.set()
        self._thread.join()
        progress = {**self._fields["progress"], "running": 0, "eta_s": None} if self._fields["progress"] else {}
        self.update(state=state, reason=redact(reason), ended=_now(), progress=progress)
        self._write()

    def _keep_writing(self) -> None:
        while not self._ended.is_set():
            self._changed.wait()
            self._changed.clear()
            self._write()
            self._ended.wait(_WRITE_EVERY_S)

    def _write(self) -> None:
        with self._lock:
            text = json.dumps({**self._fields, "updated": _now()}, indent=2)
        partial = self._path.with_name(f"{_STATUS}.partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(self._path)


class StatusTracker:
    """A tracker that counts for status.json what it passes on to the study's own.

    Args:
        tracker: told everything as well.
        status: where the numbers go.
        trials: how many trials the study has.
        known: outcomes of earlier processes.
    """

    def __init__(
        self, tracker: TrialTracker, status: StatusFile, trials: int, known: Iterable[TrialOutcome] = ()
    ) -> None:
        self._tracker = tracker
        self._status = status
        self._running: dict[str, TrialConfig] = {}
        self._best: dict[int, dict[str, Any]] = {}
        self._confirmed: list[str] = []
        self._counts = {"trials": trials, "finished": 0, "pruned": 0, "failed": 0, "confirmations": 0, "confirmed": 0}
        self._ended_here, self._began = 0, time.monotonic()
        for outcome in known:
            self._count(outcome)
        self._tell()

    @property
    def left(self) -> int:
        """Trials that are not over."""
        counts = self._counts
        return counts["trials"] - counts["finished"] - counts["pruned"] - counts["failed"]

    def expect_confirmations(self, winners: Collection[str], total: int) -> None:
        """So many repetitions of these trials follow, those included that earlier processes made."""
        self._counts["confirmations"] = total
        self._counts["confirmed"] = sum(trial_id in winners for trial_id in self._confirmed)
        self._tell()

    def trial_started(self, config: TrialConfig) -> None:
        """Count it as running."""
        if not self._running and not self._ended_here:
            self._began = time.monotonic()
        self._running[config.trial_id] = config
        self._tell()
        self._tracker.trial_started(config)

    def trial_epoch(self, trial_id: str, epoch: int, metrics: dict[str, float]) -> None:
        """Look whether it is the best of its rank."""
        if trial_id in self._running:
            self._see(self._running[trial_id], metrics.get("best_val_residual_ratio"))
            self._tell()
        self._tracker.trial_epoch(trial_id, epoch, metrics)

    def trial_ended(self, outcome: TrialOutcome) -> None:
        """Count how it ended."""
        self._running.pop(outcome.config.trial_id, None)
        self._ended_here += 1
        self._count(outcome)
        self._tell()
        self._tracker.trial_ended(outcome)

    def _count(self, outcome: TrialOutcome) -> None:
        if outcome.config.confirms:
            self._confirmed.append(outcome.config.confirms)
        self._counts["confirmed" if outcome.config.confirms else outcome.status] += 1
        self._see(outcome.config, outcome.best.get("val_residual_ratio"))

    def _see(self, config: TrialConfig, ratio: float | None) -> None:
        best = self._best.get(config.rank)
        # `ratio > 0` is false of a NaN, which JSON cannot hold.
        if not config.confirms and ratio and ratio > 0 and (best is None or ratio < best["residual_ratio"]):
            self._best[config.rank] = {"residual_ratio": ratio, "trial_id": config.trial_id}

    def _tell(self) -> None:
        counts = self._counts
        left = self.left + counts["confirmations"] - counts["confirmed"]
        pace = (time.monotonic() - self._began) / self._ended_here if self._ended_here else None
        progress = {
            **counts,
            "done": counts["trials"] - self.left,
            "running": len(self._running),
            "best": {str(rank): self._best[rank] for rank in sorted(self._best)},
            "eta_s": None if pace is None else round(pace * max(left, 0), 1),
        }
        self._status.update(progress=progress)


@contextmanager
def working_on(directory: Path) -> Iterator[StatusFile]:
    """Work on a study: claim it, and keep its status true at the start and at every kind of end.

    Raises:
        InputError: another process works on it.
    """
    with claimed(directory):
        status = StatusFile(directory)
        try:
            yield status
        except BaseException as error:
            stopped = isinstance(error, KeyboardInterrupt | SystemExit)
            status.end("stopped" if stopped else "failed", reason=str(error))
            raise
        status.end("finished")


@contextmanager
def claimed(directory: Path) -> Iterator[None]:
    """Keep every other process from working on a study; the claim ends with this process, whichever way that ends.

    Raises:
        InputError: another process works on it.
    """
    lock = FileLock(directory / _LOCK)
    try:
        lock.acquire(timeout=_CLAIM_PATIENCE_S)
    except Timeout:
        at_work = _read(directory)
        where = f"process {at_work.get('pid')} on {at_work.get('host')}"
        raise InputError(
            f"study {directory.name}: {where} works on it; `lowrank-tune stop {directory.name}` ends that"
        ) from None
    try:
        yield
    finally:
        lock.release()


def read_status(directory: Path, *, ours: bool = False) -> dict[str, Any]:
    """What status.json says, made true where its driver has died, with the study's `parent` and `extensions`.

    Args:
        directory: the study's folder.
        ours: this process has claimed the study, so no driver works on it.

    Raises:
        InputError: there is no study in this folder.
    """
    status: dict[str, Any] = {
        "study_id": directory.name,
        "state": "pending",
        "started": None,
        "ended": None,
        "reason": "",
        "job": "",
    }
    lineage = lineage_of(directory)
    status |= _read(directory)
    if status["state"] == "running" and (ours or not _is_claimed(directory)):
        status |= _read(directory)  # it may just have ended
        if status["state"] == "running":
            status |= {"state": "failed", "reason": _DIED.format(study_id=directory.name)}
            status["progress"] = {**status.get("progress", {}), **_ended_trials(directory), "running": 0, "eta_s": None}
    return status | lineage


def unbegun(study_id: str) -> dict[str, Any]:
    """The status of a study that no driver has begun yet."""
    empty: dict[str, Any] = {"started": None, "ended": None, "reason": "", "job": "", "stage": "", "progress": {}}
    return {"study_id": study_id, "state": "pending", **empty, "parent": "", "extensions": []}


def _is_claimed(directory: Path) -> bool:
    if not (directory / _LOCK).exists():
        return False
    lock = FileLock(directory / _LOCK)
    try:
        lock.acquire(timeout=0)
    except (Timeout, OSError):
        # Where the folder cannot be written to, the file must be believed.
        return True
    lock.release()
    return False


def _ended_trials(directory: Path) -> dict[str, int]:
    """How many trials and repetitions are over by their own files: what a killed driver wrote last may be older."""
    outcomes = [json.loads(path.read_text(encoding="utf-8")) for path in directory.glob("trials/*/outcome.json")]
    search = Counter(outcome["status"] for outcome in outcomes if not outcome["config"]["confirms"])
    ends = {status: search[status] for status in ("finished", "pruned", "failed")}
    return {**ends, "done": search.total(), "confirmed": len(outcomes) - search.total()}


def _read(directory: Path) -> dict[str, Any]:
    try:
        fields: dict[str, Any] = json.loads((directory / _STATUS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return fields


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
