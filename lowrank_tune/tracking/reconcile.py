"""MLflow is told again what it lacks of studies that no process works on: whole, or their post-study figures alone."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from lowrank_tune.config.plan import Plan
from lowrank_tune.errors import TrackingError
from lowrank_tune.files import read_fields
from lowrank_tune.measured import Comparison
from lowrank_tune.records import TrialOutcome
from lowrank_tune.tracking.database import database_fault, open_database
from lowrank_tune.tracking.moved import follow_artifacts
from lowrank_tune.tracking.reach import reach_store
from lowrank_tune.tracking.store import Store, resolve_store
from lowrank_tune.tracking.sync import Repairs, RunStatus, StudySync, is_passing, reason_of
from lowrank_tune.trials.outcomes import read_trials

logger = logging.getLogger(__name__)

_PAUSES_S = (1.0, 3.0, 9.0)
"""Before a store that was away is tried again."""

Others = Callable[[], Iterable[tuple[Plan, Comparison | None]]]
"""Gives the other studies of the results directory that no process works on, with their figures where they have any."""


def open_sync(plan: Plan, store: Store, others: Others = tuple) -> StudySync:
    """A study's way to MLflow; where its database had to be made anew, the other studies are told to it before."""

    def tell_others(fresh: Store) -> None:
        for other, comparison in others():
            try:
                if resolve_store(other.spec.tracking.uri, other.results) == store:
                    _repair(StudySync(other, fresh), other, comparison)
            except Exception as error:
                logger.warning("study %s: MLflow could not be told of it again (%s)", other.study_id, reason_of(error))

    open_database(store, tell_others)
    moved = follow_artifacts(store)
    sync = StudySync(plan, store)
    sync.repairs.artifacts_followed = moved
    return sync


def reconcile(plan: Plan, comparison: Comparison | None = None, others: Others = tuple) -> Repairs:
    """Make MLflow hold what a study's files hold: a run a trial, every epoch once, and no run that runs for ever.

    A second reconciliation changes nothing. A trial without an outcome on file is KILLED, so the caller claims the
    study.
    """
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    store = reach_store(plan.spec, plan.results)
    pauses = iter(_PAUSES_S)
    while True:
        try:
            return _repair(open_sync(plan, store, others), plan, comparison)
        except (MlflowException, RequestException, SQLAlchemyError) as error:
            pause = next(pauses, None)
            if pause is None or not is_passing(error):
                raise TrackingError(f"tracking store {store.shown}: {reason_of(error)}") from error
            time.sleep(pause)


def report_notes(plan: Plan) -> str:
    """Tell MLflow what people wrote down about a study, where it knows the study; returns why that failed, if so."""
    try:
        store = reach_store(plan.spec, plan.results)
        if store.database and (fault := database_fault(store.database)):
            return f"{store.shown}: {fault}"
        if not store.database or store.database.exists():
            open_sync(plan, store).notes()
    except Exception as error:
        return reason_of(error)
    return ""


def report_comparison(plan: Plan, comparison: Comparison, outcomes: Sequence[TrialOutcome]) -> str:
    """Tell MLflow an ended study's post-study figures and files; returns why that failed, if so."""
    try:
        store = reach_store(plan.spec, plan.results)
        fault = database_fault(store.database) if store.database else ""
        if fault:
            return f"{store.shown}: {fault}"
        sync = open_sync(plan, store)
        sync.comparison(comparison, outcomes)
        _end_study(sync, plan.study_dir, running="RUNNING")
    except Exception as error:
        return reason_of(error)
    return ""


def _repair(sync: StudySync, plan: Plan, comparison: Comparison | None) -> Repairs:
    records = read_trials(plan.study_dir / "trials")
    sync.without_files(record.config.trial_id for record in records)
    for record in records:
        sync.trial(record, running=False)
    if comparison is not None:
        sync.comparison(comparison, [record.outcome for record in records if record.outcome])
    # One that still calls itself running, while nobody runs it, was killed.
    _end_study(sync, plan.study_dir, running="KILLED")
    return sync.repairs


def _end_study(sync: StudySync, directory: Path, running: RunStatus) -> None:
    path = directory / "status.json"
    ended: dict[str, RunStatus] = {"finished": "FINISHED", "failed": "FAILED", "running": running}
    at = (path if path.is_file() else directory).stat().st_mtime_ns // 1_000_000
    sync.study(ended.get(read_fields(path).get("state", ""), "KILLED"), at)
