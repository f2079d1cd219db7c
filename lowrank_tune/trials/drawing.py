"""Drawing a study's points: the space as Optuna sees it, and what a trial's draw learns from.

What is drawn follows from the study's seed, the trial's number and what Optuna knows then: a study that is resumed goes
on as it would have.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import random
import warnings
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from statistics import median
from typing import Any

import optuna
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.trial import BaseTrial, FrozenTrial, TrialState

from lowrank_tune.config.axes import Axis, Range, SpaceSpec
from lowrank_tune.config.plan import Plan, trial_config
from lowrank_tune.config.points import EMPTY, SHARED_PARAMS, count_points, grid_points
from lowrank_tune.config.search import LARGEST_GRID
from lowrank_tune.errors import InputError
from lowrank_tune.records import OBJECTIVES

OWN_TRIALS = 24
"""Ended trials of a group from which on it learns from its own alone: before, what served other ranks is a better guess
than none."""
MOST_LESSONS = 200
"""The newest trials of a group that its next one learns from: TPE's time grows with them."""
DRAWS, LOTS = {"random": 10, "tpe": 10, "gp": 3, "auto": 3}, 100
"""How often a sampler is asked for a point that was not trained yet, and then chance in a space without end."""
GP_LESSONS = 100
"""Of a Gaussian process, whose time grows with their third power: about half a second a draw."""
TINY = 1e-12
"""Below every error that is not rounding."""


def suggest(trial: BaseTrial, space: SpaceSpec, fixed: Mapping[str, Any] = EMPTY) -> dict[str, Any]:
    """Draw one point, but for what is fixed: the shared parameters and the family's own, `family.parameter`."""
    family = fixed.get("family") or _draw(trial, "family", tuple(space.families.chosen()))
    axes: dict[str, Axis] = {**space.axes(family), **fixed}
    return {**{name: _draw(trial, _optuna_name(family, name), axes[name]) for name in axes}, "family": family}


def draw_point(
    plan: Plan, study: optuna.Study, number: int, fixed: Mapping[str, Any], seen: Container[str]
) -> dict[str, Any] | None:
    """Draw a trial's point in the group of what is fixed, from what this and its family's other groups have taught.

    None where every point of the group was seen, as `TrialConfig.trains` tells them apart.
    """
    # A study of its own, in memory: in one study of all groups TPE would take the group with the least error for good.
    objectives = plan.spec.objectives
    view = optuna.create_study(sampler=_sampler(plan, number), directions=["minimize"] * len(objectives))
    method = plan.spec.search.method
    if method not in ("grid", "random"):
        lessons = _lessons(objectives, study.get_trials(deepcopy=False), fixed)
        view.add_trials(_as_complete(lessons) if method == "gp" else lessons)
    space = plan.spec.search.space
    drawn = (suggest(view.ask(), space, fixed) for _ in range(DRAWS[method]))
    new = (point for point in drawn if trial_config(plan, number, point).trains not in seen)
    return next(new, None) or _any_other(plan, number, fixed, seen)


def _any_other(plan: Plan, number: int, fixed: Mapping[str, Any], seen: Container[str]) -> dict[str, Any] | None:
    """Draw a point that was not seen by lot, where the sampler gives none; None where there is none."""
    space, seed = plan.spec.search.space, _seed(plan, number, "other")
    if count_points(space, fixed) <= LARGEST_GRID:
        drawn = list(grid_points(space, fixed))
        random.Random(seed).shuffle(drawn)
    else:
        view = optuna.create_study(sampler=RandomSampler(seed=seed))
        drawn = [suggest(view.ask(), space, fixed) for _ in range(LOTS)]
    return next((point for point in drawn if trial_config(plan, number, point).trains not in seen), None)


def _lessons(
    objectives: Sequence[str], known: Sequence[FrozenTrial], fixed: Mapping[str, Any]
) -> Iterator[FrozenTrial]:
    """The trials of a group; until `OWN_TRIALS` of them have ended those of its family's other groups as well.

    A trial's error counts over the median of its group, as a logarithm: groups then differ by what was drawn alone.
    """
    groups: dict[tuple[Any, ...], list[FrozenTrial]] = {}
    for trial in known:
        # What it trains; one that an older version's driver has left half written has none.
        config = trial.user_attrs.get("config", {})
        if config and trial.state != TrialState.FAIL and fixed.get("family", config["family"]) == config["family"]:
            groups.setdefault(tuple(config[name] for name in fixed), []).append(trial)
    own = groups.get(tuple(fixed.values()), [])
    if sum(trial.state.is_finished() for trial in own) >= OWN_TRIALS:
        groups = {(): own}
    for trials in (every[-MOST_LESSONS:] for every in groups.values()):
        ended = [_log_errors(objectives, trial.values) for trial in trials if trial.values]
        middles = [median(errors) for errors in zip(*ended, strict=True)] or [0.0] * len(objectives)
        for trial in trials:
            complete = trial.state == TrialState.COMPLETE
            # TPE looks at the last epoch of what did not end by itself, and copies all that it is given.
            steps = [] if complete else sorted(trial.intermediate_values.items())[-1:]
            errors = _log_errors(objectives, trial.values) if complete else []
            yield optuna.trial.create_trial(
                state=trial.state,
                values=[error - middle for error, middle in zip(errors, middles, strict=False)] or None,
                params={name: value for name, value in trial.params.items() if name not in fixed},
                distributions={name: kind for name, kind in trial.distributions.items() if name not in fixed},
                intermediate_values={step: _log_errors(objectives, [it])[0] - middles[0] for step, it in steps},
                constraints=trial.constraints,
            )


def _as_complete(lessons: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """The newest lessons as a Gaussian process takes them, which knows no trial that was stopped early.

    Such a trial counts with what it had come to: a point that was given up is no place to look again.
    """
    kept = []
    for lesson in lessons:
        if lesson.state == TrialState.PRUNED and lesson.intermediate_values:
            lesson.state, lesson.values = TrialState.COMPLETE, [*lesson.intermediate_values.values()][-1:]
        kept.append(lesson)
    return kept[-GP_LESSONS:]


def _log_errors(objectives: Sequence[str], values: Sequence[float]) -> list[float]:
    pairs = zip(objectives, values, strict=True)
    errors = [1 - value if OBJECTIVES[name] == "maximize" else value for name, value in pairs]
    return [math.log(max(error, TINY)) for error in errors]


def optuna_params(point: Mapping[str, Any]) -> dict[str, Any]:
    """A point's values under the names that `suggest` draws them by."""
    return {_optuna_name(point["family"], name): value for name, value in point.items()}


def _optuna_name(family: str, name: str) -> str:
    return name if name in SHARED_PARAMS else f"{family}.{name}"


def _draw(trial: BaseTrial, name: str, axis: Axis) -> Any:
    match axis:
        case Range(kind="int", values=(low, high)):
            return trial.suggest_int(name, int(low), int(high))
        case Range(kind=kind, values=(low, high)):
            return trial.suggest_float(name, low, high, log=kind == "loguniform")
        case (constant,):
            return constant
        case tuple():
            return trial.suggest_categorical(name, axis)
        case _:
            return axis


def _sampler(plan: Plan, number: int) -> BaseSampler:
    """What draws a trial: made anew for each, so that nothing but its number and Optuna's trials decide."""
    seed = _seed(plan, number, "draw")
    match plan.spec.search.method:
        case "tpe":
            with warnings.catch_warnings():
                # `group` keeps each family's own parameters in a joint model; Optuna calls it experimental.
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                return TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True)
        case "gp":
            return GPSampler(seed=seed, warn_independent_sampling=False)
        case "auto":
            chosen: BaseSampler = auto_sampler()(seed=seed)
            return chosen
        case _:
            return RandomSampler(seed=seed)


def auto_sampler() -> Any:
    """The class that chooses among samplers by itself, where an installed package has its code.

    Raises:
        InputError: none has it; nothing is fetched for a study while it runs.
    """
    for module in ("optuna.samplers", "optunahub.samplers"):
        with suppress(ImportError):
            if found := getattr(importlib.import_module(module), "AutoSampler", None):
                return found
    raise InputError(
        "search.method: auto is the AutoSampler of Optuna's hub, which no package that is installed here holds, and a "
        "study fetches no code; make it tpe or gp"
    )


def _seed(plan: Plan, number: int, what: str) -> int:
    return int(hashlib.sha256(f"{plan.spec.seed}:{what}:{number}".encode()).hexdigest()[:8], 16)
