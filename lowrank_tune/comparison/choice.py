"""One best model of a rank, chosen by validation: confirmed, starred, pictured, stored, exported and registered."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from lowrank_tune.measured import ComparisonRow
from lowrank_tune.records import CONTROLS, SLOWER, WEIGHTED, TrialOutcome, sign

Kind = tuple[str, int]
"""A method's name and rank."""
Paired = Callable[[Kind, Kind], tuple[float, float, float]]
"""The mean difference of log ρ between two methods on the same images, and the ends of its interval, NaN without."""
ROUNDING = 1e-6
"""Ratios that differ by no more than this part are equal: float32 factors are no finer."""
AS_NEAR = 0.02
"""How much greater the ρ of a rival may be to count as near: of few images no interval excludes even that a method of
twice the error is level."""


def winners(outcomes: Iterable[TrialOutcome], objective: str) -> list[TrialOutcome]:
    """Choose the best trial of each rank, over all families; of nested ranks, the best that serves the same ones.

    A rank whose trials all lack something that their study requires has none.
    """
    best: dict[tuple[int, ...], TrialOutcome] = {}
    for outcome in (each for each in ranked(outcomes, objective) if each.feasible):
        best.setdefault(outcome.config.ranks, outcome)
    return [best[ranks] for ranks in sorted(best)]


def ranked(outcomes: Iterable[TrialOutcome], objective: str) -> list[TrialOutcome]:
    """Sort the trials that have a model, the best by the objective on the validation images first; equals by number.

    Those that hold what their study requires come before the others.
    """
    with_model = [outcome for outcome in outcomes if outcome.status != "failed" and outcome.best_epoch > 0]
    usable = [outcome for outcome in with_model if math.isfinite(outcome.best.get(objective, math.nan))]
    # What is required of a trial is all or nothing to a best one; to the others, how far they are from it.
    return sorted(
        usable, key=lambda it: (it.config.excess(it.best), sign(objective) * it.best[objective], it.config.number)
    )


def choose(
    rows: Sequence[ComparisonRow],
    outcomes: Sequence[TrialOutcome],
    objective: str,
    nested: Mapping[Kind, Mapping[str, float]] | None = None,
) -> list[ComparisonRow]:
    """Mark the rows of the one best model of each rank, as the validation split tells; the test split has no say.

    Of models that serve several ranks the figures on file are means over them: `nested` has those of each.
    """
    standing = {row.trial_id for row in rows}
    trials = {outcome.config.trial_id: outcome for outcome in outcomes if outcome.config.trial_id in standing}
    best = {outcome.config.trial_id for outcome in winners(trials.values(), objective)}
    figures: dict[Kind, Mapping[str, float]] = {
        (row.method, row.rank): trials[row.trial_id].best
        for row in rows
        if row.trial_id in trials and not trials[row.trial_id].config.nested_ranks
    }
    figures |= nested or {}

    def order(row: ComparisonRow) -> tuple[float, int]:
        own = figures.get((row.method, row.rank), {})
        return sign(objective) * own.get(objective, trials[row.trial_id].best[objective]), row.rank

    chosen: dict[int, ComparisonRow] = {}
    for row in sorted((row for row in rows if row.trial_id in best), key=order):
        # Winners that serve other ranks, after an extension, may share this one.
        chosen.setdefault(row.rank, row)
    places = {(row.method, row.rank): place for place, row in enumerate(chosen.values(), 1)}
    return [
        replace(
            row,
            val_token_cosine=figures.get((row.method, row.rank), {}).get("val_token_cosine"),
            chosen=places.get((row.method, row.rank), 0),
        )
        for row in rows
    ]


def judge(rows: Sequence[ComparisonRow], paired: Paired) -> list[ComparisonRow]:
    """Tell of each trained row which of the SVD and the controls beat it, and which are level with it.

    One that is clearly nearer beats it unless clearly slower, and one that is clearly quicker where it is as near:
    nearer where the interval of the paired difference excludes 0, quicker by more than `SLOWER`. Nothing is said of
    what shares its B, which takes other bytes at the same rank, nor of what is trained to be near in another metric.
    """
    rivals = [row for row in rows if row.method in (*CONTROLS, "svd")]
    rivals.sort(key=lambda rival: (rival.residual_ratio, -rival.images_per_second))
    judged = []
    for row in rows:
        beating, level = [], []
        own = [rival for rival in rivals if rival.rank == row.rank]
        for other in own if row.trial_id and not (row.shared_bytes or row.method.endswith(WEIGHTED)) else ():
            mean, low, high = paired((other.method, other.rank), (row.method, row.rank))
            nearer, as_near = high < -ROUNDING, low <= ROUNDING and mean <= math.log1p(AS_NEAR)
            quicker = other.images_per_second > row.images_per_second * (1 + SLOWER)
            slower = row.images_per_second > other.images_per_second * (1 + SLOWER)
            if (nearer and not slower) or (quicker and as_near):
                beating.append(other.method)
            elif as_near and not (nearer or slower):
                level.append(other.method)
        judged.append(replace(row, beaten_by=", ".join(beating), level_with=", ".join(level)))
    return judged
