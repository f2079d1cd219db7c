"""The points of a search space, each a mapping of every parameter to its value."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

from lowrank_tune.config.axes import Axis, Range, SpaceSpec, first_value, values_of

SHARED_PARAMS = ("family", "rank", "lr", "weight_decay", "batch_size")
"""What every family is searched for; a point's other values are its family's own."""


EMPTY: Mapping[str, Any] = {}


def grid_points(space: SpaceSpec, fixed: Mapping[str, Any] = EMPTY) -> Iterator[dict[str, Any]]:
    """Every point of a space without ranges of real numbers that agrees with what is fixed.

    Families come in the schema's order, then the axes, the last fastest.
    """
    for family, axes in _families(space, fixed):
        for values in itertools.product(*(values_of(axis) or () for axis in axes.values())):
            yield {"family": family, **dict(zip(axes, values, strict=True))}


def count_points(space: SpaceSpec, fixed: Mapping[str, Any] = EMPTY) -> float:
    """How many points `grid_points` has; infinite where a range of real numbers makes them endless."""
    axes = [[values_of(axis) for axis in own.values()] for _, own in _families(space, fixed)]
    return sum(math.prod(math.inf if values is None else len(values) for values in own) for own in axes)


def _families(space: SpaceSpec, fixed: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for family in space.families.chosen():
        if fixed.get("family", family) == family:
            own = {name: value for name, value in fixed.items() if name != "family"}
            yield family, {**space.axes(family), **own}


def first_params(space: SpaceSpec, family: str | None = None) -> dict[str, Any]:
    """One point to try a study file with: each list's first value, each range's middle."""
    family = family or next(iter(space.families.chosen()))
    axes = space.axes(family).items()
    return {"family": family, **{name: first_value(axis) for name, axis in axes}}


def nearest_point(
    space: SpaceSpec, family: str, wanted: Mapping[str, Any] = EMPTY, fixed: Mapping[str, Any] = EMPTY
) -> dict[str, Any]:
    """The point of a family that is nearest to what is wanted, and to the family's published defaults in all else.

    Those are the defaults of the keys of the space; `fixed` are values that the point must have.
    """
    own = space.families.chosen()[family]
    published = {name: field.default for part in (space, own) for name, field in type(part).model_fields.items()}
    wanted = {**published, **wanted}
    axes = space.axes(family) | {name: value for name, value in fixed.items() if name != "family"}
    return {"family": family, **{name: _nearest(axis, wanted[name]) for name, axis in axes.items()}}


def _nearest(axis: Axis, wanted: Any) -> Any:
    """The value of an axis that is nearest, of numbers by their ratio; of words that are not in it, the first."""
    if isinstance(axis, Range):
        return type(axis.values[0])(min(max(wanted, axis.values[0]), axis.values[1]))
    if not isinstance(axis, tuple):
        return axis
    return min(axis, key=lambda value: _distance(value, wanted))


def _distance(value: Any, wanted: Any) -> float:
    if isinstance(value, str) or isinstance(wanted, str):
        return float(value != wanted)
    # Rounded, so that of two as near the first is taken whatever the logarithms' last digits.
    both = value > 0 and wanted > 0
    return round(abs(math.log(value / wanted)), 9) if both else abs(value - wanted)


def place_in(space: SpaceSpec, point: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """The family of a point that a user gave, and by key why its values are not in the space, where they are not."""
    chosen = space.families.chosen()
    family = point.get("family", next(iter(chosen)))
    if family not in chosen or ("family" not in point and len(chosen) > 1):
        return "", {"family": f"a family of this space is expected: {', '.join(chosen)}"}
    axes, wrong = space.axes(family), dict[str, str]()
    for name, value in point.items():
        if name not in ("family", *axes):
            wrong[name] = f"{family} has no such parameter (it has {', '.join(axes)})"
        elif name != "family" and not _holds(axes[name], value):
            wrong[name] = f"outside search.space, which has {_shown(axes[name])}"
    return family, wrong


def _holds(axis: Axis, value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return False
    if isinstance(axis, Range):
        whole = axis.kind == "int"
        return isinstance(value, int if whole else int | float) and axis.values[0] <= value <= axis.values[1]
    return value in (axis if isinstance(axis, tuple) else (axis,))


def _shown(axis: Axis) -> str:
    if isinstance(axis, Range):
        return f"{axis.values[0]:g} to {axis.values[1]:g}"
    return ", ".join(map(str, axis)) if isinstance(axis, tuple) else f"{axis} alone"
