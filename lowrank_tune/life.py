"""What becomes of a study after its start: it is gone on with, extended, or cloned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lowrank_tune.cluster.directory import (
    Lineage,
    extended_plan,
    find_study,
    read_plan,
    record_extension,
    results_directory,
    spec_difference,
)
from lowrank_tune.cluster.status import claimed, read_status
from lowrank_tune.errors import InputError
from lowrank_tune.features.pipeline import probe_shape
from lowrank_tune.progress import StudyProgress
from lowrank_tune.spec.loading import load_study, parse_study
from lowrank_tune.study import Given, StudyResult, carry_out, check_ranks, plan_study, repair_tracking
from lowrank_tune.trials.widening import widen_journal


def resume_study(
    study_id: str,
    *,
    results: str | Path | None = None,
    address: str | None = None,
    progress: StudyProgress | None = None,
) -> StudyResult:
    """Go on with a study that was stopped, or that failed: its features, trials and repetitions are not made again.

    Trials that are over stay over; those that were being trained go on from their last checkpoint; the search goes on
    as it would have. A study whose trials are all over is compared and reported anew.

    Args:
        study_id: its id, or the beginning of it.
        results: as for `run_study`.
        address: as for `run_study`.
        progress: as for `run_study`.

    Raises:
        InputError: there is no such study, another process works on it, or its images have changed.
        StudyFailedError: no trial gave a model.
        TrackingError: the MLflow server does not answer.
    """
    return carry_out(read_plan(find_study(results_directory(results), study_id)), address, progress)


def extend_study(
    study_id: str,
    *,
    trials: int = 0,
    overrides: Sequence[str] = (),
    results: str | Path | None = None,
    address: str | None = None,
    progress: StudyProgress | None = None,
) -> StudyResult:
    """Add trials to a finished study; searcher and scheduler know the old ones, and all are compared anew.

    Args:
        study_id: as for `resume_study`.
        trials: how many to add; a grid grows with its space instead.
        overrides: `key.path=value` texts, such as a wider `search.space`.
        results: as for `run_study`.
        address: as for `run_study`.
        progress: as for `run_study`.

    Raises:
        InputError: it is not finished, nothing would be added, or what changes would make its trials incomparable.
        StudyFailedError: no trial gave a model.
        TrackingError: the MLflow server does not answer.
    """
    directory = find_study(results_directory(results), study_id)
    with claimed(directory):
        state = read_status(directory, ours=True)["state"]
        if state != "finished":
            raise InputError(f"study {directory.name}: it is {state}; `lowrank-tune resume` comes before `extend`")
        before = read_plan(directory)
        plan = extended_plan(before, trials, overrides)
        check_ranks(plan.spec, *probe_shape(plan.spec.features, plan.features_root, plan.spec.seed))
        widen_journal(plan, directory / "tune" / "optuna.journal")
        record_extension(before, plan, overrides)
    return carry_out(plan, address, progress)


def clone_study(
    study_id: str,
    *,
    overrides: Sequence[str] = (),
    results: str | Path | None = None,
    address: str | None = None,
    progress: StudyProgress | None = None,
    new_id: str = "",
) -> StudyResult:
    """Run a new study with another one's file and some other values; it remembers its parent and the difference.

    Args:
        study_id: the parent's id, or the beginning of it.
        overrides: `key.path=value` texts laid over the parent's file.
        results: as for `run_study`.
        address: as for `run_study`.
        progress: as for `run_study`.
        new_id: as for `run_study`.

    Raises:
        InputError: there is no such study, or something in its file, the data or the results must be changed.
        StudyFailedError: no trial gave a model.
        TrackingError: the MLflow server does not answer.
    """
    directory = find_study(results_directory(results), study_id)
    text = (directory / "study.resolved.yaml").read_text(encoding="utf-8")
    spec = parse_study(text, directory.name, overrides)
    lineage = Lineage(directory.name, spec_difference(load_study(directory / "study.resolved.yaml"), spec))
    plan = plan_study(spec, results, new_id)
    return carry_out(plan, address, progress, Given(text, tuple(overrides), lineage))


def reconcile_study(study_id: str, results: str | Path | None = None) -> dict[str, Any]:
    """Make MLflow hold what a study's own files hold.

    Args:
        study_id: its id, or the beginning of it.
        results: as for `run_study`.

    Returns:
        `study_id` and what was repaired, as `Repairs` counts it, fit for JSON.

    Raises:
        InputError: there is no such study, its files are damaged, or a process works on it and tells MLflow itself.
        TrackingError: the store does not answer.
    """
    directory = find_study(results_directory(results), study_id)
    plan = read_plan(directory)
    with claimed(directory):
        return {"study_id": plan.study_id, **asdict(repair_tracking(plan))}
