"""A study's objective: one figure of its trials, or bytes and error at once."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag

from lowrank_tune.config.axes import rejected
from lowrank_tune.records import BYTES_AND_ERROR, BYTES_AT_ERROR


def _both(objectives: tuple[str, ...]) -> tuple[str, ...]:
    if sorted(objectives) != sorted(BYTES_AND_ERROR):
        raise rejected(f"two objectives are [{', '.join(BYTES_AND_ERROR)}]; a single one is a word, without brackets")
    return BYTES_AND_ERROR


_Pair = Field(json_schema_extra={"minItems": 2, "maxItems": 2, "uniqueItems": True})
Objective = Annotated[
    Annotated[
        Literal["val_residual_ratio", "val_mse", "val_token_cosine", "val_bytes_at_error"], Tag("<one objective>")
    ]
    | Annotated[tuple[Literal["val_bytes", "val_error"], ...], _Pair, AfterValidator(_both), Tag("<two>")],
    Discriminator(lambda value: "<two>" if isinstance(value, list | tuple) else "<one objective>"),
]


def no_ratio(rank: int, tokens: int, dim: int | None = None) -> str:
    """Why a study with this rank cannot be steered by ρ, and what serves."""
    least = f"the {tokens} tokens of an image" if dim is None or tokens <= dim else f"the {dim} columns of an image"
    return (
        f"ρ has no meaning at rank {rank}, for from {least} on the optimum has no error: "
        f"make it {BYTES_AT_ERROR}, [{', '.join(BYTES_AND_ERROR)}], val_mse or val_token_cosine, or lower the rank"
    )
