"""Repairs what MLflow holds of a study, from the study's own files.

Every trial writes its epochs and its outcome into its own folder before the tracker hears of them, so these files are
the spool: whatever a dead server or a killed driver kept from MLflow is still there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow.entities import Run

from lowrank_tune.records import Comparison, TrialConfig, TrialOutcome
from lowrank_tune.spec.plan import Plan
from lowrank_tune.tracking.events import Compared, Epoch, Repairs, RunStatus
from lowrank_tune.tracking.runs import StudyRuns
from lowrank_tune.tracking.store import probe, resolve_store, set_mlflow_defaults

_ENDED = {"FINISHED", "FAILED", "KILLED"}
_STATES: dict[str, RunStatus] = {"finished": "FINISHED", "failed": "FAILED"}
_INTERRUPTED = "interrupted: its study was stopped or killed before it ended"
_STOPPED_BY = "lowrank.stopped_by"


@dataclass(frozen=True, slots=True)
class _OnFile:
    """A trial as its own folder tells of it."""

    config: TrialConfig
    epochs: tuple[Epoch, ...]
    outcome: TrialOutcome | None
    at: int


def reconcile(plan: Plan, comparison: Comparison | None = None) -> Repairs:
    """Make MLflow hold what a study's files hold: a run a trial, every epoch once, and no run that runs for ever.

    Nothing is told twice, and a second reconciliation changes nothing. A trial without an outcome on file is KILLED: no
    process trains it any more. So no other process may be at work on the study: the caller claims it.

    Args:
        plan: the study.
        comparison: its post-study figures, when it has any.

    Raises:
        TrackingError: the store does not answer.
    """
    set_mlflow_defaults()
    store = resolve_store(plan.spec.tracking.uri, plan.results)
    probe(store)
    runs = StudyRuns(plan, store)
    repairs = Repairs()
    found = _first_of_each(runs, repairs)
    on_file = {trial.config.trial_id: trial for trial in _read_trials(plan.study_dir / "trials")}
    for trial in on_file.values():
        _repair_trial(runs, trial, found.get(trial.config.trial_id), repairs)
    for trial_id, run in found.items():
        if trial_id not in on_file and run.info.status not in _ENDED:
            runs.kill(run.info.run_id, _INTERRUPTED, run.info.start_time)
            repairs.runs_ended += 1
    _repair_parent(runs, plan, comparison, repairs)
    return repairs


def _first_of_each(runs: StudyRuns, repairs: Repairs) -> dict[str, Run]:
    """The run of each trial; of several the first, for the others are deleted."""
    found: dict[str, Run] = {}
    for run in runs.runs():
        trial_id = run.data.tags.get("lowrank.trial_id")
        if trial_id is None:
            continue
        if trial_id in found:
            runs.client.delete_run(run.info.run_id)
            repairs.runs_removed += 1
        else:
            found[trial_id] = run
    return found


def _repair_trial(runs: StudyRuns, trial: _OnFile, run: Run | None, repairs: Repairs) -> None:
    if run is None:
        run_id = runs.start_trial(trial.config, trial.epochs[0].at if trial.epochs else trial.at)
        repairs.runs_made += 1
    else:
        run_id = run.info.run_id
        runs.know(run_id)
    repairs.epochs_added += runs.log_epochs(run_id, trial.epochs)
    status, tags = (run.info.status, run.data.tags) if run else ("RUNNING", {})
    if trial.outcome is not None:
        expected = "FAILED" if trial.outcome.status == "failed" else "FINISHED"
        if status != expected or tags.get(_STOPPED_BY) != trial.outcome.stopped_by:
            runs.end_trial(run_id, trial.outcome, trial.at)
            repairs.runs_ended += 1
    elif status not in _ENDED:
        runs.kill(run_id, _INTERRUPTED, trial.at)
        repairs.runs_ended += 1


def _repair_parent(runs: StudyRuns, plan: Plan, comparison: Comparison | None, repairs: Repairs) -> None:
    parent = runs.client.get_run(runs.parent)
    if comparison is not None:
        repairs.comparison_added = _repair_comparison(runs, plan, parent, comparison)
    expected, at = _study_status(plan.study_dir)
    if parent.info.status != expected:
        runs.client.set_terminated(runs.parent, status=expected, end_time=at)
        repairs.runs_ended += 1


def _repair_comparison(runs: StudyRuns, plan: Plan, parent: Run, comparison: Comparison) -> bool:
    # MLflow's model side takes another second to import.
    from lowrank_tune.tracking.comparison import has_comparison, log_comparison

    register = plan.spec.tracking.register_as
    if has_comparison(runs.client, parent, comparison, register):
        return False
    outcomes = tuple(trial.outcome for trial in _read_trials(plan.study_dir / "trials") if trial.outcome)
    event = Compared(comparison, outcomes, plan.study_dir, _moment(Path(comparison.per_image_path)))
    log_comparison(runs.client, runs.parent, runs.children, event, register)
    return True


def _study_status(study_dir: Path) -> tuple[RunStatus, int]:
    """How the study ended; one that still calls itself running, while nobody runs it, was killed."""
    path = study_dir / "status.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))["state"]
    except FileNotFoundError:
        return "KILLED", _moment(study_dir)
    return _STATES.get(state, "KILLED"), _moment(path)


def _read_trials(trials_dir: Path) -> Iterator[_OnFile]:
    for path in sorted(trials_dir.glob("*/config.json")):
        config = TrialConfig(**_read(path))
        history_path, outcome_path = path.with_name("history.json"), path.with_name("outcome.json")
        rows: list[dict[str, float]] = _read(history_path) if history_path.is_file() else []
        outcome = TrialOutcome.read(outcome_path) if outcome_path.is_file() else _ended(config, rows, path.parent)
        at = _moment(outcome_path if outcome_path.is_file() else path)
        yield _OnFile(config, tuple(_epochs(rows, _moment(path))), outcome, at)


def _epochs(rows: list[dict[str, float]], ended_at: int) -> Iterator[Epoch]:
    """The epochs with the moments they ended at, counted back from the last one's."""
    left = sum(row["seconds"] for row in rows)
    for row in rows:
        left -= row["seconds"]
        yield Epoch(int(row["epoch"]), row, ended_at - round(1000 * left))


def _ended(config: TrialConfig, rows: list[dict[str, float]], directory: Path) -> TrialOutcome | None:
    """The outcome of a training that ended by itself just before its driver died; None for one that had not ended."""
    if not rows:
        return None
    last = rows[-1]
    ended = config.ends_at(int(last["epoch"]), int(last["best_epoch"]))
    if ended is None:
        return None
    best = {name: last[f"best_{name}"] for name in ("val_mse", "val_token_cosine", "val_residual_ratio")}
    seconds = sum(row["seconds"] for row in rows)
    return TrialOutcome(
        config, "finished", ended, int(last["epoch"]), int(last["best_epoch"]), best, str(directory), seconds
    )


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _moment(path: Path) -> int:
    return path.stat().st_mtime_ns // 1_000_000
