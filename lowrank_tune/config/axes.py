"""What a value of the search space may be: a constant, a list, or one range.

    rank: 128                          a constant
    rank: [32, 64, 128]                a grid's axis, or a choice
    rank: {int: [16, 128]}             a range of whole numbers
    rank: {nested: [32, 64, 128]}      of ranks alone: one training serves them all
    lr: {loguniform: [1e-4, 1e-2]}     or `uniform`: a range of numbers

A constant is a number here, a list a tuple, a range a `Range`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

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


Kind = Literal["uniform", "loguniform", "int", "nested"]


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers between two bounds, both included; or the `nested` ranks that one training serves, by leading columns."""

    kind: Kind
    values: tuple[float, ...]


_BOUNDS: dict[Kind, Any] = {
    "uniform": Annotated[tuple[NonNegativeFloat, NonNegativeFloat], AfterValidator(_rising)],
    "loguniform": Annotated[tuple[PositiveFloat, PositiveFloat], AfterValidator(_rising)],
    "int": Annotated[tuple[PositiveInt, PositiveInt], AfterValidator(_rising)],
}


@dataclass(frozen=True)
class _Axis:
    """How pydantic reads an axis: by its form, for one wrong number would else be an error of every form.

    A form's tag stands between `<` and `>`, so that an error's path can be told from the keys of the file.
    """

    item: Any
    kinds: tuple[Kind, ...]
    remedy: str

    def __get_pydantic_core_schema__(self, _: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        item: Any = self.item
        unique = Field(min_length=1, json_schema_extra={"uniqueItems": True})
        some = Annotated[tuple[item, ...], unique, AfterValidator(distinct)]
        forms = {"<constant>": handler.generate_schema(item), "<list>": handler.generate_schema(some)}
        for kind in self.kinds:
            values = core_schema.typed_dict_field(handler.generate_schema(_BOUNDS.get(kind, some)))
            mapping = core_schema.typed_dict_schema({kind: values}, extra_behavior="forbid")
            forms[f"<{kind}>"] = core_schema.no_info_after_validator_function(_as_range, mapping)
        return core_schema.tagged_union_schema(
            forms,
            self._form,
            custom_error_type="range",
            custom_error_message=self.remedy,
            serialization=core_schema.plain_serializer_function_ser_schema(_as_written),
        )

    def _form(self, value: Any) -> str | None:
        if isinstance(value, dict):
            return f"<{next(iter(value))}>" if len(value) == 1 and set(value) <= set(self.kinds) else None
        return "<list>" if isinstance(value, list | tuple) else "<constant>"


def _as_range(given: dict[Kind, tuple[float, ...]]) -> Range:
    return Range(*next(iter(given.items())))


def _as_written(axis: Any) -> Any:
    return {axis.kind: list(axis.values)} if isinstance(axis, Range) else axis


MOST_STEPS = 8
"""Of `refined`; with these it is at the optimum up to float32."""

Whole = int | tuple[int, ...] | Range
Axis = float | tuple[float, ...] | Range

_REAL = (("uniform", "loguniform"), "a range is {uniform: [low, high]} or {loguniform: [low, high]}")
_RANKS = "ranks are a list, {int: [low, high]}, or {nested: [rank, rank]} for one training of all"

CountAxis = Annotated[Whole, _Axis(PositiveInt, ("int",), "a range of whole numbers is {int: [low, high]}")]
RankAxis = Annotated[Whole, _Axis(PositiveInt, ("int", "nested"), _RANKS)]
LrAxis = Annotated[Axis, _Axis(PositiveFloat, *_REAL)]
WeightAxis = Annotated[Axis, _Axis(NonNegativeFloat, *_REAL)]


def few_steps(axis: Whole) -> Whole:
    """Refuse more steps than help."""
    if max(whole_values(axis)) > MOST_STEPS:
        raise rejected(f"more than {MOST_STEPS} steps gain nothing: lower it")
    return axis


def combinations(axes: Iterable[Axis]) -> int | None:
    """How many combinations a grid over these axes has; None with a range among them."""
    total = 1
    for axis in axes:
        if isinstance(axis, Range):
            return None
        total *= len(axis) if isinstance(axis, tuple) else 1
    return total


def first_value(axis: Axis) -> float:
    """A value to begin with: the constant, the list's first, or the middle of a range on its own scale."""
    match axis:
        case Range(kind="uniform", values=(low, high)):
            return (low + high) / 2
        case Range(kind="loguniform", values=(low, high)):
            return math.sqrt(low * high)
        case Range(values=values):
            return int(values[0] + values[-1]) // 2
        case tuple():
            return axis[0]
        case constant:
            return constant


def whole_values(axis: Whole) -> tuple[int, ...]:
    """The whole numbers that an axis names, the two bounds of a range among them."""
    if isinstance(axis, Range):
        return tuple(int(value) for value in axis.values)
    return axis if isinstance(axis, tuple) else (axis,)
