"""The study file's section on the search: how the space is gone through."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from lowrank_tune.config.axes import PositiveInt, Section, SpaceSpec, combinations, rejected

DEFAULT_TRIALS = 20
LARGEST_GRID = 10_000


class SearchSpec(Section):
    """How the space is searched."""

    method: Literal["grid", "random", "tpe"] = "tpe"
    """Every combination, independent draws, or Optuna's TPE."""
    trials: PositiveInt | None = Field(default=None, validate_default=True)
    """How many trials; 20 by default for random and tpe. A grid's number follows from its axes."""
    deal: Literal["evenly", "freely"] = "evenly"
    """Trials of random and tpe go to the groups of scheduler.compete_within in turn, or the sampler chooses, too."""
    space: SpaceSpec
    """A constant, a list, or a range {uniform|loguniform|int: [low, high]} for each key."""

    @field_validator("trials")
    @classmethod
    def _grid_counts_itself(cls, trials: int | None, info: ValidationInfo) -> int | None:
        if info.data.get("method") != "grid":
            return trials or DEFAULT_TRIALS
        if trials is not None:
            raise rejected("a grid tries every combination of its lists: make it null, or choose method random or tpe")
        return None

    @field_validator("space")
    @classmethod
    def _grid_is_finite(cls, space: SpaceSpec, info: ValidationInfo) -> SpaceSpec:
        if info.data.get("method") != "grid":
            return space
        if ranges := space.ranges():
            reason = "a grid cannot try every value of a range: make it a list, or choose method random or tpe"
            raise rejected(reason, *ranges)
        total = sum(combinations(space.axes(family).values()) or 0 for family in space.families.chosen())
        if total > LARGEST_GRID:
            raise rejected(f"a grid of {total:,} combinations is above {LARGEST_GRID:,}: choose method random or tpe")
        return space
