"""Real bytes against error in sentences: who wins at a budget, what an error costs, what training saved."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from lowrank_tune.comparison.codecs import Way
from lowrank_tune.comparison.remarks import kib, listed, percent
from lowrank_tune.lowrank.decomposers.shared import Shared
from lowrank_tune.measured import RateRow

TOLD = ("0.01", "0.05", "0.14")
"""The errors that sentences are about: about those of X in int8, int5 and int4."""
BUDGETS = tuple(512 * 2**power for power in range(11))
"""Bytes an image: 0.5 to 512 KiB."""
SHOWN = 5e-4
"""The least saving that is told."""
KINDS: dict[str, Callable[[RateRow], bool]] = {
    "shared": lambda row: row.method == Shared.family,
    "x": lambda row: row.method == "x",
    "factors": lambda row: not (row.method in ("x", Shared.family) or _is_picture(row)),
    "picture": lambda row: _is_picture(row),
}


def rate_words(rates: Sequence[RateRow]) -> list[str]:
    """Say what an image takes at each of `TOLD`, and which way is the nearest at each budget that has one."""
    return [*_at_errors(rates), *_at_budgets(rates)]


def _at_errors(rates: Sequence[RateRow]) -> Iterator[str]:
    for target in TOLD:
        # A way of one error serves where that is within the target on average, as pictures are what they are.
        within = [row for row in rates if row.target in ("", target) and row.relative_error_mean <= float(target)]
        best = [
            min(own, key=lambda row: row.bytes_per_image)
            for is_kind in KINDS.values()
            if (own := [row for row in within if is_kind(row)])
        ]
        if not best:
            continue
        first, *others = [f"{kib(row.bytes_per_image)} as {_told(row)}" for row in best]
        said = f"at {percent(float(target))} error an image takes {', '.join([first, *others])}"
        features = [row for row in best if not _is_picture(row)]
        picture = next((row for row in best if _is_picture(row)), None)
        if picture and features:
            nearest = min(features, key=lambda row: row.bytes_per_image)
            wins = nearest.bytes_per_image < picture.bytes_per_image
            said += f": {'features win' if wins else 'the picture wins'}"
        elif any(map(_is_picture, rates)):
            said += ": the picture comes as near at none of its qualities"
        yield f"{said[0].upper()}{said[1:]}."


def _at_budgets(rates: Sequence[RateRow]) -> Iterator[str]:
    """Name the nearest at no more bytes than each power of two within what was measured, those in a row together."""
    if not rates:
        return
    sizes = [row.bytes_per_image for row in rates]
    budgets = [budget for budget in BUDGETS if min(sizes) <= budget and budget / 2 < max(sizes)]
    winners = [
        min(
            (row for row in rates if row.bytes_per_image <= budget),
            # What meets a target is no nearer for meeting it more closely.
            key=lambda row: (float(row.target or row.relative_error_mean), row.bytes_per_image),
        )
        for budget in budgets
    ]
    pairs = list(zip(budgets, winners, strict=True))
    for name, same in groupby(pairs, key=lambda pair: _name(pair[1])):
        own = list(same)
        at = listed([f"{budget / 1024:g}" for budget, _ in own])
        errors = listed([percent(row.relative_error_mean) for _, row in own])
        yield f"Of the settings measured, {name} comes nearest at {at} KiB an image: {errors} error."


def _is_picture(row: RateRow) -> bool:
    return row.dtype in ("jpeg", "webp")


def _name(row: RateRow) -> str:
    """A way whatever its rank, for people: `shared`, `int5+zlib of X`, `the picture as jpeg-q75`."""
    if _is_picture(row):
        return f"the picture as {row.method}, encoded again"
    if row.method == "x":
        return f"{'uniform steps, coded,' if row.dtype == 'coded' else row.dtype} of X"
    if row.method == "svd":
        return f"the SVD's factors, {row.dtype}"
    return row.method if row.method == Shared.family else f"{row.method}'s factors, {row.dtype}"


def _told(row: RateRow) -> str:
    """A way as the sentence of an error has it."""
    if _is_picture(row):
        rate = f" (encoded again: {row.images_per_second:.3g} images/s)" if row.images_per_second else ""
        return f"its {row.method}{rate}"
    if row.method == Shared.family:
        return f"{row.method} (rank {row.rank})"
    return _name(row)


def training_text(saved: Sequence[tuple[str, Way, tuple[float, float, float] | None]]) -> str:
    """Say what training took off a shared model's bytes at each target: the part saved, and its interval's ends."""
    parts: dict[str, list[str]] = {}
    for target, way, saving in saved:
        if saving is None:
            continue
        part, low, high = saving
        known = math.isfinite(low) and math.isfinite(high)
        verb = (
            "saves" if known and low > SHOWN else "costs" if known and high < -SHOWN else "changes nothing measurable:"
        )
        figure = f"{abs(100 * part) if verb == 'costs' else 100 * part:z.1f} %"
        between = f" ({100 * low:z.1f} to {100 * high:z.1f} saved)" if known else ""
        parts.setdefault(verb, []).append(f"{figure}{between} at {percent(float(target))} error, rank {way.rank}")
    if not parts:
        return ""
    told = "; ".join(f"{verb} {', '.join(figures)}" for verb, figures in parts.items())
    return f"bytes of {saved[0][1].method}, beside the same model before its first epoch: training {told}"
