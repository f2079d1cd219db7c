"""A study's folder: what is written at its start, its status, and what a later process reads back."""

from __future__ import annotations

import math
import os
import re
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import psutil
from filelock import FileLock, Timeout

from lowrank_tune.config.loading import load_past_study
from lowrank_tune.config.plan import Plan, extend_plan, make_plan, plan_summary
from lowrank_tune.config.render import render_study
from lowrank_tune.config.schema import StudySpec
from lowrank_tune.errors import InputError, redact
from lowrank_tune.files import is_uri, read_fields, read_json, results_place, write_json, write_text
from lowrank_tune.notes import read_notes
from lowrank_tune.records import FIGURES, StoppedFor, TrialConfig, TrialOutcome, TrialTracker, leading
from lowrank_tune.trials.outcomes import read_outcomes

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def results_directory(results: str | Path | None) -> Path:
    """The results directory, made when missing, and writable."""
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
    """Where the results directory is, whether or not this machine sees it; an address is refused."""
    name = results_place(results)
    if is_uri(name):
        raise InputError(
            f"results directory {redact(name)}: only local and mounted paths can be used; mount it, or pass "
            "--results DIR"
        )
    return Path(name)


def check_id(name: str) -> str:
    """Return a study's id, or the beginning of one; nothing outside the results directory is ever looked at."""
    if not _ID.fullmatch(name):
        raise InputError(
            f"study {name!r}: no study's id, which has letters, digits, `-` and `_`; see `lowrank-tune list`"
        )
    return name


def study_folders(results: Path) -> list[Path]:
    """The folders of the studies that are there, by id; one that is being removed is none of them."""
    found = (path.parent for path in (results / "studies").glob("*/plan.json"))
    return sorted(directory for directory in found if _ID.fullmatch(directory.name))


def find_study(results: Path, name: str) -> Path:
    """The folder of the one study whose id is, or begins with, `name`."""
    check_id(name)
    root = results / "studies"
    known = [directory.name for directory in study_folders(results)]
    found = [name] if name in known else [study_id for study_id in known if study_id.startswith(name)]
    if len(found) != 1:
        shown = ", ".join(found or known[-10:]) or "none"
        what = "several begin so" if found else f"not in {results} (--results names another)"
        raise InputError(f"study {name}: {what}; studies: {shown}")
    return root / found[0]


def create_study(
    plan: Plan,
    text: str,
    overrides: Sequence[str] = (),
    *,
    parent: str = "",
    difference: Mapping[str, tuple[Any, Any]] | None = None,
) -> None:
    """Make a study's folder: its file, what was laid over it and, for a clone, what the parent had otherwise.

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
    write_text(directory / "study.yaml", text)
    from_parent = {"difference": difference} if parent else {}
    _write_plan(plan, {"overrides": list(overrides), "parent": parent, "extensions": [], **from_parent})


def read_plan(directory: Path) -> Plan:
    """The plan of a study that has begun, extensions included."""
    record = _read_record(directory)
    spec = load_past_study(directory / "study.resolved.yaml")
    plan = make_plan(spec, directory.parent.parent, datetime.fromisoformat(record["started"]))
    kept = {name: record[name] for name in ("spec_hash", "n_trials")}
    first = tuple(record.get("first", ()))  # older studies had none
    return replace(plan, study_id=directory.name, study_dir=directory, grid=tuple(record["grid"]), first=first, **kept)


def extended_plan(plan: Plan, trials: int, overrides: Sequence[str]) -> Plan:
    """A study with more trials, or a wider grid; errors as `extend_plan`."""
    wanted = [*overrides, *([f"search.trials={plan.n_trials + trials}"] if trials else [])]
    return extend_plan(plan, load_past_study(plan.study_dir / "study.resolved.yaml", wanted))


def record_extension(before: Plan, after: Plan, overrides: Sequence[str]) -> None:
    record = _read_record(after.study_dir)
    extension = {"at": _now(), "trials_before": before.n_trials, "trials": after.n_trials, "overrides": [*overrides]}
    kept: dict[str, Any] = {key: record[key] for key in ("overrides", "parent", "difference") if key in record}
    _write_plan(after, {**kept, "extensions": [*record["extensions"], extension]})


def spec_difference(old: StudySpec, new: StudySpec) -> dict[str, tuple[Any, Any]]:
    """By key, what two studies have where they differ."""
    before, after = (dict(_leaves(spec.model_dump(mode="json"))) for spec in (old, new))
    return {k: (before.get(k), after.get(k)) for k in {**before, **after} if before.get(k) != after.get(k)}


def _leaves(tree: Any, path: str = "") -> list[tuple[str, Any]]:
    if not isinstance(tree, dict):
        return [(path, tree)]
    return [leaf for key, value in tree.items() for leaf in _leaves(value, f"{path}.{key}" if path else key)]


def _write_plan(plan: Plan, record: Mapping[str, Any]) -> None:
    write_text(plan.study_dir / "study.resolved.yaml", render_study(plan.spec))
    write_json(plan.study_dir / "plan.json", {**plan_summary(plan), **record}, indent=2)


def _read_record(directory: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = read_json(directory / "plan.json")
    except (OSError, ValueError) as error:
        raise InputError(f"study {directory.name}: {directory / 'plan.json'} cannot be read ({error})") from None
    return record


State = Literal["pending", "running", "stopped", "finished", "failed"]
OVER: tuple[State, ...] = ("stopped", "finished", "failed")
JOB_VARIABLE = "LOWRANK_TUNE_JOB"
"""The environment variable by which a submitted driver knows its job."""

READY = "study {study_id}: ready"
"""The line by which a driver tells that its data, cluster, results and tracking are sound, and its study has begun."""

_WRITE_EVERY_S = 1.0
_CLAIM_PATIENCE_S = 2.0  # a reader holds the lock for an instant
_LOCK, _STATUS = ".driver.lock", "status.json"
_DIED = "its driver died without a word; go on with `lowrank-tune resume {study_id}`"


class Status(TrialTracker):
    """status.json of a claimed study, written once a second: its state, stage and, as an observer, trials.

    As a context manager it tells how the block ended.
    """

    def __init__(self, directory: Path, trials: int, known: Iterable[TrialOutcome] = ()) -> None:
        self._path = directory / _STATUS
        before = read_fields(directory / _STATUS)
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
            "stopped_for": None,
            "stopped_why": "",
            "searched_s": before.get("searched_s", 0.0),
            "untracked": [],
        }
        self._search_began = math.inf
        self._trials, self._repeats, self._repeated = trials, 0, frozenset[str]()
        self._running: dict[str, TrialConfig] = {}
        self._ended: dict[str, TrialOutcome] = {}
        self._best: dict[int, dict[str, Any]] = {}
        for outcome in known:
            self._count(outcome)
        self._ended_before, self._began = len(self._ended), 0.0
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep_writing, name="status-writer", daemon=True)

    def __enter__(self) -> Self:
        self._write()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        stopped = isinstance(error, KeyboardInterrupt | SystemExit)
        self._over.set()
        self._thread.join()
        self._running.clear()
        self._fields |= {"state": "finished" if error is None else "stopped" if stopped else "failed", "ended": _now()}
        self._fields["reason"] = "" if error is None else redact(str(error))
        self._write()

    @property
    def trials_left(self) -> int:
        return self._trials - sum(not outcome.config.confirms for outcome in self._ended.values())

    def update(self, **fields: Any) -> None:
        """Change what the file tells within a second."""
        with self._lock:
            self._fields |= fields

    def searched_s(self) -> float:
        """Seconds that the search has taken, over all goes; the first call begins this one's."""
        self._search_began = min(self._search_began, time.monotonic())
        return float(self._fields["searched_s"]) + time.monotonic() - self._search_began

    def expect_confirmations(self, winners: Collection[str], total: int) -> None:
        """So many repetitions of these trials follow, or were made by earlier processes."""
        with self._lock:
            self._repeats, self._repeated = total, frozenset(winners)

    def trial_started(self, config: TrialConfig) -> None:
        with self._lock:
            self._began = self._began or time.monotonic()
            self._running[config.trial_id] = config

    def trial_epoch(self, trial_id: str, epoch: int, metrics: dict[str, float]) -> None:
        with self._lock:
            if trial_id in self._running:
                best = {name: metrics[f"best_{name}"] for name in FIGURES if f"best_{name}" in metrics}
                self._see(self._running[trial_id], best)

    def trial_ended(self, outcome: TrialOutcome) -> None:
        with self._lock:
            self._running.pop(outcome.config.trial_id, None)
            self._count(outcome)

    def search_ended(self, stopped_for: StoppedFor, told: str) -> None:
        self.update(stopped_for=stopped_for, stopped_why=told, searched_s=round(self.searched_s(), 1))
        self._search_began = math.inf
        self._write()  # the comparison reads it

    def _count(self, outcome: TrialOutcome) -> None:
        self._ended[outcome.config.trial_id] = outcome
        self._see(outcome.config, outcome.best)

    def _see(self, config: TrialConfig, figures: Mapping[str, float]) -> None:
        """Keep the best of each rank, as `residual_ratio`, or as what its trials have in place of it."""
        name = leading(figures)
        value, key = figures.get(name, math.nan), name.removeprefix("val_")
        # JSON can hold no NaN.
        if not config.confirms and math.isfinite(value) and config.excess(figures) == 0:
            found = {key: value, "trial_id": config.trial_id}
            self._best[config.rank] = min(self._best.get(config.rank, found), found, key=lambda best: best[key])

    def _keep_writing(self) -> None:
        while not self._over.wait(_WRITE_EVERY_S):
            self._write()

    def _write(self) -> None:
        with self._lock:
            fields = {**self._fields, "progress": self._progress(), "updated": _now()}
            if math.isfinite(self._search_began):
                fields["searched_s"] = round(self.searched_s(), 1)
        write_json(self._path, fields, indent=2)

    def _progress(self) -> dict[str, Any]:
        counts = _counts(self._ended.values(), self._repeated)
        here = len(self._ended) - self._ended_before
        left = self._trials - counts["done"] + self._repeats - counts["confirmed"]
        eta_s = round((time.monotonic() - self._began) / here * max(left, 0), 1) if here else None
        return {
            "trials": self._trials,
            "confirmations": self._repeats,
            **counts,
            "running": len(self._running),
            "best": {str(rank): self._best[rank] for rank in sorted(self._best)},
            "eta_s": eta_s if self._fields["state"] == "running" else None,
        }


def _counts(outcomes: Iterable[TrialOutcome], repeated: Collection[str] = ()) -> dict[str, int]:
    """How many trials are over, by their end, and how many repetitions: of these trials, where any are named."""
    ended = list(outcomes)
    ends = Counter(outcome.status for outcome in ended if not outcome.config.confirms)
    repeats = [outcome.config.confirms for outcome in ended if outcome.config.confirms]
    by_status = {"finished": ends["finished"], "pruned": ends["pruned"], "failed": ends["failed"]}
    confirmed = sum(not repeated or trial_id in repeated for trial_id in repeats)
    return {**by_status, "done": ends.total(), "confirmed": confirmed}


@contextmanager
def claimed(directory: Path) -> Iterator[None]:
    """Keep every other process from working on a study; the claim ends with this process, whichever way that ends.

    Raises:
        InputError: another process works on it.
    """
    try:
        claim = FileLock(directory / _LOCK).acquire(timeout=_CLAIM_PATIENCE_S)
    except Timeout:
        at_work = read_fields(directory / _STATUS)
        where = f"process {at_work.get('pid')} on {at_work.get('host')}"
        raise InputError(
            f"study {directory.name}: {where} works on it; `lowrank-tune stop {directory.name}` ends that"
        ) from None
    with claim:
        yield


def read_status(directory: Path, *, ours: bool = False) -> dict[str, Any]:
    """What status.json says, made true where its driver has died, with the study's `parent`, `extensions` and `notes`.

    `ours` says that this process has claimed the study, so that no driver works on it.
    """
    record = _read_record(directory)
    status = unbegun(directory.name) | read_fields(directory / _STATUS)
    if status["state"] == "running" and (ours or not _is_claimed(directory)):
        status |= read_fields(directory / _STATUS)  # it may just have ended
        if status["state"] == "running":
            # What a killed driver wrote last may be older than its trials' own files.
            status |= {"state": "failed", "reason": _DIED.format(study_id=directory.name)}
            counts = _counts(read_outcomes(directory / "trials").values())
            status["progress"] = {**status["progress"], **counts, "running": 0, "eta_s": None}
    lineage = {"parent": record.get("parent", ""), "extensions": record.get("extensions", [])}
    return status | lineage | {"notes": read_notes(directory)}


def search_told(directory: Path) -> tuple[str, ...]:
    """Why a study's search began no more trials, where that has to be said."""
    return tuple(filter(None, [read_fields(directory / _STATUS).get("stopped_why", "")]))


def unbegun(study_id: str) -> dict[str, Any]:
    empty: dict[str, Any] = {"started": None, "ended": None, "reason": "", "job": "", "stage": "", "progress": {}}
    empty |= {"stopped_for": None, "stopped_why": "", "untracked": [], "parent": "", "extensions": [], "notes": []}
    return {"study_id": study_id, "state": "pending", **empty}


def _is_claimed(directory: Path) -> bool:
    if not (directory / _LOCK).exists():
        return False
    try:
        with FileLock(directory / _LOCK, timeout=0):
            return False
    except (Timeout, OSError):
        # Where the folder cannot be written to, the file must be believed.
        return True


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
