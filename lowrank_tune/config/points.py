"""The points of a search space, each a mapping of every parameter to its value, and the groups they are searched in."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

from lowrank_tune.config.axes import SpaceSpec, first_value, values_of
from lowrank_tune.config.schema import StudySpec

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


def search_groups(spec: StudySpec) -> list[dict[str, Any]]:
    """What is the same for all trials of each group that is searched for itself: `{"family": …, "rank": …}` or less."""
    within = spec.scheduler.compete_within if spec.search.deal == "evenly" else ()
    groups: list[dict[str, Any]] = []
    for family in spec.search.space.families.chosen():
        axis = spec.search.space.axes(family)["rank"]
        # A range has no group for each of its ranks.
        ranks = axis if isinstance(axis, tuple) and "rank" in within else ()
        own = {"family": family} if "family" in within else {}
        groups += [own | {"rank": rank} for rank in ranks] or [own]
    return [group for place, group in enumerate(groups) if group not in groups[:place]]


def first_params(spec: StudySpec, family: str | None = None) -> dict[str, Any]:
    """One point to try a study file with: each list's first value, each range's middle."""
    family = family or next(iter(spec.search.space.families.chosen()))
    axes = spec.search.space.axes(family).items()
    return {"family": family, **{name: first_value(axis) for name, axis in axes}}
