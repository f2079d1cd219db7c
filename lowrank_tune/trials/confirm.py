"""The best configurations of a study, trained again with fresh seeds: how much of their figures was luck?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ray import tune

from lowrank_tune.records import FeatureSet, Split, TrialOutcome, TrialTracker
from lowrank_tune.spec.plan import Plan, confirmation_config
from lowrank_tune.trials.callback import Audience, TrialListener
from lowrank_tune.trials.ledger import Ledger, read_outcomes, remove_checkpoints
from lowrank_tune.trials.paths import write_material
from lowrank_tune.trials.tuning import run_on_tune


def confirm_trials(
    plan: Plan,
    winners: Sequence[TrialOutcome],
    features: FeatureSet,
    split: Split,
    optimum_path: Path,
    tracker: TrialTracker,
    listener: TrialListener | None = None,
) -> tuple[TrialOutcome, ...]:
    """Train each winner's configuration `report.confirm_seeds` times, to its budget or its patience.

    No scheduler stops a repetition, no searcher learns of it, and the winner's own training is not one of them: it was
    chosen for its figures, so that they are too good on average. A repetition that fails is an outcome like any other,
    and one whose outcome is on file is not trained again.

    Args:
        plan: the study.
        winners: trials of its search.
        features: its features; only their path travels to the actors.
        split: which images train, validate and judge.
        optimum_path: the validation split's optimum.
        tracker: told of every repetition.
        listener: told as well, for a terminal.

    Returns:
        By winner and repetition; the directories are `trials/<trial_id>-s<repetition>`.

    Raises:
        InputError: a training asks for more than any node has.
        KeyboardInterrupt: the study was interrupted.
    """
    repeats = range(1, plan.spec.report.confirm_seeds + 1)
    configs = [confirmation_config(plan, winner.config, repeat) for winner in winners for repeat in repeats]
    if not configs:
        return ()
    trials_dir = plan.study_dir / "trials"
    material = write_material(plan.study_dir / "tune", features, split, optimum_path)
    audience = Audience(trials_dir, Ledger(trials_dir, tracker), listener, read_outcomes(trials_dir))
    missing = [config for config in configs if config.trial_id not in audience.outcomes]
    if missing:
        run_on_tune(
            plan,
            material,
            audience,
            "ray-confirmation",
            space={"trial": tune.grid_search([asdict(config) for config in missing])},
        )
    if any(config.trial_id not in audience.outcomes for config in configs):
        raise KeyboardInterrupt
    repetitions = tuple(audience.outcomes[config.trial_id] for config in configs)
    remove_checkpoints(trials_dir, repetitions)
    return repetitions
