"""Results as a terminal shows them, on stdout."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from lowrank_tune.cli.output import print_facts
from lowrank_tune.cost import Check
from lowrank_tune.records import Comparison, FeatureSet, TrialOutcome
from lowrank_tune.report.text import at_rank, comparison_tables, studies_table, summary, verdict_table
from lowrank_tune.study import StudyResult


def _console() -> Console:
    return Console(highlight=False)


def print_study(result: StudyResult) -> None:
    """Print what a study found, where it lies and what to type next."""
    console = _console()
    console.print(verdict_table(result.comparison))
    # The table has said what the summary's sentences on single ranks say.
    for sentence in (*summary(result.comparison, result.outcomes)[-1:], *result.comparison.remarks):
        console.print(f"- {sentence}", markup=False)
    results, program = result.directory.parent.parent, _program()
    where = f"{result.study_id} --results {shlex.quote(str(results))}"
    best = next((row for row in result.comparison.rows if row.trial_id), None)
    ui = result.tracked_by or f"{program} ui --results {shlex.quote(str(results))}"
    lines = {
        f"Study {result.study_id}": result.directory,
        "Report": result.directory / "report.html",
        "Every method": f"{program} compare {where}",
        "Where on an image": f"{program} visualize {where} --image 0" if best else "",
        "Open the MLflow UI": ui,
    }
    console.print()
    for name, text in lines.items():
        if text:
            console.print(f"{name}: {text}", markup=False, soft_wrap=True)
    if result.untracked:
        console.print(f"not in MLflow: {'; '.join(result.untracked)}", markup=False, soft_wrap=True)


def print_comparisons(comparisons: Mapping[str, Comparison], rank: int | None, caveats: Sequence[str]) -> None:
    """Print the figures of one study, or of several side by side, and what must be said of them."""
    console = _console()
    shown = {name: at_rank(comparison, rank) for name, comparison in comparisons.items()}
    if len(shown) == 1:
        console.print(comparison_tables(next(iter(shown.values()))))
    else:
        console.print(studies_table(shown))
    for caveat in caveats:
        console.print(f"- {caveat}", markup=False)
    for name, comparison in shown.items():
        said = f"{name}: " if len(shown) > 1 else ""
        for remark in comparison.remarks:
            console.print(f"- {said}{remark}", markup=False)


def comparisons_json(comparisons: Mapping[str, Comparison], rank: int | None, caveats: Sequence[str]) -> dict[str, Any]:
    """The same for a script."""
    shown = {name: at_rank(comparison, rank) for name, comparison in comparisons.items()}
    return {
        "studies": {
            name: {"comparison": [asdict(row) for row in comparison.rows], "remarks": list(comparison.remarks)}
            for name, comparison in shown.items()
        },
        "caveats": list(caveats),
    }


def print_files(files: Sequence[Path], problem: str = "") -> None:
    """Print the files that were written, one a line, the page to open first."""
    for file in sorted(files, key=lambda file: file.suffix != ".html"):
        print(file)
    if problem:
        print(f"not in MLflow: {problem}", file=sys.stderr)


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
