"""The study file's section on the search: how the space is gone through."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationInfo, field_validator

from lowrank_tune.config.axes import (
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Real,
    Section,
    SpaceSpec,
    Text,
    combinations,
    rejected,
)
from lowrank_tune.config.points import nearest_point, place_in
from lowrank_tune.records import WORST_RATIO

DEFAULT_TRIALS = 20
LARGEST_GRID = 10_000


class BestOfStudy(Section):
    """The best trials of a study that has ended, in the same results directory."""

    study: Text
    """Its id, or the beginning of it."""
    best: PositiveInt = 3
    """How many of each of its ranks; what this space has not becomes the nearest that it has."""


class NoGainSpec(Section):
    """A group of trials that gains nothing more."""

    trials: PositiveInt = 20
    """Trials of the group in a row that were no gain; failed ones count."""
    by: NonNegativeFloat = 0.001
    """The part of the group's best figure by which a trial must be better to be a gain."""


class StopSpec(Section):
    """What ends the search before its trials are used up."""

    hours: PositiveFloat | None = None
    """Of training the search's trials, over all goes; what is at work then keeps a checkpoint, to go on from."""
    target: Real | None = None
    """The objective at which a rank's search ends, on the validation images."""
    no_gain: NoGainSpec | None = None
    """{trials: 20, by: 0.001}: a group that gains no more leaves its share to the others."""
    alike_failures: PositiveInt | None = None
    """So many trials in a row that failed alike: of a group they end its share, of the study all of it."""


class RequireSpec(Section):
    """What a trial must hold on the validation images: no other is called the best of its rank."""

    val_residual_ratio_worst: Annotated[Real, Field(ge=1)] | None = None
    """At most this ρ on every image; not above the rank of the images themselves."""
    bytes: PositiveInt | None = None
    """At most so many bytes an image, mean, in the model's own form: coded, or its factors in float16."""

    def limits(self) -> dict[str, float]:
        """By the figure's name, the most that it may be."""
        named = {WORST_RATIO: self.val_residual_ratio_worst, "val_bytes": self.bytes}
        return {name: float(most) for name, most in named.items() if most is not None}


Point = Annotated[dict[str, Any], Field(json_schema_extra={"additionalProperties": {"type": ["number", "string"]}})]
First = Annotated[
    Annotated[tuple[Point, ...], Tag("<points>")] | Annotated[BestOfStudy, Tag("<study>")],
    Discriminator(lambda value: "<points>" if isinstance(value, list | tuple) else "<study>"),
]


class SearchSpec(Section):
    """How the space is searched."""

    method: Literal["grid", "random", "tpe", "gp", "auto"] = "tpe"
    """Every combination, independent draws, or Optuna's TPE, Gaussian process or own choice (where it is installed)."""
    trials: PositiveInt | None = Field(default=None, validate_default=True)
    """How many trials, 20 by default. A grid's number follows from its axes."""
    deal: Literal["evenly", "freely"] = "evenly"
    """Trials go to the groups of scheduler.compete_within in turn, or the sampler chooses, too."""
    space: SpaceSpec
    """A constant, a list, or a range {uniform|loguniform|int: [low, high]} for each key."""
    stop: StopSpec = StopSpec()
    """What ends it before that, by default nothing; `extend` goes on where that was lifted."""
    require: RequireSpec = RequireSpec()
    """What the best of a rank must hold, beside being the best; by default nothing."""
    first: First = ()
    """Points to try first, [{family: refined, lr: 0.01}], after their family's defaults; or {study: ID, best: 3}."""

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

    @field_validator("first")
    @classmethod
    def _first_is_in_the_space(cls, first: First, info: ValidationInfo) -> First:
        space = info.data.get("space")
        if isinstance(space, SpaceSpec) and isinstance(first, tuple):
            for place, point in enumerate(first):
                for name, reason in place_in(space, point)[1].items():
                    raise rejected(reason, (place, name) if name in point else (place,))
        return first


def given_points(search: SearchSpec) -> tuple[dict[str, Any], ...]:
    """The points of `first` that the file itself gives; what one leaves out has its family's defaults."""
    if isinstance(search.first, BestOfStudy):
        return ()
    space = search.space
    return tuple(nearest_point(space, place_in(space, point)[0], point) for point in search.first)
