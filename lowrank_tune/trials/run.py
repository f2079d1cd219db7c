"""A study's trials on Ray Tune: all of them, or those that an earlier process did not finish."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from lowrank_tune.errors import StudyFailedError
from lowrank_tune.records import FeatureSet, Split, TrialOutcome, TrialTracker
from lowrank_tune.spec.plan import Plan
from lowrank_tune.trials.callback import Audience, TrialListener
from lowrank_tune.trials.lane_plan import fuses
from lowrank_tune.trials.ledger import Ledger, read_outcomes, recovered_outcome, remove_checkpoints, write_outcome
from lowrank_tune.trials.paths import write_material
from lowrank_tune.trials.scheduler import PastTrial, make_scheduler
from lowrank_tune.trials.searcher import StudySearcher, config_of, open_optuna_study, settle
from lowrank_tune.trials.sharing import FairShare
from lowrank_tune.trials.tuning import run_on_tune


def run_trials(
    plan: Plan,
    features: FeatureSet,
    split: Split,
    optimum_path: Path,
    tracker: TrialTracker,
    listener: TrialListener | None = None,
) -> tuple[TrialOutcome, ...]:
    """Run the trials of a study that are not over yet; Ray is initialised by the caller.

    A trial with an outcome on file is not trained again. One that was being trained goes on from its checkpoint, and
    searcher and scheduler know all that they knew: Optuna's journal holds it. Tune itself starts afresh: its own
    `restore` can neither extend a search nor trust refs that a killed cluster took along.

    Args:
        plan: the study.
        features: its features; only their path travels to the actors.
        split: which images train, validate and judge.
        optimum_path: the validation split's optimum.
        tracker: told of every trial that is trained here.
        listener: told as well, for a terminal.

    Returns:
        One outcome a trial, in the order of their numbers.

    Raises:
        InputError: a trial asks for more than any node has.
        StudyFailedError: every trial failed.
        KeyboardInterrupt: the study was interrupted; trials that had ended are on file, and those at work can go on.
    """
    tune_dir, trials_dir = plan.study_dir / "tune", plan.study_dir / "trials"
    material = write_material(tune_dir, features, split, optimum_path)
    study = open_optuna_study(plan, tune_dir / "optuna.journal")
    ended = {key: outcome for key, outcome in read_outcomes(trials_dir).items() if not outcome.config.confirms}
    past = []
    for trial in settle(plan, study, ended):
        config = config_of(trial)
        if config is None:
            continue
        past.append(PastTrial(config, trial.intermediate_values, trial.state.is_finished()))
        if trial.state.is_finished() and config.trial_id not in ended:
            ended[config.trial_id] = recovered_outcome(trial, trials_dir)
            write_outcome(trials_dir, ended[config.trial_id])
    audience = Audience(trials_dir, Ledger(trials_dir, tracker), listener, ended)
    if len(ended) < plan.n_trials:
        share = None if fuses(plan, features) else FairShare(plan.spec.resources)
        run_on_tune(
            plan,
            material,
            audience,
            "ray",
            search_alg=StudySearcher(plan, study, share),
            scheduler=make_scheduler(plan.spec, past),
            num_samples=plan.n_trials - len(ended),
        )
    if len(audience.outcomes) < plan.n_trials:
        raise KeyboardInterrupt
    outcomes = tuple(sorted(audience.outcomes.values(), key=lambda outcome: outcome.config.number))
    remove_checkpoints(trials_dir, outcomes)
    _require_one_success(outcomes)
    return outcomes


def _require_one_success(outcomes: tuple[TrialOutcome, ...]) -> None:
    if any(outcome.status != "failed" for outcome in outcomes):
        return
    reasons = Counter(outcome.reason for outcome in outcomes).most_common()
    told = "; ".join(f"{count}x {reason}" for reason, count in reasons)
    raise StudyFailedError(f"all {len(outcomes)} trials failed: {told}")
