"""The study file's search space, asked of Optuna one value at a time.

The family comes first, then what every family has, then what this one alone has: a parameter that a family does not use
is never drawn for it. A value that does not vary is not a parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optuna.trial import BaseTrial

from lowrank_tune.spec.axes import Axis, IntRange, LogUniformRange, UniformRange
from lowrank_tune.spec.schema import SpaceSpec

_SHARED = ("family", "rank", "lr", "weight_decay", "batch_size")


def suggest(trial: BaseTrial, space: SpaceSpec) -> dict[str, Any]:
    """Draw one point.

    Args:
        trial: an Optuna trial, fresh from `ask`; a family's own parameters are known to it as `family.parameter`.
        space: the study file's.

    Returns:
        `family`, `rank`, `lr`, `weight_decay`, `batch_size` and the family's own parameters by their plain names.
    """
    family = _draw(trial, "family", tuple(space.families.chosen()))
    axes = space.axes(family)
    return {"family": family, **{name: _draw(trial, _optuna_name(family, name), axes[name]) for name in axes}}


def optuna_params(point: Mapping[str, Any]) -> dict[str, Any]:
    """A point's values under the names that `suggest` draws them by."""
    return {_optuna_name(point["family"], name): value for name, value in point.items()}


def _optuna_name(family: str, name: str) -> str:
    return name if name in _SHARED else f"{family}.{name}"


def _draw(trial: BaseTrial, name: str, axis: Axis | str | tuple[str, ...]) -> Any:
    match axis:
        case UniformRange(uniform=(low, high)):
            return trial.suggest_float(name, low, high)
        case LogUniformRange(loguniform=(low, high)):
            return trial.suggest_float(name, low, high, log=True)
        case IntRange(int=(low, high)):
            return trial.suggest_int(name, low, high)
        case (constant,):
            return constant
        case tuple():
            return trial.suggest_categorical(name, axis)
        case _:
            return axis
