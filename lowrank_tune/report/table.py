"""The rank x method table as data: what every rendering of it shows, in one order."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank_tune.records import Comparison, ComparisonRow
from lowrank_tune.report.palette import in_order, is_trained
from lowrank_tune.report.words import best_row


@dataclass(frozen=True, slots=True)
class Cell:
    """One method at one rank.

    Attributes:
        method: its name.
        row: its figures; None where this method has none at this rank.
        best: whether it is the trained method nearest to the optimum at this rank.
    """

    method: str
    row: ComparisonRow | None
    best: bool


@dataclass(frozen=True, slots=True)
class RankGroup:
    """All methods at one rank; every group of a table has the same methods in the same order."""

    rank: int
    cells: tuple[Cell, ...]


def rank_groups(comparison: Comparison) -> list[RankGroup]:
    """Arrange a comparison by rank, then method: bounds, trained families, controls.

    Args:
        comparison: the post-study figures.

    Returns:
        One group a rank, ascending.
    """
    methods = in_order(row.method for row in comparison.rows)
    groups = []
    for rank in sorted({row.rank for row in comparison.rows}):
        rows = {row.method: row for row in comparison.rows if row.rank == rank}
        best = best_row(row for row in rows.values() if is_trained(row.method))
        cells = (Cell(method, rows.get(method), best is not None and rows.get(method) is best) for method in methods)
        groups.append(RankGroup(rank, tuple(cells)))
    return groups
