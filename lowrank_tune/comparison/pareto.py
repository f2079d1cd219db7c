"""Two trade-offs of a finished study: which candidates are worth having, whatever the price.

`search`: rank against validation MSE, over the trials. MSE and not the residual ratio, which is relative to the optimum
of its own rank and so says nothing about one rank beside another.

`storage`: bytes an image against token cosine on the test split, over all methods of the comparison.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

from lowrank_tune.records import ComparisonRow, Front, FrontPoint, TrialOutcome


def pareto_fronts(outcomes: Iterable[TrialOutcome], rows: Iterable[ComparisonRow]) -> tuple[Front, ...]:
    """Work out both trade-offs.

    Args:
        outcomes: every trial of the study. Pruned ones are candidates, for they have a model; those without one are
            not, nor those of nested ranks, whose figures are means over several ranks.
        rows: the comparison's.

    Returns:
        `search`, where it has a candidate, and `storage`.
    """
    trials = [
        FrontPoint(config.family, config.rank, x=config.rank, y=trial.best["val_mse"], trial_id=config.trial_id)
        for trial, config in ((trial, trial.config) for trial in outcomes)
        if trial.status != "failed" and "val_mse" in trial.best and not config.nested_ranks
    ]
    methods = [
        FrontPoint(row.method, row.rank, x=row.bytes_per_image, y=row.token_cosine_mean, trial_id=row.trial_id)
        for row in rows
    ]
    search = Front("search", "rank", "val_mse", "lower", _marked(trials, "lower"))
    storage = Front("storage", "bytes_per_image", "token_cosine_mean", "higher", _marked(methods, "higher"))
    return tuple(front for front in (search, storage) if front.points)


def _marked(points: Sequence[FrontPoint], better: Literal["lower", "higher"]) -> tuple[FrontPoint, ...]:
    """Sort candidates by what they cost and mark those that none dominates; equals stand or fall together."""
    sign = 1.0 if better == "lower" else -1.0
    marked: list[FrontPoint] = []
    best: tuple[float, float] | None = None
    for point in sorted(points, key=lambda point: (point.x, sign * point.y)):
        cost = (point.x, sign * point.y)
        on_front = best is None or cost[1] < best[1] or cost == best
        best = cost if on_front else best
        marked.append(replace(point, on_front=on_front))
    return tuple(marked)
