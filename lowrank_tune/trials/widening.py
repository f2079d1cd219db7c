"""Optuna's side of an extension: the old trials, told in the terms of the new space."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

from optuna.trial import FixedTrial, FrozenTrial

from lowrank_tune.records import TrialConfig
from lowrank_tune.spec.plan import Plan
from lowrank_tune.spec.schema import SpaceSpec
from lowrank_tune.trials.searcher import config_of, open_optuna_study
from lowrank_tune.trials.space import optuna_params, suggest


def widen_journal(plan: Plan, path: Path) -> None:
    """Write a study's journal anew for its plan's search space, in one step.

    Optuna lets no parameter of a study change its choices, so the trials move into a study of the same name whose
    parameters are the new ones; what they taught the searcher it knows on, also where a list became a range. A trial
    outside the new space keeps its place and its figures, and teaches nothing.

    Args:
        plan: the study as it is to be.
        path: its journal.
    """
    old = open_optuna_study(plan, path)
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)
    new = open_optuna_study(plan, partial)
    new.add_trials(_moved(trial, plan.spec.search.space) for trial in old.get_trials(deepcopy=False))
    partial.replace(path)


def _moved(trial: FrozenTrial, space: SpaceSpec) -> FrozenTrial:
    moved, config = copy.deepcopy(trial), config_of(trial)
    fixed = _drawn(_point(config), space) if config is not None else None
    moved.distributions = dict(fixed.distributions) if fixed else {}
    moved.params = {name: fixed.params[name] for name in fixed.distributions} if fixed else {}
    return moved


def _drawn(point: dict[str, Any], space: SpaceSpec) -> FixedTrial | None:
    """A trial that drew this point from the space; None when the space has no such point."""
    fixed = FixedTrial(optuna_params(point))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of a value outside its range
        try:
            return fixed if suggest(fixed, space) == point else None
        except (KeyError, ValueError, UserWarning):
            return None


def _point(config: TrialConfig) -> dict[str, Any]:
    shared = {name: getattr(config, name) for name in ("family", "rank", "lr", "weight_decay", "batch_size")}
    return {**shared, **config.family_params}
