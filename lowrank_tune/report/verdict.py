"""What a reader wants first: the best of each rank, how far it is from the optimum, and which rank to take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowrank_tune.records import Comparison, ComparisonRow
from lowrank_tune.report.palette import CONTROLS, is_trained
from lowrank_tune.report.spectrum import Spectrum
from lowrank_tune.report.words import best_row, cosine_text, ratio_text

WANTED = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
"""Token cosines that a reader may want to keep."""
_LEVEL = 1e-3


@dataclass(frozen=True, slots=True)
class RankVerdict:
    """The methods that matter at a rank.

    Attributes:
        rank: R.
        svd: the bound, where it was measured.
        trained: the best trained method, where there is one.
        control: the best method without training beside the SVDs, where there is one.
    """

    rank: int
    svd: ComparisonRow | None
    trained: ComparisonRow | None
    control: ComparisonRow | None

    @property
    def word(self) -> str:
        """The judgement in a few words, `0.4 % above the least possible error; beats every control`."""
        if self.trained is None:
            return "no trained model"
        text = excess_text(self.trained.residual_ratio_mean)
        if self.control is None:
            return text
        ours, theirs = self.trained.residual_ratio_mean, self.control.residual_ratio_mean
        if abs(ours - theirs) < _LEVEL:
            return f"{text}; level with {self.control.method}"
        if ours < theirs:
            return f"{text}; beats every control"
        return f"{text}; {self.control.method}, without training, is nearer"


@dataclass(frozen=True, slots=True)
class Choice:
    """Which rank keeps a token cosine.

    Attributes:
        cosine: what is wanted.
        svd_rank: the least rank at which the SVD keeps it; None when it is not known or no rank does.
        row: the trained row of the lowest rank compared that keeps it; None where none does.
    """

    cosine: float
    svd_rank: int | None
    row: ComparisonRow | None


def verdicts(comparison: Comparison) -> list[RankVerdict]:
    """Judge every rank of a comparison, by rising rank."""
    found = []
    for rank in sorted({row.rank for row in comparison.rows}):
        rows = [row for row in comparison.rows if row.rank == rank]
        found.append(
            RankVerdict(
                rank,
                next((row for row in rows if row.method == "svd"), None),
                best_row(row for row in rows if is_trained(row.method)),
                best_row(row for row in rows if row.method in CONTROLS),
            )
        )
    return found


def choices(comparison: Comparison, spectrum: Spectrum | None) -> list[Choice]:
    """Say which rank keeps which token cosine.

    Args:
        comparison: the post-study figures.
        spectrum: of the test images; None leaves the SVD's rank unknown.

    Returns:
        From the highest cosine that the lowest rank compared keeps to the first one that no rank does; none without a
        trained method.
    """
    trained = sorted((row for row in comparison.rows if is_trained(row.method)), key=_by_rank)
    if not trained:
        return []
    found = []
    for cosine in WANTED:
        row = next((row for row in trained if row.token_cosine_mean >= cosine), None)
        found.append(Choice(cosine, spectrum.rank_for(cosine) if spectrum else None, row))
    first = max((place for place, choice in enumerate(found) if _is_lowest(choice, trained)), default=0)
    last = next((place for place, choice in enumerate(found) if choice.row is None), len(found) - 1)
    return found[first : last + 1]


def rank_sentence(found: Sequence[Choice]) -> str:
    """Say in one sentence which rank to take; empty where there is nothing to say."""
    kept = [choice for choice in found if choice.row is not None]
    lost = next((choice for choice in found if choice.row is None), None)
    if not kept and lost is None:
        return ""
    parts = []
    if kept and kept[-1].row is not None:
        choice, row = kept[-1], kept[-1].row
        needs = f"; the SVD itself needs rank {choice.svd_rank}" if choice.svd_rank else ""
        parts.append(
            f"To keep a token cosine of {choice.cosine:g}, take rank {row.rank}, the lowest of those compared at which "
            f"a trained model does ({row.method}, {cosine_text(row.token_cosine_mean)}{needs})."
        )
    if lost is not None:
        needs = f", which takes the SVD rank {lost.svd_rank}" if lost.svd_rank else ""
        parts.append(f"No rank compared keeps {lost.cosine:g}{needs}.")
    return " ".join(parts)


def excess_text(ratio: float) -> str:
    """A residual ratio as people say it: `0.4 % above the least possible error`."""
    excess = (ratio - 1) * 100
    if excess < 0.05:
        return "at the least possible error"
    if excess < 100:
        return f"{excess:.1f} % above the least possible error"
    return f"{ratio_text(ratio)} times the least possible error"


def _by_rank(row: ComparisonRow) -> tuple[int, float]:
    return row.rank, -row.token_cosine_mean


def _is_lowest(choice: Choice, trained: Sequence[ComparisonRow]) -> bool:
    return choice.row is not None and choice.row.rank == trained[0].rank
