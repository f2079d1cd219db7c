"""The points of a search space, each a mapping of every parameter to its value, and the groups they are searched in."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from lowrank_tune.config.axes import first_value
from lowrank_tune.config.schema import StudySpec

SHARED_PARAMS = ("family", "rank", "lr", "weight_decay", "batch_size")
"""What every family is searched for; a point's other values are its family's own."""


def grid_points(spec: StudySpec) -> Iterator[dict[str, Any]]:
    """Every combination of a space without ranges: families in the schema's order, then the axes, the last fastest."""
    for family in spec.search.space.families.chosen():
        axes = spec.search.space.axes(family)
        for values in itertools.product(*(axis if isinstance(axis, tuple) else (axis,) for axis in axes.values())):
            yield {"family": family, **dict(zip(axes, values, strict=True))}


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
