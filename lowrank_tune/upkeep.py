"""Repairs of what studies have left behind."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from lowrank_tune.comparison.store import read_comparison
from lowrank_tune.spec.stored import find_study, read_plan
from lowrank_tune.study import results_directory


def reconcile_study(study_id: str, results: str | Path | None = None) -> dict[str, Any]:
    """Make MLflow hold what a study's own files hold.

    Args:
        study_id: the study's id, or as much of its beginning as no other study shares.
        results: the results directory.

    Returns:
        `study_id` and what was repaired, as `Repairs` counts it, fit for JSON.

    Raises:
        InputError: there is no such study, its files are damaged, or a living process is at work on it.
        TrackingError: the store does not answer.
    """
    directory = find_study(results_directory(results), study_id)
    plan = read_plan(directory)
    comparison = read_comparison(directory) if (directory / "comparison.json").is_file() else None
    # It imports MLflow, which takes seconds: after everything that can be wrong at once.
    from lowrank_tune.tracking.reconcile import reconcile

    return {"study_id": plan.study_id, **asdict(reconcile(plan, comparison))}
