"""A study's folder: what is written at its start, and what a later process reads back to go on with it."""

from __future__ import annotations

import json
import os
import re
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import psutil
from filelock import FileLock, Timeout

from lowrank_tune.config.loading import load_study
from lowrank_tune.config.plan import Plan, extend_plan, make_plan, plan_summary
from lowrank_tune.config.render import render_study
from lowrank_tune.config.schema import StudySpec
from lowrank_tune.errors import InputError, redact
from lowrank_tune.files import results_place
from lowrank_tune.records import TrialConfig, TrialOutcome, TrialTracker

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass(frozen=True, slots=True)
class Lineage:
    """Where a study comes from.

    Attributes:
        parent: the study that it is a clone of; empty for one of its own.
        difference: by key of the study file, what the parent had and what this one has.
    """

    parent: str = ""
    difference: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)


def results_directory(results: str | Path | None) -> Path:
    """The results directory, made when missing.

    Args:
        results: a path; `LOWRANK_TUNE_RESULTS`, else `./results`, when None.

    Raises:
        InputError: it cannot be made or written to.
    """
    path = results_path(results)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(
            f"results directory {path}: cannot write to it ({error.strerror}); "
            "pass --results DIR or set LOWRANK_TUNE_RESULTS"
        ) from None
    return path


def results_path(results: str | Path | None) -> Path:
    """Where the results directory is, whether or not this machine sees it.

    Args:
        results: as for `results_directory`.

    Raises:
        InputError: it is no path.
    """
    name = results_place(results)
    if "://" in name:
        raise InputError(
            f"results directory {name}: only local and mounted paths can be used; mount it, or pass --results DIR"
        )
    return Path(os.path.abspath(Path(name).expanduser()))


def check_id(name: str) -> str:
    """Return a study's id, or the beginning of one.

    Raises:
        InputError: it could not be one; nothing outside the results directory is ever looked at.
    """
    if not _ID.fullmatch(name):
        raise InputError(
            f"study {name!r}: no study's id, which has letters, digits, `-` and `_`; see `lowrank-tune list`"
        )
    return name


def find_study(results: Path, name: str) -> Path:
    """The folder of the one study whose id is, or begins with, `name`.

    Raises:
        InputError: there is none, or several.
    """
    check_id(name)
    root = results / "studies"
    known = sorted(path.parent.name for path in root.glob("*/plan.json"))
    found = [name] if name in known else [study_id for study_id in known if study_id.startswith(name)]
    if len(found) != 1:
        shown = ", ".join(found or known[-10:]) or "none"
        what = "several begin so" if found else f"not in {results} (--results names another)"
        raise InputError(f"study {name}: {what}; studies: {shown}")
    return root / found[0]


def create_study(plan: Plan, given: str, overrides: Sequence[str], lineage: Lineage) -> None:
    """Make a study's folder with what it was given.

    Args:
        plan: the study.
        given: the study file's text.
        overrides: what was laid over it.
        lineage: where it comes from.

    Raises:
        InputError: there is a study of this id already.
    """
    directory = plan.study_dir
    try:
        directory.mkdir(parents=True)
    except FileExistsError:
        raise InputError(
            f"study {plan.study_id}: {directory} is there already; go on with it by `resume`, or begin again, which "
            "draws another id"
        ) from None
    (directory / "study.yaml").write_text(given, encoding="utf-8")
    record: dict[str, Any] = {"overrides": list(overrides), "parent": lineage.parent, "extensions": []}
    if lineage.parent:
        record["difference"] = {key: list(values) for key, values in lineage.difference.items()}
    _write_plan(plan, record)


def read_plan(directory: Path) -> Plan:
    """The plan of a study that has begun, extensions included.

    Raises:
        InputError: its files cannot be read.
    """
    record = _record(directory)
    spec = load_study(directory / "study.resolved.yaml")
    plan = make_plan(spec, directory.parent.parent, datetime.fromisoformat(record["started"]))
    return replace(
        plan,
        study_id=directory.name,
        study_dir=directory,
        spec_hash=record["spec_hash"],
        n_trials=record["n_trials"],
        grid=tuple(record["grid"]),
    )


def extended_plan(plan: Plan, trials: int, overrides: Sequence[str]) -> Plan:
    """A study with more trials; nothing is written.

    Args:
        plan: the study as it is.
        trials: how many to add, for random and tpe.
        overrides: `key.path=value` texts laid over its file.

    Raises:
        InputError: nothing would be added, or trials would not be comparable any more.
    """
    wanted = [*overrides, *([f"search.trials={plan.n_trials + trials}"] if trials else [])]
    return extend_plan(plan, load_study(plan.study_dir / "study.resolved.yaml", wanted))


def record_extension(before: Plan, after: Plan, overrides: Sequence[str]) -> None:
    """Write down that trials were added to a study, and which."""
    record = _record(after.study_dir)
    extension = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "trials_before": before.n_trials,
        "trials": after.n_trials,
        "overrides": list(overrides),
    }
    kept: dict[str, Any] = {key: record[key] for key in ("overrides", "parent", "difference") if key in record}
    _write_plan(after, {**kept, "extensions": [*record["extensions"], extension]})


def spec_difference(old: StudySpec, new: StudySpec) -> dict[str, tuple[Any, Any]]:
    """By key, what two studies have where they differ."""
    before, after = (dict(_leaves(spec.model_dump(mode="json"))) for spec in (old, new))
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return {key: (before.get(key), after.get(key)) for key in keys}


def lineage_of(directory: Path) -> dict[str, Any]:
    """A study's `parent` and `extensions`, as its plan.json holds them."""
    record = _record(directory)
    return {"parent": record.get("parent", ""), "extensions": record.get("extensions", [])}


def _leaves(tree: Any, path: str = "") -> list[tuple[str, Any]]:
    if not isinstance(tree, dict):
        return [(path, tree)]
    return [leaf for key, value in tree.items() for leaf in _leaves(value, f"{path}.{key}" if path else key)]


def _write_plan(plan: Plan, record: Mapping[str, Any]) -> None:
    _write(plan.study_dir / "study.resolved.yaml", render_study(plan.spec))
    _write(plan.study_dir / "plan.json", json.dumps({**plan_summary(plan), **record}, indent=2))


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _record(directory: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads((directory / "plan.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"study {directory.name}: {directory / 'plan.json'} cannot be read ({error})") from None
    return record


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
