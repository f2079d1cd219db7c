"""Results as a terminal shows them, on stdout."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from lowrank_tune.cli.listing import print_facts
from lowrank_tune.inspection import Check
from lowrank_tune.records import FeatureSet, TrialOutcome
from lowrank_tune.report.terminal import comparison_tables
from lowrank_tune.report.words import summary
from lowrank_tune.study import StudyResult


def _console() -> Console:
    return Console(highlight=False)


def print_study(result: StudyResult) -> None:
    """Print what a study found, where it lies and the line that opens the MLflow UI."""
    console = _console()
    console.print(comparison_tables(result.comparison))
    for sentence in (*summary(result.comparison, result.outcomes), *result.comparison.remarks):
        console.print(f"- {sentence}", markup=False)
    for problem in result.untracked:
        console.print(f"- not in MLflow: {problem}", markup=False)
    results = result.directory.parent.parent
    console.print(f"\nStudy {result.study_id}: {result.directory}", markup=False, soft_wrap=True)
    console.print(f"Report: {result.directory / 'report.html'}", markup=False, soft_wrap=True)
    if result.tracked_by:
        console.print(f"Open the MLflow UI: {result.tracked_by}", markup=False, soft_wrap=True)
    else:
        console.print(f"Open the MLflow UI: {_program()} ui --results {shlex.quote(str(results))}", soft_wrap=True)


def _program() -> str:
    """The command as it can be typed here: by its name when the PATH has it, else where it lies."""
    if shutil.which("lowrank-tune"):
        return "lowrank-tune"
    return shlex.quote(os.path.relpath(Path(sys.executable).parent / "lowrank-tune"))


def print_result(result: StudyResult, as_json: bool) -> None:
    """Print what a study found, for people or for a script."""
    print(json.dumps(study_json(result), indent=2)) if as_json else print_study(result)


def study_json(result: StudyResult) -> dict[str, Any]:
    """The same for a script."""
    return {
        "study_id": result.study_id,
        "directory": str(result.directory),
        "comparison": [asdict(row) for row in result.comparison.rows],
        "remarks": list(result.comparison.remarks),
        "trials": [asdict(outcome) for outcome in result.outcomes],
        "confirmations": [asdict(outcome) for outcome in result.confirmations],
        "untracked": list(result.untracked),
    }


def print_trial(outcome: TrialOutcome) -> None:
    """Print how one trial ended."""
    facts: dict[str, Any] = {"trial": outcome.config.trial_id, "status": outcome.status}
    facts |= {"stopped by": outcome.stopped_by, "epochs": outcome.epochs, "best epoch": outcome.best_epoch}
    facts |= {name: f"{value:.6g}" for name, value in outcome.best.items()}
    facts |= {"seconds": f"{outcome.seconds:.1f}", "directory": outcome.directory}
    if outcome.reason:
        facts["reason"] = outcome.reason
    print_facts(facts)


def features_facts(features: FeatureSet) -> dict[str, Any]:
    """What an extraction left, as `extract` shows it."""
    return {
        "cache": features.directory,
        "encoder": features.encoder,
        "weights": features.weights,
        "images": len(features.rows),
        "quarantined": features.quarantined,
        "shape": [features.tokens, features.dim],
        "dtype": features.dtype,
    }


def print_checks(checks: Sequence[Check]) -> None:
    """Print a line a check, and the remedy of those that failed."""
    console = _console()
    for check in checks:
        mark = "[green]ok[/green]    " if check.passed else "[red]failed[/red]"
        console.print(f"{mark}  {check.name}: ", end="")
        console.print(check.finding, markup=False, soft_wrap=True)
