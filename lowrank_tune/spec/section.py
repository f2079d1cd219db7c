"""What every section of the study file is built from: strict numbers, plain text, and errors that point at a key.

Numbers are strict: a number in quotes, `true` or `8.0` for a count is an error, never silently converted.
"""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field
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
