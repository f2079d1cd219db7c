"""The search space, and what a value of it may be: a constant, a list, or one range.

    rank: 128                          a constant
    rank: [32, 64, 128]                a grid's axis, or a choice
    rank: {int: [16, 128]}             a range of whole numbers
    rank: {nested: [32, 64, 128]}      of ranks alone: one training serves them all
    lr: {loguniform: [1e-4, 1e-2]}     or `uniform`: a range of numbers
    token_transform: [dct, learned]    words have no range

A constant is a number or a word here, a list a tuple, a range a `Range`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetPydanticSchema,
    ValidationInfo,
    field_validator,
    model_validator,
)
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


def rejected(reason: str, *places: tuple[str | int, ...]) -> PydanticCustomError:
    """An error for a validator to raise, at the keys that lead from the validated value to each wrong one."""
    return PydanticCustomError("study", "{reason}", {"reason": reason, "places": places or ((),)})


def distinct(values: tuple[Item, ...]) -> tuple[Item, ...]:
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


def _axis(item: Any, remedy: str, *kinds: Kind) -> GetPydanticSchema:
    """How pydantic reads an axis: by its form, else one wrong number would be an error of every form.

    A form's tag stands between `<` and `>`, so that an error's path can be told from the file's keys.
    """

    def form(value: Any) -> str | None:
        if isinstance(value, dict):
            return f"<{next(iter(value))}>" if len(value) == 1 and set(value) <= set(kinds) else None
        return "<list>" if isinstance(value, list | tuple) else "<constant>"

    def schema(_: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        unique = Field(min_length=1, json_schema_extra={"uniqueItems": True})
        some = Annotated[tuple[item, ...], unique, AfterValidator(distinct)]
        forms = {"<constant>": handler.generate_schema(item), "<list>": handler.generate_schema(some)}
        for kind in kinds:
            values = core_schema.typed_dict_field(handler.generate_schema(_BOUNDS.get(kind, some)))
            mapping = core_schema.typed_dict_schema({kind: values}, extra_behavior="forbid")
            forms[f"<{kind}>"] = core_schema.no_info_after_validator_function(
                lambda given: Range(*next(iter(given.items()))), mapping
            )
        serialization = core_schema.plain_serializer_function_ser_schema(
            lambda axis: {axis.kind: list(axis.values)} if isinstance(axis, Range) else axis
        )
        return core_schema.tagged_union_schema(
            forms, form, custom_error_type="range", custom_error_message=remedy, serialization=serialization
        )

    return GetPydanticSchema(schema)


MOST_STEPS = 8
"""Of `refined`; with these it is at the optimum up to float32."""

Whole = int | tuple[int, ...] | Range
Axis = float | str | tuple[float | str, ...] | Range
TokenTransform = Literal["none", "dct", "learned"]
Metric = Literal["none", "answers"]

_REALS = "a range is {uniform: [low, high]} or {loguniform: [low, high]}"
_RANKS = "ranks are a list, {int: [low, high]}, or {nested: [rank, rank]} for one training of all"

CountAxis = Annotated[Whole, _axis(PositiveInt, "a range of whole numbers is {int: [low, high]}", "int")]
RankAxis = Annotated[Whole, _axis(PositiveInt, _RANKS, "int", "nested")]
PositiveAxis = Annotated[Axis, _axis(PositiveFloat, _REALS, "uniform", "loguniform")]
WeightAxis = Annotated[Axis, _axis(NonNegativeFloat, _REALS, "uniform", "loguniform")]
TransformAxis = Annotated[
    TokenTransform | tuple[TokenTransform, ...],
    _axis(TokenTransform, "none, dct or learned is expected, or a list of them"),
]
MetricAxis = Annotated[Metric | tuple[Metric, ...], _axis(Metric, "none or answers is expected, or a list of them")]


def _few_steps(axis: Whole) -> Whole:
    if max(whole_values(axis)) > MOST_STEPS:
        raise rejected(f"more than {MOST_STEPS} steps gain nothing: lower it")
    return axis


def combinations(axes: Iterable[Axis]) -> int | None:
    """How many combinations a grid over these axes has; None with a range."""
    total = 1
    for axis in axes:
        if isinstance(axis, Range):
            return None
        total *= len(axis) if isinstance(axis, tuple) else 1
    return total


def values_of(axis: Axis) -> Sequence[float | str] | None:
    """Every value of an axis; None of a range of real numbers, which has no end of them."""
    match axis:
        case Range(kind="int", values=(low, high)):
            return range(int(low), int(high) + 1)
        case Range():
            return None
        case tuple():
            return axis
        case constant:
            return (constant,)


def first_value(axis: Axis) -> float | str:
    """The constant, the list's first, or the middle of a range on its own scale."""
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
    """The whole numbers that an axis names, a range's bounds among them."""
    if isinstance(axis, Range):
        return tuple(int(value) for value in axis.values)
    return axis if isinstance(axis, tuple) else (axis,)


class DirectSpace(Section):
    """`direct`: a network regresses both factors."""

    lambda_b: WeightAxis = 1e-4
    """Weight of the mean squared element of B."""
    lambda_ortho: WeightAxis = 1e-3
    """Weight of the distance of A's columns from orthonormality."""


class SketchSpace(Section):
    """`sketch`: a learned sketch of the columns, B in closed form; nothing of its own to search."""


class RefinedSpace(Section):
    """`refined`: a filter of each image's Gram matrix sharpens a basis of its tokens, B in closed form."""

    steps: Annotated[CountAxis, AfterValidator(_few_steps)] = 2
    """Products with the Gram matrix in the filter; a step more brings ρ nearer to 1 and costs time."""
    metric: MetricAxis = "none"
    """How errors weigh: all directions alike, or as they move the language model's answers, which needs fidelity."""


def _absent_is_not_null(schema: dict[str, Any]) -> None:
    """In a file a family with nothing after it is tried with its defaults; None here is one not named."""
    schema["minProperties"] = 1
    for family in schema["properties"].values():
        family.pop("default")


class SharedSpace(Section):
    """`shared`: principal axes of all images' tokens and a token transform, trained for bytes and error at once."""

    token_transform: TransformAxis = "dct"
    """On the token side: none, a DCT over the square grid of tokens, or an orthonormal matrix that is learned."""
    lambda_rate: PositiveAxis = 30.0
    """What the relative error weighs beside bits an element: the greater, the more bytes and the less error."""
    metric: MetricAxis = "none"
    """How errors weigh: all directions alike, or as they move the language model's answers, which needs fidelity."""


class FamiliesSpec(Section):
    """Which decomposers are tried, each with what it alone has; at least one."""

    model_config = ConfigDict(json_schema_extra=_absent_is_not_null)

    direct: DirectSpace | None = None
    """A network regresses both factors; nothing after it, and it has its defaults."""
    sketch: SketchSpace | None = None
    """A learned sketch of the columns, B in closed form; nothing after it, and it has its defaults."""
    refined: RefinedSpace | None = None
    """A basis sharpened by a learned filter, B in closed form; nothing after it, and it has its defaults."""
    shared: SharedSpace | None = None
    """One B for all images, coded in few bytes; nothing after it, and it has its defaults."""

    @field_validator("*", mode="before")
    @classmethod
    def _nothing_after_it(cls, own: Any) -> Any:
        return {} if own is None else own

    @model_validator(mode="after")
    def _at_least_one(self) -> FamiliesSpec:
        if not self.chosen():
            raise rejected(f"at least one family is needed: {', '.join(type(self).model_fields)}")
        return self

    def chosen(self) -> dict[str, Section]:
        """The families to try, in the schema's order."""
        named = ((name, getattr(self, name)) for name in type(self).model_fields)
        return {name: own for name, own in named if own is not None}

    def weighted(self) -> list[str]:
        """The families of which some are trained in the metric of the answers."""
        # Whether the word itself or a list of some.
        return [name for name, own in self.chosen().items() if "answers" in getattr(own, "metric", "none")]

    def limited(self) -> list[str]:
        """The families to try whose rank is that of an image at most; `shared` may have as many as columns."""
        return [name for name, own in self.chosen().items() if not isinstance(own, SharedSpace)]


class SpaceSpec(Section):
    """What is searched."""

    rank: RankAxis = 128
    """R, the columns of A and rows of B; {nested: [16, 32, 64]} trains one model for all of them."""
    lr: PositiveAxis = 1e-3
    """AdamW's learning rate at the start."""
    weight_decay: WeightAxis = 1e-5
    """AdamW's decoupled weight decay."""
    batch_size: CountAxis = 8
    """Images a step."""
    families: FamiliesSpec
    """Which decomposers are tried, each with what it alone has; at least one."""

    @field_validator("families")
    @classmethod
    def _ordered_where_nested(cls, families: FamiliesSpec, info: ValidationInfo) -> FamiliesSpec:
        rank = info.data.get("rank")
        if isinstance(rank, Range) and rank.kind == "nested" and families.direct is not None:
            reason = "nested ranks need an ordered basis, which direct has not: remove it, or make rank a list"
            raise rejected(reason, ("direct",))
        return families

    @property
    def nested_ranks(self) -> tuple[int, ...]:
        """The ranks that each training serves, rising; empty where each serves its own."""
        nested = isinstance(self.rank, Range) and self.rank.kind == "nested"
        return tuple(sorted(whole_values(self.rank))) if nested else ()

    def axes(self, family: str) -> dict[str, Axis]:
        """What a trial of a family chooses, what every family has first; of nested ranks the highest is the rank."""
        own = self.families.chosen()[family]
        shared = {name: getattr(self, name) for name in type(self).model_fields if name != "families"}
        if self.nested_ranks:
            shared["rank"] = self.nested_ranks[-1]
        return {**shared, **{name: getattr(own, name) for name in type(own).model_fields}}

    def ranges(self) -> list[tuple[str, ...]]:
        places: dict[tuple[str, ...], None] = {}
        for family in self.families.chosen():
            for name, axis in self.axes(family).items():
                if isinstance(axis, Range):
                    places[(name,) if name in type(self).model_fields else ("families", family, name)] = None
        return list(places)
