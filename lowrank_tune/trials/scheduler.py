"""Successive halving that is fair: a trial competes for survival only with trials of its own group.

In one pool, asynchronous successive halving (Li et al., https://arxiv.org/abs/1810.05934) would stop the low ranks,
which cannot reach the high ones' error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from optuna.trial import FrozenTrial
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler

from lowrank_tune.config.schema import StudySpec
from lowrank_tune.records import OBJECTIVES
from lowrank_tune.trials.search import told_epochs


class Forgetful(FIFOScheduler):
    """First in, first out; whenever a trial ends, Tune lets go of those that had ended before.

    It would keep each of them until the study ends, 5 KB a trial, and look through them all at every step.
    """

    def on_trial_complete(self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]) -> None:
        _forget_ended(tune_controller, trial)

    def on_trial_error(self, tune_controller: TuneController, trial: Trial) -> None:
        _forget_ended(tune_controller, trial)


def _forget_ended(controller: TuneController, ending: Trial) -> None:
    # Not the one that is ending now: it may be begun again, and Tune's list must not be empty.
    ended = {trial for trial in controller._trials if trial.is_finished() and trial is not ending}
    controller._trials[:] = (trial for trial in controller._trials if trial not in ended)
    for kept in (controller._stopped_trials, controller._failed_trials, controller._trials_to_cache):
        kept -= ended


class FairASHA(Forgetful):
    """One asynchronous successive halving for each group of trials that agree in `compete_within`.

    It goes by one figure, of two objectives by `steered_by`: Optuna prunes no trial of two.
    Trials compete with those of earlier processes, which `sync_search` gives, as if all had run in one.
    """

    def __init__(self, spec: StudySpec, past: Sequence[FrozenTrial] = ()) -> None:
        super().__init__()
        self._objective = spec.steered_by
        self._within = spec.scheduler.compete_within
        self._settings = {
            "time_attr": "epoch",
            "metric": self._objective,
            "mode": "max" if OBJECTIVES[self._objective] == "maximize" else "min",
            "max_t": spec.training.epochs,
            "grace_period": min(spec.scheduler.grace_epochs, spec.training.epochs),
            "reduction_factor": spec.scheduler.reduction_factor,
        }
        self._groups: dict[tuple[Any, ...], AsyncHyperBandScheduler] = {}
        self._unfinished: dict[str, FrozenTrial] = {}
        for trial in past:
            trial_id, config = trial.user_attrs["trial_id"], trial.user_attrs["config"]
            if trial.state.is_finished():
                self._replay(SimpleNamespace(trial_id=trial_id, config={"trial": config}), trial)
            else:
                self._unfinished[trial_id] = trial

    def on_trial_add(self, tune_controller: TuneController, trial: Trial) -> None:
        """A trial that goes on is where it was."""
        past = self._unfinished.pop(trial.config["trial"].get("trial_id", ""), None)
        if past is None:
            self._group(trial).on_trial_add(tune_controller, trial)
        else:
            self._replay(trial, past)

    def on_trial_result(self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]) -> str:
        if not self._is_comparable(result):
            return str(TrialScheduler.CONTINUE)
        return str(self._group(trial).on_trial_result(tune_controller, trial, result))

    def on_trial_complete(self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]) -> None:
        """Let a trial's last epoch count for its group; one that failed does not."""
        super().on_trial_complete(tune_controller, trial, result)
        if self._is_comparable(result):
            self._group(trial).on_trial_complete(tune_controller, trial, result)
        else:
            self.on_trial_remove(tune_controller, trial)

    def on_trial_error(self, tune_controller: TuneController, trial: Trial) -> None:
        super().on_trial_error(tune_controller, trial)
        self.on_trial_remove(tune_controller, trial)

    def on_trial_remove(self, tune_controller: TuneController, trial: Trial) -> None:
        self._group(trial).on_trial_remove(tune_controller, trial)

    def debug_string(self) -> str:
        return f"FairASHA: {len(self._groups)} groups by {', '.join(self._within) or 'nothing'}"

    def _replay(self, trial: Any, past: FrozenTrial) -> None:
        """Fill the rungs with what is known of a trial; whether it goes on was decided when it was reported."""
        group = self._group(trial)
        group.on_trial_add(None, trial)
        for epoch, value in sorted(told_epochs(past).items()):
            group.on_trial_result(None, trial, {"epoch": epoch, self._objective: value})
        if past.state.is_finished():
            group.on_trial_remove(None, trial)

    def _is_comparable(self, result: dict[str, Any]) -> bool:
        return result.get("stopped_by") != "error" and math.isfinite(result.get(self._objective, math.nan))

    def _group(self, trial: Trial) -> AsyncHyperBandScheduler:
        config = trial.config["trial"]
        # What is trained in the answers' metric is worse by a figure without one: a family of its own.
        metric = config.get("family_params", {}).get("metric") if "family" in self._within else None
        key = (*(config[name] for name in self._within), metric)
        if key not in self._groups:
            self._groups[key] = AsyncHyperBandScheduler(**self._settings)
        return self._groups[key]


def make_scheduler(spec: StudySpec, past: Sequence[FrozenTrial] = ()) -> TrialScheduler:
    return FairASHA(spec, past) if spec.scheduler.kind == "asha" else Forgetful()
