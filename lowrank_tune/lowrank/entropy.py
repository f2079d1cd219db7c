"""Whole numbers as symbols of an entropy coder, each by the table of its level, and back.

A level is the logarithm of a scale in quarters of an octave. Numbers of a level that has no table go without their low
bits to one that has, and the bits follow as they are; what lies beyond a table's end is coded by itself. All that has a
say in what is read is whole numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lowrank_tune.lowrank.decomposers.shared import LEAST_RATIO, laplace_bits

OCTAVE = 4
"""Levels an octave: a scale that is off by half of one costs five thousandths of a bit."""
LOWEST, HIGHEST = round(OCTAVE * math.log2(LEAST_RATIO)), 5 * OCTAVE
"""The levels that have a table: below the first a number is 0 and not coded, above the last it has low bits."""
TOTAL = 2**16
"""Of a table's counts."""
TAIL = 12.0
"""Scales from 0 to where a table ends."""
LOW_BITS = 24
"""As many, at most, as can be coded as they are."""
MOST = HIGHEST + LOW_BITS * OCTAVE
"""The highest level."""
MOST_BITS = LOW_BITS + 2
"""Numbers of bits, from none, of what a number is beyond its table's end; the first of them is known to be 1."""

Whole = NDArray[np.int64]
Part = tuple[NDArray[Any], Any]
"""Symbols, and the model that codes them."""


class Tables:
    """A table a level from `LOWEST` to `HIGHEST`: counts out of `TOTAL`, `symbols` of each, one after the other."""

    def __init__(self, counts: NDArray[np.uint32], symbols: NDArray[np.int32]) -> None:
        self._counts = counts
        self._ends = symbols.astype(np.int64) // 2
        self._starts = np.cumsum(symbols) - symbols
        self._bits = -np.log2(counts / TOTAL)

    @cached_property
    def models(self) -> list[Any]:
        """The coder's, one a table."""
        categorical = coder().model.Categorical
        # Counts out of a power of two: as floats, and their sums, they are exact.
        return [categorical(table / TOTAL, perfect=False) for table in np.split(self._counts, self._starts[1:])]

    def parts(self, values: Whole, level: NDArray[np.int16]) -> list[Part]:
        """Return what codes numbers of these levels, in the order of reading."""
        order, table, low = _by_table(level)
        high, symbol = self._split(values.reshape(-1)[order], table, low)
        rest = values.reshape(-1)[order] + (1 << low >> 1) & ((1 << low) - 1)
        return [
            *((symbol[part], self.models[which]) for which, part in _runs(table)),
            *((rest[part], _uniform(1 << bits)) for bits, part in _runs(low) if bits),
            *_beyond(np.abs(high) - self._ends[table]),
        ]

    def read(self, ans: Any, level: NDArray[np.int16]) -> Whole:
        """Read the numbers of these levels that `parts` codes."""
        order, table, low = _by_table(level)
        symbol, rest = np.zeros((2, len(order)), np.int64)
        for which, part in _runs(table):
            symbol[part] = ans.decode(self.models[which], part.stop - part.start)
        for bits, part in _runs(low):
            if bits:
                rest[part] = ans.decode(_uniform(1 << bits), part.stop - part.start)
        high = symbol - self._ends[table]
        outer = np.flatnonzero(np.abs(high) == self._ends[table])
        high[outer] += np.sign(high[outer]) * _read_beyond(ans, len(outer))
        values = np.zeros(level.shape, np.int64)
        values.reshape(-1)[order] = (high << low) + rest - (1 << low >> 1)
        return values

    def bits(self, values: Whole, level: NDArray[np.int16]) -> float:
        """Count the bits of numbers of these levels."""
        order, table, low = _by_table(level)
        high, symbol = self._split(values.reshape(-1)[order], table, low)
        bits = low.sum() + self._bits[self._starts[table] + symbol].sum()
        beyond = (np.abs(high) - self._ends[table])[np.abs(high) >= self._ends[table]]
        extra = np.frexp(beyond.astype(np.float64))[1]
        return float(bits + math.log2(MOST_BITS) * len(extra) + np.maximum(extra - 1, 0).sum())

    def _split(self, values: Whole, table: Whole, low: Whole) -> tuple[Whole, Whole]:
        """Return numbers without their low bits, rounded, and the symbols of these."""
        high, end = (values + (1 << low >> 1)) >> low, self._ends[table]
        return high, np.clip(high, -end, end) + end


def coder() -> Any:
    """`constriction.stream`, loaded by what codes alone: all else here works on machines that lack it."""
    import constriction

    return constriction.stream


def _uniform(size: int) -> Any:
    return coder().model.Uniform(size)


def laplace_counts(ratio: float) -> NDArray[np.int64]:
    """Counts out of `TOTAL`, none of them 0, of the whole numbers -K..K with the tails at the ends, K by the scale."""
    end = math.ceil(TAIL * ratio) + 1
    size = np.arange(end + 1)
    chance = 2.0 ** -laplace_bits(torch.from_numpy(size).double(), torch.tensor(ratio, dtype=torch.float64)).numpy()
    chance[end] = 0.5 * math.exp(-(end - 0.5) / ratio)
    counts = np.maximum(1, np.floor(np.append(chance[:0:-1], chance) * TOTAL)).astype(np.int64)
    counts[end] += TOTAL - counts.sum()
    return counts


def _by_table(levels: NDArray[np.int16]) -> tuple[Whole, Whole, Whole]:
    """Return the places of the numbers that are coded, by rising level, their tables and their low bits."""
    flat = levels.reshape(-1)
    order = np.argsort(flat, kind="stable")
    order = order[np.searchsorted(flat[order], LOWEST) :]
    level = flat[order].astype(np.int64)
    low = np.maximum(0, -((HIGHEST - level) // OCTAVE))
    return order, level - low * OCTAVE - LOWEST, low


def _runs(sorted_values: Whole) -> Iterator[tuple[int, slice]]:
    """Yield each run of equal values with its place."""
    ends = np.append(np.flatnonzero(np.diff(sorted_values)) + 1, len(sorted_values))
    start = 0
    for end in ends.tolist():
        if end > start:
            yield int(sorted_values[start]), slice(start, end)
        start = end


def _beyond(size: Whole) -> list[Part]:
    """What codes by how much numbers lie beyond their tables: how many bits that has, and the bits."""
    beyond = size[size >= 0]
    if not len(beyond):
        return []
    bits = np.frexp(beyond.astype(np.float64))[1]
    return [
        (bits, _uniform(MOST_BITS)),
        *(
            (beyond[bits == count] - (1 << count - 1), _uniform(1 << count - 1))
            for count in np.unique(bits[bits > 1]).tolist()
        ),
    ]


def _read_beyond(ans: Any, number: int) -> Whole:
    """Read what `_beyond` coded of so many numbers."""
    bits = ans.decode(_uniform(MOST_BITS), number).astype(np.int64) if number else np.zeros(0, np.int64)
    beyond: Whole = np.minimum(bits, 1)
    for count in np.unique(bits[bits > 1]).tolist():
        which = np.flatnonzero(bits == count)
        beyond[which] = (1 << count - 1) + ans.decode(_uniform(1 << count - 1), len(which))
    return beyond
