"""What the language model's figures come to, in sentences."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from lowrank_tune.comparison.compression import ITSELF
from lowrank_tune.comparison.remarks import kib, listed
from lowrank_tune.fidelity.figures import CONTROL
from lowrank_tune.fidelity.ways import CODED, SVD
from lowrank_tune.measured import FACTORS, STAYS, ComparisonRow, FidelityRow
from lowrank_tune.records import WEIGHTED

TRAINED = "trained"
"""The best model of each rank, whatever its family."""
Kind = tuple[str, int]
Fewer = Callable[[Kind, Kind], tuple[float, float, float]]


def fidelity_words(
    rows: Sequence[FidelityRow], compared: Sequence[ComparisonRow], tokens: int, fewer: Fewer
) -> tuple[str, ...]:
    """Say from which rank and bytes on the answers stay, what the controls keep, and which of two methods keeps more.

    `fewer` tells by what part of the questions fewer answers flip with one (method, rank) than with another.
    """
    best = [row for row in rows if row.form == FACTORS and (row.method, row.rank) in _chosen(compared)]
    svd = [row for row in rows if row.form == FACTORS and row.method == SVD]
    weighted = [row for row in rows if row.form == FACTORS and row.method == SVD + WEIGHTED]
    said = [
        *_from_which_rank(best, svd, rows, tokens),
        *_in_few_bits(rows),
        *_against_svd(best, svd, weighted, fewer),
        *_right(rows, best),
    ]
    return tuple(f"{text[0].upper()}{text[1:]}." for text in said)


def stays_from(flips: Sequence[tuple[int, float]], most: float = STAYS) -> int | None:
    """The rank from which on no more than this part flips, given each rank's; None where even the highest flips more.

    One that stays at a low rank by chance, and flips at a higher one, does not stay from there.
    """
    found = None
    for rank, part in sorted(flips, reverse=True):
        if part > most:
            break
        found = rank
    return found


def _chosen(compared: Sequence[ComparisonRow]) -> set[Kind]:
    return {(row.method, row.rank) for row in compared if row.chosen}


def _from_which_rank(
    best: Sequence[FidelityRow], svd: Sequence[FidelityRow], rows: Sequence[FidelityRow], tokens: int
) -> Iterator[str]:
    parts = list[str]()
    coded = [row for row in rows if row.form.startswith(CODED) and row.method != ITSELF and row.answer_flips <= STAYS]
    least = min(coded, key=lambda row: row.bytes_per_image, default=None)
    in_code = f"; {kib(least.bytes_per_image)} coded, {least.method}" if least else ""
    for name, own in ((f"the best {TRAINED} model", best), ("svd", svd)):
        if not own:
            continue
        first = stays_from([(row.rank, row.answer_flips) for row in own])
        if first is None:
            most = min(own, key=lambda row: (row.answer_flips, row.rank))
            told = f"{name} keeps {_kept(most)} of the answers at rank {most.rank}, and at none {_share(1 - STAYS)}"
        elif not parts:
            size = next(row.bytes_per_image for row in own if row.rank == first)
            told = f"from rank {first} ({kib(size)}{in_code}) on, {_share(1 - STAYS)} of the answers stay with {name}"
        else:
            told = f"{name} needs {first}"
        parts.append(told)
    small = next((row for row in rows if row.method == CONTROL), None)
    if small:
        parts.append(f"the half-side image keeps {_kept(small)} at {tokens // 4} tokens")
    if parts:
        yield "; ".join(parts)
    if best and best[0].answer_flips_high is not None:
        sure = stays_from([(row.rank, row.answer_flips_high) for row in best if row.answer_flips_high is not None])
        questions, images = best[0].n_questions, best[0].n_images
        asked = f"{questions} question{'s' * (questions > 1)} about {images} image{'s' * (images > 1)}"
        yield f"by the far end of the interval, of {asked}, {_share(1 - STAYS)} stay " + (
            f"from rank {sure} on" if sure else "at no rank: more questions would tell"
        )


def _in_few_bits(rows: Sequence[FidelityRow]) -> Iterator[str]:
    own = [row for row in rows if row.method == ITSELF and row.form in ("int8", "int4")]
    told = [f"{row.form} of X keeps {_kept(row)} at {kib(row.bytes_per_image)}" for row in own]
    if told:
        yield listed(told)


def _against_svd(
    best: Sequence[FidelityRow], svd: Sequence[FidelityRow], weighted: Sequence[FidelityRow], fewer: Fewer
) -> Iterator[str]:
    """Of the trained and of the weighted optimum, where the interval of the paired difference tells the two apart."""
    ranks = {row.rank for row in svd}
    for name, own in ((f"the best {TRAINED} model", best), (SVD + WEIGHTED, weighted)):
        told, alike = [], []
        for kind in ((row.method, row.rank) for row in own if row.rank in ranks):
            mean, low, high = fewer(kind, (SVD, kind[1]))
            if not math.isfinite(low) or low <= 0 <= high:
                alike.append(str(kind[1]))
                continue
            more = "fewer" if mean > 0 else "more"
            ends = sorted((abs(low), abs(high)))
            told.append(f"{_share(abs(mean))} {more} at rank {kind[1]} ({_share(ends[0])} to {_share(ends[1])})")
        if told:
            yield f"with {name} other answers flip than with svd: {listed(told)}" + (
                f"; at rank {listed(alike)} no difference is measurable" if alike else ""
            )
        elif alike:
            yield f"between {name} and svd no difference in flipped answers is measurable at rank {listed(alike)}"


def _right(rows: Sequence[FidelityRow], best: Sequence[FidelityRow]) -> Iterator[str]:
    itself = rows[0]
    if itself.accuracy is None:
        return
    said = f"X itself is right on {_share(itself.accuracy)} of the questions (VQA accuracy)"
    if changes := [
        f"{100 * row.accuracy_minus_x:+.1f} % at rank {row.rank}" for row in best if row.accuracy_minus_x is not None
    ]:
        said += f", and the best {TRAINED} model {listed(changes)}"
    yield said
    hard = [row for row in best if row.accuracy_hard is not None]
    if hard:
        told = [f"{_share(row.accuracy_hard or 0.0)} at rank {row.rank}" for row in hard]
        yield (
            f"on the {hard[0].n_hard} questions that X answers and the half-side image does not, the best {TRAINED} "
            f"model is right on {listed(told)}"
        )


def _kept(row: FidelityRow) -> str:
    return _share(1 - row.answer_flips)


def _share(part: float) -> str:
    return f"{100 * part:.3g} %"
