"""Replies to questions -> a row a (method, rank, form), with intervals over groups of images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from lowrank_tune.comparison.compression import ITSELF
from lowrank_tune.comparison.intervals import interval, proportion
from lowrank_tune.features.asked import Asked
from lowrank_tune.fidelity.kept import Kept
from lowrank_tune.fidelity.right import accuracy, similarity
from lowrank_tune.fidelity.ways import Wanted
from lowrank_tune.measured import FACTORS, FidelityRow

KINDS = ("method", "rank", "form")
CONTROL = "half-side"
"""The picture of half the side, which many a method loses to."""
_PARTS = {"first_token_flips": "first", "answer_flips": "flip"}
"""Shares of the questions."""
_MEANS = {
    "kl_mean": "kl",
    "loglik_delta_mean": "delta",
    "accuracy": "right",
    "accuracy_minus_x": "gained",
    "anls": "near",
}
_LEAST = {"kl_mean": 0.0, "accuracy": 0.0, "anls": 0.0, "accuracy_hard": 0.0}
_MOST = {"accuracy": 1.0, "anls": 1.0, "accuracy_hard": 1.0}
"""What a figure cannot pass, and so no interval of it."""


def table_of(
    answered: Sequence[Kept],
    wanted: Sequence[Wanted],
    groups: Mapping[str, str],
    right: Mapping[tuple[str, str], Asked],
) -> pd.DataFrame:
    """A row a (method, rank, form, question): what was found, and how right it is where people's answers are known.

    `groups` by the image's key, `right` by that and the question.
    """
    found: list[dict[str, Any]] = []
    for kept in answered:
        people = right[kept.key, kept.question].answers
        for each in wanted:
            reply = kept.replies.get(each.key)
            if reply is None or reply.reason:
                continue
            row = {"method": each.method, "rank": each.rank, "form": each.form, "trial_id": each.trial_id}
            row |= {"key": kept.key, "question": kept.question, "group": groups[kept.key], "text": reply.text}
            row |= {"kl": reply.kl, "first": float(reply.first), "flip": float(reply.flip), "delta": reply.delta}
            row |= {"bytes": reply.bytes, "error": reply.error}
            row |= {"right": accuracy(reply.text, people) if people else None}
            found.append(row | {"near": similarity(reply.text, people) if people else None})
    table = pd.DataFrame(found).astype({"right": float, "near": float})
    itself = table[(table["method"] == ITSELF) & (table["rank"] == 0) & (table["form"] == wanted[0].form)]
    control = table[table["method"] == CONTROL]
    asked = ["key", "question"]
    table = table.join(itself.set_index(asked)["right"].rename("right_x"), on=asked)
    table = table.join(control.set_index(asked)["right"].rename("right_small"), on=asked)
    hard = (table["right_x"] > 0) & (table["right_small"] == 0)
    return table.assign(gained=table["right"] - table["right_x"], hard=table["right"].where(hard))


def fold(table: pd.DataFrame, wanted: Sequence[Wanted], size: Callable[[Wanted], float]) -> tuple[FidelityRow, ...]:
    """Make a row of each form that has a reply, in the order of `wanted`; `size` tells what an image of it takes.

    Of a form that is not the same size for each image it is 0.
    """
    figures: dict[str, Mapping[Any, tuple[float, float, float]]] = {}
    for name, column in _PARTS.items():
        figures[name] = _ends(table, column, proportion)
    for name, column in (*_MEANS.items(), ("accuracy_hard", "hard")):
        figures[name] = _ends(table, column, _around)
    whole = table.groupby([*KINDS], sort=False).agg(
        n_questions=("key", "size"), n_images=("key", "nunique"), n_hard=("hard", "count")
    )
    # An image takes what it takes, however many questions there are about it.
    once = table.drop_duplicates([*KINDS, "key"]).groupby([*KINDS], sort=False)
    whole = whole.join(once.agg(bytes=("bytes", "mean"), relative_error_mean=("error", "mean")))
    rows = []
    for each in wanted:
        kind: Any = (each.method, each.rank, each.form)
        if kind not in whole.index:
            continue
        counts: Any = whole.loc[kind]
        values: dict[str, Any] = {}
        for name, of in figures.items():
            mean, low, high = of.get(kind, (None, None, None))
            low = None if low is None else max(low, _LEAST.get(name, low))
            high = None if high is None else min(high, _MOST.get(name, high))
            if each == wanted[0] and name in _PARTS:  # X against itself, which no further question changes
                low = high = mean
            values |= {name: mean, f"{name}_low": low, f"{name}_high": high}
        rows.append(
            FidelityRow(
                method=each.method,
                rank=each.rank,
                form=each.form,
                n_questions=int(counts["n_questions"]),
                n_images=int(counts["n_images"]),
                bytes_per_image=size(each) or float(counts["bytes"]),
                n_hard=int(counts["n_hard"]),
                relative_error_mean=float(counts["relative_error_mean"]),
                trial_id=each.trial_id,
                **values,
            )
        )
    return tuple(rows)


def fewer_flips(table: pd.DataFrame, kind: tuple[str, int], other: tuple[str, int]) -> tuple[float, float, float]:
    """By what part of the questions fewer answers flip with A·B of one (method, rank) than of another, paired.

    The mean, and the ends of its interval; NaN where there is none.
    """
    asked = ["key", "question"]
    own, theirs = (
        table[(table["method"] == method) & (table["rank"] == rank) & (table["form"] == FACTORS)].set_index(asked)
        for method, rank in (kind, other)
    )
    both = own.assign(fewer=theirs["flip"] - own["flip"]).dropna(subset=["fewer"])
    mean, half = (float(part.iloc[0]) for part in interval(both, "fewer"))
    return mean, mean - half, mean + half


_Fold = Callable[[pd.DataFrame, str, Sequence[str]], tuple[pd.Series, pd.Series, pd.Series]]


def _around(table: pd.DataFrame, column: str, kinds: Sequence[str]) -> tuple[pd.Series, pd.Series, pd.Series]:
    mean, half = interval(table, column, kinds)
    return mean, mean - half, mean + half


def _ends(table: pd.DataFrame, column: str, fold_by: _Fold) -> dict[Any, tuple[Any, Any, Any]]:
    """Of each kind the mean of what is known, and the ends of its interval; None where there are none."""
    known = table[table[column].notna()]
    if known.empty:
        return {}
    ends = pd.concat(fold_by(known, column, KINDS), axis=1).astype(object)
    ends = ends.where(ends.notna(), None)
    return {kind: tuple(values) for kind, values in zip(ends.index, ends.to_numpy().tolist(), strict=True)}
