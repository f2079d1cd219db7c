"""Tune's searcher: an Optuna study that is asked for points and told the truth about them.

A trial that the scheduler stopped is PRUNED there, one that failed is FAIL, only one that used its budget or its
patience is COMPLETE, and one that is to go on is RUNNING. Optuna's own tools open the file:
`JournalStorage(JournalFileBackend("tune/optuna.journal"))`.

Each group of trials that compete with each other is searched for itself, and the next trial is dealt to the group that
has had the fewest. No configuration is trained twice: a group that has tried all its points leaves its share to others.

A study of two objectives has two directions, and `best_trials` is its front. Optuna takes no epochs of such trials:
what steered them is noted as `epoch 1`, `epoch 2` … in their user attributes.
"""

from __future__ import annotations

import copy
import itertools
import logging
import math
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import RandomSampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FixedTrial, FrozenTrial, Trial, TrialState
from ray.tune.search import Searcher

from lowrank_tune.config.axes import SpaceSpec
from lowrank_tune.config.plan import Plan, default_points, search_groups, trial_config
from lowrank_tune.config.schema import StudySpec
from lowrank_tune.records import FIGURES, OBJECTIVES, StoppedFor, TrialConfig, TrialOutcome
from lowrank_tune.trials.drawing import draw_point, optuna_params, suggest
from lowrank_tune.trials.outcomes import stopped_by
from lowrank_tune.trials.stopping import SearchEnd, belongs

_EPOCH = "epoch "


def open_optuna_study(plan: Plan, path: Path) -> optuna.Study:
    """Open the journal of a study's search, made when missing.

    Optuna's sqlite storage would take seconds to migrate tables, and cannot be trusted on a network file system.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    logging.getLogger("optuna").setLevel(logging.WARNING)
    logging.getLogger("optuna._gp").setLevel(logging.ERROR)  # it would tell of a package that makes it quicker
    return optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(path))),
        study_name=plan.study_id,
        directions=[OBJECTIVES[name] for name in plan.spec.objectives],
        # Every point is given to it: of two objectives Optuna's own would draw a generation in vain.
        sampler=RandomSampler(seed=0),
        load_if_exists=True,
    )


class StudySearcher(Searcher):
    """Suggests a study's points, each as `{"trial": TrialConfig as a dict}`, while its share allows.

    Trials that Optuna holds as RUNNING, as the study was stopped or killed, are suggested first, with the last epoch
    that it heard of as `reported`.
    """

    def __init__(
        self,
        plan: Plan,
        study: optuna.Study,
        share: Callable[[], float] = lambda: math.inf,
        end: SearchEnd | None = None,
    ) -> None:
        super().__init__()
        self._end = end or SearchEnd(plan, (), lambda: 0.0)
        self._plan = plan
        self._share = share
        self._study = study
        known = study.get_trials(deepcopy=False)
        self._unfinished = [trial for trial in known if trial.state == TrialState.RUNNING]
        self._number = len(known)
        self._finished = False
        self._groups = search_groups(plan.spec)
        self._defaults = default_points(plan.spec)
        self._first = deque(self._first_points())
        self._dealt = dict.fromkeys(range(len(self._groups)), 0)  # to the groups that have a point left
        self._seen: set[str] = set()
        for config in filter(None, map(config_of, known)):
            self._count(config)
        self._live: dict[str, Trial] = {}
        self._reported: dict[str, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune's copy to restore a study from is not used."""
        return {}

    @property
    def stopped_for(self) -> StoppedFor | None:
        """Why no more trials begin; None while some do."""
        all_tried = self._number >= self._plan.n_trials
        if all_tried and not (self._live or self._unfinished):
            return "trials" if self._number >= (self._plan.spec.search.trials or 0) else "space"
        if self._end.at_once or not self._finished:
            return self._end.at_once
        closed = Counter[StoppedFor](reason for group in self._groups if (reason := self._end.closed(group)))
        return closed.most_common(1)[0][0] if closed else "space"

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Ask for the next point; `FINISHED` when there is none, None while others' turn is.

        None, too, while trials at work may gain what lets their group go on.
        """
        if self._end.at_once:
            return str(Searcher.FINISHED)
        if len(self._live) >= self._share():
            return None
        if self._unfinished:
            frozen = self._unfinished.pop(0)
            reported = self._reported[trial_id] = max(told_epochs(frozen), default=0)
        elif self._number < self._plan.n_trials and (point := self._next_point()):
            frozen, reported = self._begin(point), 0
        elif self._live and self._number < self._plan.n_trials:
            return None
        else:
            self._finished = True
            return str(Searcher.FINISHED)
        self._live[trial_id] = Trial(self._study, frozen._trial_id)
        return {"trial": frozen.user_attrs["config"], "reported": reported}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        epoch, value = result.get("epoch", 0), result.get(self._plan.spec.steered_by, math.nan)
        if epoch > self._reported.get(trial_id, 0) and math.isfinite(value):
            if len(self._plan.spec.objectives) == 1:
                self._live[trial_id].report(value, step=epoch)
            else:
                self._live[trial_id].set_user_attr(f"{_EPOCH}{epoch}", value)
            self._reported[trial_id] = epoch

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        result = dict(result or {})
        self.on_trial_result(trial_id, result)
        trial = self._live.pop(trial_id)
        seen = self._reported.pop(trial_id, 0)
        ended = "error" if error or not seen else stopped_by(result)
        best = {name: result[f"best_{name}"] for name in FIGURES if f"best_{name}" in result}
        _tell(self._study, self._plan.spec, trial, ended, best)

    def save(self, checkpoint_path: str) -> None:
        """Write nothing: the journal holds every trial as soon as it is known."""

    def _begin(self, point: Mapping[str, Any]) -> FrozenTrial:
        """Write a trial to the journal, whole and in one step, whatever happens to this driver."""
        fixed = FixedTrial(optuna_params(point))
        config = self._describe(suggest(fixed, self._plan.spec.search.space))
        created = optuna.trial.create_trial(
            state=TrialState.RUNNING,
            params={name: fixed.params[name] for name in fixed.distributions},
            distributions=fixed.distributions,
            user_attrs={"trial_id": config.trial_id, "config": asdict(config)},
        )
        self._study.add_trial(created)
        self._number += 1
        self._count(config)
        return self._study.get_trials(deepcopy=False)[-1]

    def _next_point(self) -> dict[str, Any] | None:
        """The next point that no trial has had, of a group that goes on; None where there is none."""
        while self._first and self._trains(self._first[0]) in self._seen:
            self._first.popleft()
        for point in self._first:
            if self._trains(point) not in self._seen and not any(map(self._closed, self._groups_of(point))):
                return point
        while going := [place for place in self._dealt if not self._plan.grid and not self._closed(place)]:
            place = min(going, key=lambda place: self._dealt[place])
            group, defaults = self._groups[place], self._defaults[place]
            new = [point for point in defaults if self._trains(point) not in self._seen]
            found = new[0] if new else draw_point(self._plan, self._study, self._number, group, self._seen)
            if found is not None:
                return found
            del self._dealt[place]
        return None

    def _closed(self, place: int) -> StoppedFor | None:
        return self._end.closed(self._groups[place])

    def _groups_of(self, point: Mapping[str, Any]) -> list[int]:
        return [place for place, group in enumerate(self._groups) if belongs(point, group)]

    def _first_points(self) -> Iterator[dict[str, Any]]:
        """What is tried before anything is drawn: points that are known, after their families' defaults, and a grid."""
        for point in self._plan.first:
            for place in self._groups_of(point):
                yield from (own for own in self._defaults[place] if own["family"] == point["family"])
            yield point
        if self._plan.grid:
            yield from itertools.chain(*self._defaults, self._plan.grid)

    def _trains(self, point: Mapping[str, Any]) -> str:
        return trial_config(self._plan, self._number, point).trains

    def _count(self, config: TrialConfig) -> None:
        self._seen.add(config.trains)
        for place in self._dealt:
            self._dealt[place] += belongs(config.point, self._groups[place])

    def _describe(self, point: Mapping[str, Any]) -> TrialConfig:
        config = trial_config(self._plan, self._number, point)
        if config.trains in map(self._trains, itertools.chain(*self._defaults)):
            return replace(config, origin="defaults")
        if config.trains in map(self._trains, self._plan.first):
            return replace(config, origin="first")
        return config


def sync_search(plan: Plan, study: optuna.Study, outcomes: Mapping[str, TrialOutcome]) -> list[FrozenTrial]:
    """Tell Optuna of outcomes that it missed, as the driver died; returns every trial that has a configuration."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        outcome = outcomes.get(trial.user_attrs.get("trial_id", ""))
        if outcome is not None:
            _tell(study, plan.spec, Trial(study, trial._trial_id), outcome.stopped_by, outcome.best)
        elif config_of(trial) is None:  # an older version's driver died while it wrote it
            study.tell(trial.number, state=TrialState.FAIL)
    return [trial for trial in study.get_trials(deepcopy=False) if config_of(trial)]


def migrate_search(plan: Plan, path: Path) -> None:
    """Write a study's journal anew for its plan's search space, in one step.

    Optuna lets no parameter change its choices, so the trials move into a study of the same name; a trial outside the
    new space keeps its place and its figures, and teaches nothing.
    """
    old = open_optuna_study(plan, path)
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)
    new = open_optuna_study(plan, partial)
    new.add_trials(_moved(trial, plan.spec.search.space) for trial in old.get_trials(deepcopy=False))
    partial.replace(path)


def _moved(trial: FrozenTrial, space: SpaceSpec) -> FrozenTrial:
    moved, config = copy.deepcopy(trial), config_of(trial)
    fixed = _drawn(config, space) if config is not None else None
    moved.distributions = dict(fixed.distributions) if fixed else {}
    moved.params = {name: fixed.params[name] for name in fixed.distributions} if fixed else {}
    return moved


def _drawn(config: TrialConfig, space: SpaceSpec) -> FixedTrial | None:
    """A trial that drew this configuration from the space; None when the space has no such point."""
    fixed = FixedTrial(optuna_params(config.point))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of a value outside its range
        try:
            # What a trial of an older study says nothing of, `metric`, it has at its default.
            return fixed if config.point.items() <= suggest(fixed, space).items() else None
        except (KeyError, ValueError, UserWarning):
            return None


def config_of(trial: FrozenTrial) -> TrialConfig | None:
    """What a trial trains; None for one that an older version's driver has left half written."""
    return TrialConfig(**trial.user_attrs["config"]) if "config" in trial.user_attrs else None


def told_epochs(trial: FrozenTrial) -> dict[int, float]:
    """What steered a trial at each of its epochs that Optuna has heard of."""
    noted = {int(key[len(_EPOCH) :]): it for key, it in trial.user_attrs.items() if key.startswith(_EPOCH)}
    return {**trial.intermediate_values, **noted}


def _tell(study: optuna.Study, spec: StudySpec, trial: Trial, ended: str, best: Mapping[str, float]) -> None:
    values = [best.get(name, math.nan) for name in spec.objectives]
    if ended == "error" or not all(map(math.isfinite, values)):
        study.tell(trial, state=TrialState.FAIL)
        return
    for name, most in spec.search.require.limits().items():
        # A driver that died between this and the next call has said it.
        if name in best and name not in trial.constraints:
            trial.set_constraint(name, best[name] / most - 1)
    if ended == "asha":
        study.tell(trial, state=TrialState.PRUNED)
    else:
        study.tell(trial, values)
