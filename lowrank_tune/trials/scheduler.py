"""Successive halving that is fair: a trial competes for survival only with trials of its own group.

A rank-16 trial cannot reach the error of a rank-256 trial, whatever its learning rate. In one pool, asynchronous
successive halving (Li et al., https://arxiv.org/abs/1810.05934) would therefore stop the low ranks and keep the high
ones.
"""

from __future__ import annotations

import math
from typing import Any

from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler

from lowrank_tune.spec.schema import StudySpec
from lowrank_tune.trials.objective import DIRECTIONS


class FairASHA(FIFOScheduler):
    """One asynchronous successive halving a group, where a group is the trials that agree in `compete_within`.

    Args:
        spec: the study: its objective, epochs and scheduler.
    """

    def __init__(self, spec: StudySpec) -> None:
        super().__init__()
        self._objective = spec.objective
        self._within = spec.scheduler.compete_within
        self._settings = {
            "time_attr": "epoch",
            "metric": spec.objective,
            "mode": "max" if DIRECTIONS[spec.objective] == "maximize" else "min",
            "max_t": spec.training.epochs,
            "grace_period": min(spec.scheduler.grace_epochs, spec.training.epochs),
            "reduction_factor": spec.scheduler.reduction_factor,
        }
        self._groups: dict[tuple[Any, ...], AsyncHyperBandScheduler] = {}

    def on_trial_add(self, tune_controller: TuneController, trial: Trial) -> None:
        """Let a new trial compete in its group."""
        self._group(trial).on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]) -> str:
        """Stop a trial that its group has left behind."""
        if not self._is_comparable(result):
            return str(TrialScheduler.CONTINUE)
        return str(self._group(trial).on_trial_result(tune_controller, trial, result))

    def on_trial_complete(self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]) -> None:
        """Let a trial's last epoch count for its group; one that failed does not."""
        group = self._group(trial)
        if self._is_comparable(result):
            group.on_trial_complete(tune_controller, trial, result)
        else:
            group.on_trial_remove(tune_controller, trial)

    def on_trial_error(self, tune_controller: TuneController, trial: Trial) -> None:
        """Forget a trial that crashed."""
        self._group(trial).on_trial_remove(tune_controller, trial)

    def on_trial_remove(self, tune_controller: TuneController, trial: Trial) -> None:
        """Forget a trial that never ran."""
        self._group(trial).on_trial_remove(tune_controller, trial)

    def debug_string(self) -> str:
        """How many groups there are, for Tune's logs."""
        return f"FairASHA: {len(self._groups)} groups by {', '.join(self._within) or 'nothing'}"

    def _is_comparable(self, result: dict[str, Any]) -> bool:
        return result.get("stopped_by") != "error" and math.isfinite(result.get(self._objective, math.nan))

    def _group(self, trial: Trial) -> AsyncHyperBandScheduler:
        key = tuple(trial.config["trial"][name] for name in self._within)
        if key not in self._groups:
            self._groups[key] = AsyncHyperBandScheduler(**self._settings)
        return self._groups[key]


def make_scheduler(spec: StudySpec) -> TrialScheduler:
    """Make the scheduler that a study file asks for."""
    return FairASHA(spec) if spec.scheduler.kind == "asha" else FIFOScheduler()
