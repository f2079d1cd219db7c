"""What a value of the search space may be: a constant, a list, or one range.

    rank: 128                          a constant
    rank: [32, 64, 128]                a grid's axis, or a choice
    rank: {int: [16, 128]}             a range of whole numbers
    rank: {nested: [32, 64, 128]}      of ranks alone: one training serves them all
    lr: {loguniform: [1e-4, 1e-2]}     or `uniform`: a range of numbers

A union's tag stands between `<` and `>`, so that an error's path can be told from the keys of the file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

PositiveInt = Annotated[int, Field(strict=True, ge=1)]
Real = Annotated[float, Field(strict=True)]
PositiveFloat = Annotated[Real, Field(gt=0)]
NonNegativeFloat = Annotated[Real, Field(ge=0)]
Text = Annotated[str, Field(min_length=1, pattern=r"^[^\x00-\x1f\x7f]*$")]

Item = TypeVar("Item")


class Section(BaseModel):
    """A mapping of the study file: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


def rejected(reason: str, *places: tuple[str, ...]) -> PydanticCustomError:
    """An error for a validator to raise, with its reason as it is.

    Args:
        reason: what is wrong and what to do.
        places: the keys that lead from the validated value to each wrong one; the value itself when there are none.
    """
    return PydanticCustomError("study", "{reason}", {"reason": reason, "places": places or ((),)})


def distinct(values: tuple[Item, ...]) -> tuple[Item, ...]:
    """Refuse a list that holds a value twice."""
    for position, value in enumerate(values):
        if value in values[:position]:
            raise rejected(f"{value} is in the list twice: remove one")
    return values


def _rising(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[0] >= bounds[1]:
        raise rejected("the low end of a range must be below its high end: [low, high]")
    return bounds


class UniformRange(Section):
    """Any number between two bounds, both included."""

    uniform: Annotated[tuple[NonNegativeFloat, NonNegativeFloat], AfterValidator(_rising)]
    """[low, high]"""


class LogUniformRange(Section):
    """Any positive number between two bounds, its logarithm uniform."""

    loguniform: Annotated[tuple[PositiveFloat, PositiveFloat], AfterValidator(_rising)]
    """[low, high]"""


class IntRange(Section):
    """Any whole number between two bounds, both included."""

    int: Annotated[tuple[PositiveInt, PositiveInt], AfterValidator(_rising)]
    """[low, high]"""


class NestedRanks(Section):
    """Ranks that one training serves, by leading columns of one ordered basis; the highest is the model's rank."""

    nested: Annotated[
        tuple[PositiveInt, ...],
        Field(min_length=1, json_schema_extra={"uniqueItems": True}),
        AfterValidator(distinct),
    ]
    """[rank, rank, …]"""


Range = UniformRange | LogUniformRange | IntRange
Axis = float | tuple[float, ...] | Range


def _form(value: Any, ranges: Sequence[str]) -> str | None:
    """The tag of the one form that a value has; without it, one wrong number would be an error of every form."""
    if isinstance(value, Section):
        return next((f"<{name}>" for name in ranges if name in type(value).model_fields), None)
    if isinstance(value, dict):
        return f"<{next(iter(value))}>" if len(value) == 1 and set(value) <= set(ranges) else None
    return "<list>" if isinstance(value, list | tuple) else "<constant>"


def _whole_form(value: Any) -> str | None:
    return _form(value, ["int"])


def _rank_form(value: Any) -> str | None:
    return _form(value, ["int", "nested"])


def _real_form(value: Any) -> str | None:
    return _form(value, ["uniform", "loguniform"])


_WHOLE = Discriminator(
    _whole_form,
    custom_error_type="range",
    custom_error_message="a range of whole numbers is {int: [low, high]}",
)
_RANK = Discriminator(
    _rank_form,
    custom_error_type="range",
    custom_error_message="ranks are a list, {int: [low, high]}, or {nested: [rank, rank]} for one training of all",
)
_REAL = Discriminator(
    _real_form,
    custom_error_type="range",
    custom_error_message="a range is {uniform: [low, high]} or {loguniform: [low, high]}",
)

MOST_STEPS = 8
"""Of `refined`; with these it is at the optimum up to float32."""


def _few_steps(axis: int | tuple[int, ...] | IntRange) -> int | tuple[int, ...] | IntRange:
    if largest_value(axis) > MOST_STEPS:
        raise rejected(f"more than {MOST_STEPS} steps gain nothing: lower it")
    return axis


_Counts = (
    Annotated[PositiveInt, Tag("<constant>")]
    | Annotated[
        tuple[PositiveInt, ...],
        Field(min_length=1, json_schema_extra={"uniqueItems": True}),
        AfterValidator(distinct),
        Tag("<list>"),
    ]
    | Annotated[IntRange, Tag("<int>")]
)
CountAxis = Annotated[_Counts, _WHOLE]
RankAxis = Annotated[_Counts | Annotated[NestedRanks, Tag("<nested>")], _RANK]
StepsAxis = Annotated[CountAxis, AfterValidator(_few_steps)]
LrAxis = Annotated[
    Annotated[PositiveFloat, Tag("<constant>")]
    | Annotated[
        tuple[PositiveFloat, ...],
        Field(min_length=1, json_schema_extra={"uniqueItems": True}),
        AfterValidator(distinct),
        Tag("<list>"),
    ]
    | Annotated[UniformRange, Tag("<uniform>")]
    | Annotated[LogUniformRange, Tag("<loguniform>")],
    _REAL,
]
WeightAxis = Annotated[
    Annotated[NonNegativeFloat, Tag("<constant>")]
    | Annotated[
        tuple[NonNegativeFloat, ...],
        Field(min_length=1, json_schema_extra={"uniqueItems": True}),
        AfterValidator(distinct),
        Tag("<list>"),
    ]
    | Annotated[UniformRange, Tag("<uniform>")]
    | Annotated[LogUniformRange, Tag("<loguniform>")],
    _REAL,
]


def combinations(axes: Iterable[Axis]) -> int | None:
    """How many combinations a grid over these axes has; None with a range among them."""
    total = 1
    for axis in axes:
        if isinstance(axis, Section):
            return None
        total *= len(axis) if isinstance(axis, tuple) else 1
    return total


def first_value(axis: Axis) -> float:
    """A value to begin with: the constant, the list's first, or the middle of a range on its own scale."""
    match axis:
        case UniformRange(uniform=(low, high)):
            return (low + high) / 2
        case LogUniformRange(loguniform=(low, high)):
            return math.sqrt(low * high)
        case IntRange(int=(low, high)):
            return (low + high) // 2
        case tuple():
            return axis[0]
        case constant:
            return constant


def largest_value(axis: int | tuple[int, ...] | IntRange | NestedRanks) -> int:
    """The highest whole number that an axis can give."""
    if isinstance(axis, IntRange):
        return axis.int[1]
    if isinstance(axis, NestedRanks):
        return max(axis.nested)
    return max(axis) if isinstance(axis, tuple) else axis


def smallest_value(axis: int | tuple[int, ...] | IntRange | NestedRanks) -> int:
    """The lowest whole number that an axis can give."""
    if isinstance(axis, IntRange):
        return axis.int[0]
    if isinstance(axis, NestedRanks):
        return min(axis.nested)
    return min(axis) if isinstance(axis, tuple) else axis
