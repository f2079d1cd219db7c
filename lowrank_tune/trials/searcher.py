"""Tune's searcher: an Optuna study that is asked for points and told the truth about them.

A trial that the scheduler stopped is PRUNED there with every epoch's value, one that failed is FAIL, and only a trial
that used its budget or its patience is COMPLETE. Optuna's own tools open the file:
`JournalStorage(JournalFileBackend("tune/optuna.journal"))`.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import Trial, TrialState
from ray.tune.search import Searcher

from lowrank_tune.spec.plan import Plan, trial_config
from lowrank_tune.trials.objective import DIRECTIONS
from lowrank_tune.trials.outcome import stopped_by
from lowrank_tune.trials.space import optuna_params, suggest


def open_optuna_study(plan: Plan, path: Path) -> optuna.Study:
    """Open a study's Optuna side, made when missing; it has the study's id as its name.

    The storage is a journal file: Optuna's sqlite storage imports SQLAlchemy and migrates tables for seconds before the
    first trial, and cannot be trusted on a network file system, where a cluster's results lie.

    Args:
        plan: the study.
        path: the journal file; its folder is made when missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    logging.getLogger("optuna").setLevel(logging.WARNING)
    return optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(path))),
        sampler=_sampler(plan),
        study_name=plan.study_id,
        direction=DIRECTIONS[plan.spec.objective],
        load_if_exists=True,
    )


class StudySearcher(Searcher):
    """Suggests a study's points, each as `{"trial": TrialConfig as a dict}`, and tells Optuna how they went.

    Args:
        plan: the study; with the method `grid` its points are suggested in their order.
        study: where Optuna keeps them.
    """

    def __init__(self, plan: Plan, study: optuna.Study) -> None:
        super().__init__()
        self._plan = plan
        self._study = study
        self._number = 0
        self._live: dict[str, Trial] = {}
        self._reported: dict[str, int] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """Ask for the next point; `FINISHED` when there is none."""
        number = self._number
        if number >= self._plan.n_trials:
            return str(Searcher.FINISHED)
        self._number += 1
        if self._plan.spec.search.method == "grid":
            self._study.enqueue_trial(optuna_params(self._plan.grid[number]))
        trial = self._study.ask()
        config = trial_config(self._plan, number, suggest(trial, self._plan.spec.search.space))
        trial.set_user_attr("trial_id", config.trial_id)
        self._live[trial_id] = trial
        return {"trial": asdict(config)}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Report an epoch's value."""
        epoch, value = result.get("epoch", 0), result.get(self._plan.spec.objective, math.nan)
        if epoch > self._reported.get(trial_id, 0) and math.isfinite(value):
            self._live[trial_id].report(value, step=epoch)
            self._reported[trial_id] = epoch

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """Tell how a trial ended."""
        result = dict(result or {})
        self.on_trial_result(trial_id, result)
        trial = self._live.pop(trial_id)
        seen = self._reported.pop(trial_id, 0)
        ended = "error" if error or not seen else stopped_by(result)
        value = result.get(f"best_{self._plan.spec.objective}", math.nan)
        if ended == "error" or not math.isfinite(value):
            self._study.tell(trial, state=TrialState.FAIL)
        elif ended == "asha":
            self._study.tell(trial, state=TrialState.PRUNED)
        else:
            self._study.tell(trial, value)

    def abandon(self) -> None:
        """Fail the trials that an interruption left running: Optuna would take them for running for ever."""
        for trial in self._live.values():
            self._study.tell(trial, state=TrialState.FAIL)
        self._live.clear()

    def save(self, checkpoint_path: str) -> None:
        """Write nothing: the journal holds every trial as soon as it is known."""


def _sampler(plan: Plan) -> BaseSampler:
    if plan.spec.search.method != "tpe":
        return RandomSampler(seed=plan.spec.seed)
    with warnings.catch_warnings():
        # `group` keeps each family's own parameters in a joint model of their own; Optuna calls it experimental.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return TPESampler(seed=plan.spec.seed, multivariate=True, group=True, constant_liar=True)
