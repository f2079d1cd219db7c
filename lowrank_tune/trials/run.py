"""A study's trials on Ray Tune."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from lowrank_tune.errors import StudyFailedError
from lowrank_tune.records import FeatureSet, Split, TrialOutcome, TrialTracker
from lowrank_tune.spec.plan import Plan
from lowrank_tune.trials.callback import Audience, TrialListener
from lowrank_tune.trials.paths import write_material
from lowrank_tune.trials.scheduler import make_scheduler
from lowrank_tune.trials.searcher import StudySearcher, open_optuna_study
from lowrank_tune.trials.tuning import run_on_tune


def run_trials(
    plan: Plan,
    features: FeatureSet,
    split: Split,
    optimum_path: Path,
    tracker: TrialTracker,
    listener: TrialListener | None = None,
) -> tuple[TrialOutcome, ...]:
    """Run every trial of a study; Ray is initialised by the caller.

    Args:
        plan: the study.
        features: its features; only their path travels to the actors.
        split: which images train, validate and judge.
        optimum_path: the validation split's optimum.
        tracker: told of every trial.
        listener: told as well, for a terminal.

    Returns:
        One outcome a trial, in the order of their numbers.

    Raises:
        InputError: a trial asks for more than any node has.
        StudyFailedError: every trial failed.
        KeyboardInterrupt: the study was interrupted; trials that had ended are on file.
    """
    tune_dir = plan.study_dir / "tune"
    material = write_material(tune_dir, features, split, optimum_path)
    searcher = StudySearcher(plan, open_optuna_study(plan, tune_dir / "optuna.journal"))
    audience = Audience(plan.study_dir / "trials", tracker, listener)
    try:
        run_on_tune(
            plan,
            material,
            audience,
            "ray",
            search_alg=searcher,
            scheduler=make_scheduler(plan.spec),
            num_samples=plan.n_trials,
        )
    finally:
        searcher.abandon()
    if len(audience.outcomes) < plan.n_trials:
        raise KeyboardInterrupt
    outcomes = tuple(sorted(audience.outcomes.values(), key=lambda outcome: outcome.config.number))
    _require_one_success(outcomes)
    return outcomes


def _require_one_success(outcomes: tuple[TrialOutcome, ...]) -> None:
    if any(outcome.status != "failed" for outcome in outcomes):
        return
    reasons = Counter(outcome.reason for outcome in outcomes).most_common()
    told = "; ".join(f"{count}x {reason}" for reason, count in reasons)
    raise StudyFailedError(f"all {len(outcomes)} trials failed: {told}")
