"""Coefficients of a `shared` model as bytes, by a real entropy coder, at the error or size that is asked for.

An image is its size and step, as powers of two, and its rounded coefficients [T, R] as asymmetric numeral systems
(`constriction`; Bamler, 2022) code them:

    level = scale − step + adaptation · surprise      in quarters of an octave, whole numbers throughout
    chances of a coefficient = the table of its level: counts out of 2¹⁶ of a Laplace distribution's whole numbers

`scale` is learned for each coefficient, and the surprise is by how much the component's coefficients in earlier groups
of tokens were larger than expected. A large one's low bits go as they are. Whoever decodes computes with whole numbers
and stored tables alone, and finds the same coefficients on any machine.

T tokens, D dim, R rank, L levels, K symbols, G groups.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import constriction
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from torch import Tensor

from lowrank_tune.errors import InputError
from lowrank_tune.files import write_whole
from lowrank_tune.lowrank.decomposers.shared import (
    FADING,
    LEAST_RATIO,
    PACE,
    PRIOR,
    SMALL,
    Shared,
    borders,
    expected_size,
    laplace_bits,
)

OCTAVE = 4
"""Levels an octave: a scale that is off by half of one costs five thousandths of a bit."""
FINE = 32
"""Steps of the step's and the size's logarithm a level."""
LOWEST, HIGHEST = round(OCTAVE * math.log2(LEAST_RATIO)), 5 * OCTAVE
"""The levels that have a table: below the first a coefficient is 0, above the last its low bits are as they are."""
TOTAL = 2**16
"""Of a table's counts."""
TAIL = 12.0
"""Scales from 0 to where a table ends; what is beyond is coded by itself."""
WEIGHT, TURN = 2**20, 16
"""What 1 is in the weights of the surprise, and in the adaptation."""
MOST_BITS = 32
"""Bits of what a coefficient is beyond its table's end, at most."""
FINEST = -12 * OCTAVE * FINE
"""The least step: a relative error of about 1e-4."""
CLOSE = 0.998
"""Of the error that is allowed, what is near enough."""
HEADER = struct.Struct("<hhI")
"""The image's size, its step, and the checksum of the rest."""
ZERO = -(2**15)
"""In place of the size of an image that holds nothing but zeros."""

Whole = NDArray[np.int64]
_uniform = constriction.stream.model.Uniform


class UnreachableError(InputError):
    """No step makes this image as near, or as small, as is asked for."""


class Codebook:
    """What the coded images of a data set share; `make_codebook` makes it of a model, `load` reads it.

    Attributes:
        tokens: T, rows of each X.
        dim: D, its columns.
        rank: R, the coefficients of a token.
        shared_bytes: what is kept once for the data set.
    """

    def __init__(self, arrays: dict[str, NDArray[Any]]) -> None:
        self._arrays = arrays
        self.rank, self.dim = arrays["basis"].shape
        self.tokens = len(arrays["transform"])
        self.shared_bytes = sum(array.nbytes for array in arrays.values())
        self._basis_RD, self._mean_D, self._transform_TT = (
            torch.from_numpy(arrays[name]) for name in ("basis", "mean", "transform")
        )
        self._scale_TR = arrays["scale"].astype(np.int32)
        groups = int(arrays["group"].max()) + 1
        self._groups = [np.flatnonzero(arrays["group"] == group) for group in range(groups)]
        counts = np.split(arrays["counts"], np.cumsum(arrays["symbols"])[:-1])
        # Counts out of a power of two: as floats, and their sums, they are exact.
        self._tables = [constriction.stream.model.Categorical(table / TOTAL, perfect=False) for table in counts]
        self._ends = arrays["symbols"].astype(np.int64) // 2
        self._starts = np.cumsum(arrays["symbols"]) - arrays["symbols"]
        self._bits = -np.log2(arrays["counts"] / TOTAL)
        # Largest scales first: at any step, the coefficients that are coded lead.
        self._order = np.argsort(-self._scale_TR, axis=None, kind="stable")
        self._falling = self._scale_TR.reshape(-1)[self._order]

    def save(self, path: Path) -> None:
        """Write it as a safetensors file."""
        data = save(self._arrays)
        write_whole(path, lambda temporary: temporary.write_bytes(data))

    @classmethod
    def load(cls, path: Path) -> Codebook:
        """Read what `save` wrote; an InputError where it is missing or none."""
        try:
            return cls(load_file(path))
        except (OSError, SafetensorError, KeyError, ValueError, IndexError) as error:
            raise InputError(f"{path}: not a codebook ({error}); apply the model again") from error

    def encode(self, x_TD: Tensor, *, target_error: float | None = None, max_bytes: int | None = None) -> bytes:
        """Write one image: the coarsest stream within a relative error, or the finest within a size.

        Args:
            x_TD: finite [T, D].
            target_error: ‖X − Y‖ / ‖X‖ at most.
            max_bytes: the stream's length at most.

        Raises:
            UnreachableError: The rank does not suffice for the error, or the bytes for anything.
        """
        size, image = self._open(x_TD)
        if image is None:
            return _sealed(ZERO, 0, b"")
        if max_bytes is None:
            step = image.step_within(target_error or 0.0)
            return _sealed(size, step, self._write(image.rounded(step), step))
        low, high, best = FINEST, (int(self._falling[0]) - LOWEST + 1) * FINE, b""
        while low < high:  # the length falls as the step grows
            step = (low + high) // 2
            stream = _sealed(size, step, self._write(image.rounded(step), step))
            low, high, best = (low, step, stream) if len(stream) <= max_bytes else (step + 1, high, best)
        if not best:
            raise UnreachableError(f"no stream of this image has {max_bytes} bytes or less; allow more")
        return best

    def count(self, x_TD: Tensor, *, target_error: float | None = None, step: float = 1.0) -> tuple[int, float]:
        """Count what `encode` would write, by the tables' chances: within an error, or rounded by a step.

        Returns the bytes, a word more or less, and the relative error. A step is over the image's root mean square.
        """
        _, image = self._open(x_TD)
        if image is None:
            return HEADER.size, 0.0
        place = image.step_within(target_error) if target_error else max(FINEST, round(OCTAVE * FINE * math.log2(step)))
        bits = sum(self._length(values, level) for values, level in self._walk(image.rounded(place), place))
        return HEADER.size + 4 * math.ceil(bits / 32), image.error(place)

    def _open(self, x_TD: Tensor) -> tuple[int, _Image | None]:
        """An image's size and coefficients; None of one that holds nothing but zeros."""
        x = x_TD.double()
        energy = float(x.square().sum())
        if energy == 0:
            return ZERO, None
        size = round(OCTAVE * FINE * math.log2(energy / x.numel()) / 2)
        unit_TD = (x / _power(size)).float() - self._mean_D
        return size, _Image(self, unit_TD, energy / _power(size) ** 2)

    def decode(self, stream: bytes) -> Tensor:
        """Read an image back, float32 [T, D]; a ValueError where the stream is cut short or damaged."""
        if len(stream) < HEADER.size:
            raise ValueError(f"{len(stream)} bytes, and {HEADER.size} are the least")
        size, step, check = HEADER.unpack_from(stream)
        payload = stream[HEADER.size :]
        if check != zlib.crc32(payload, (size * 2**16 + step) % 2**32):
            raise ValueError("its checksum is not that of its bytes")
        if size == ZERO:
            return torch.zeros(self.tokens, self.dim)
        whole_TR = self._read(np.frombuffer(payload, "<u4").astype(np.uint32), step)
        z_TR = torch.from_numpy(whole_TR).float() * _power(step)
        unit_TD = (self._transform_TT.mT @ z_TR) @ self._basis_RD + self._mean_D
        return (unit_TD.double() * _power(size)).float()

    def _write(self, whole_TR: Whole, step: int) -> bytes:
        """Code rounded coefficients; ANS is a stack, so that what is read first is written last."""
        parts: list[tuple[NDArray[Any], Any]] = []
        for values, level in self._walk(whole_TR, step):
            order, table, low = _by_table(level)
            high, symbol = self._split(values.reshape(-1)[order], table, low)
            parts += [(symbol[part], self._tables[which]) for which, part in _runs(table)]
            rest = values.reshape(-1)[order] + (1 << low >> 1) & ((1 << low) - 1)
            parts += [(rest[part], _uniform(1 << bits)) for bits, part in _runs(low) if bits]
            parts += _beyond(np.abs(high) - self._ends[table])
        coder = constriction.stream.stack.AnsCoder()
        for symbols, model in reversed(parts):
            coder.encode_reverse(symbols.astype(np.int32), model)
        return bytes(coder.get_compressed().astype("<u4").tobytes())

    def _read(self, words: NDArray[np.uint32], step: int) -> Whole:
        """Decode what `_write` coded at this step."""
        coder = constriction.stream.stack.AnsCoder(words)
        whole_TR = np.zeros((self.tokens, self.rank), np.int64)
        past_2R = np.zeros((2, self.rank), np.int64)
        for rows in self._groups:
            plain = self._plain(rows, step)
            order, table, low = _by_table(self._adapted(plain, past_2R))
            symbol, rest = np.zeros((2, len(order)), np.int64)
            for which, part in _runs(table):
                symbol[part] = coder.decode(self._tables[which], part.stop - part.start)
            for bits, part in _runs(low):
                if bits:
                    rest[part] = coder.decode(_uniform(1 << bits), part.stop - part.start)
            high = symbol - self._ends[table]
            outer = np.flatnonzero(np.abs(high) == self._ends[table])
            high[outer] += np.sign(high[outer]) * _read_beyond(coder, len(outer))
            values = np.zeros(plain.shape, np.int64)
            values.reshape(-1)[order] = (high << low) + rest - (1 << low >> 1)
            past_2R = self._remember(past_2R, plain, values)
            whole_TR[rows] = values
        return whole_TR

    def _walk(self, whole_TR: Whole, step: int) -> Iterator[tuple[Whole, NDArray[np.int16]]]:
        """Yield each group's coefficients and their levels."""
        past_2R = np.zeros((2, self.rank), np.int64)
        for rows in self._groups:
            plain, values = self._plain(rows, step), whole_TR[rows]
            yield values, self._adapted(plain, past_2R)
            past_2R = self._remember(past_2R, plain, values)

    def _plain(self, rows: Whole, step: int) -> NDArray[np.int32]:
        """The levels of a group's coefficients for a step, by their scales alone."""
        plain: NDArray[np.int32] = self._scale_TR[rows] - _whole_levels(step)
        return plain

    def _adapted(self, plain: NDArray[np.int32], past_2R: Whole) -> NDArray[np.int16]:
        """The levels with what earlier groups tell of each component; `LOWEST` - 1 is not coded."""
        powers = self._arrays["powers"]
        found_R, awaited_R = np.searchsorted(powers, past_2R + round(PRIOR * WEIGHT), side="right")
        shift_R = (int(self._arrays["adaptation"][0]) * (found_R - awaited_R) + TURN // 2) // TURN
        level = np.where(plain >= LOWEST, np.maximum(plain + shift_R, LOWEST), LOWEST - 1)
        return level.astype(np.int16)

    def _remember(self, past_2R: Whole, plain: NDArray[np.int32], values: Whole) -> Whole:
        """Add a group to what is found and awaited of each component [2, R]; older groups fade."""
        place = np.clip(plain, LOWEST - 1, LOWEST + len(self._arrays["weight"]) - 2) - (LOWEST - 1)
        found_R = (np.abs(values) * self._arrays["weight"][place]).sum(0)
        awaited_R = self._arrays["awaited"][place].sum(0)
        faded_2R: Whole = (past_2R * round(FADING * 8) >> 3) + np.stack([found_R, awaited_R])
        return faded_2R

    def _split(self, values: Whole, table: Whole, low: Whole) -> tuple[Whole, Whole]:
        """Coefficients rounded to what has a table, and the symbols of these."""
        high, end = (values + (1 << low >> 1)) >> low, self._ends[table]
        return high, np.clip(high, -end, end) + end

    def _length(self, values: Whole, level: NDArray[np.int16]) -> float:
        """Bits that coefficients of these levels take."""
        order, table, low = _by_table(level)
        high, symbol = self._split(values.reshape(-1)[order], table, low)
        bits = low.sum() + self._bits[self._starts[table] + symbol].sum()
        beyond = (np.abs(high) - self._ends[table])[np.abs(high) >= self._ends[table]]
        extra = np.frexp(beyond.astype(np.float64))[1]
        return float(bits + math.log2(MOST_BITS) * len(extra) + np.maximum(extra - 1, 0).sum())


class _Image:
    """An image's exact coefficients, and what rounding them by a step loses."""

    def __init__(self, book: Codebook, centred_TD: Tensor, energy: float) -> None:
        self._book, self._energy = book, energy
        z_TR = book._transform_TT @ (centred_TD @ book._basis_RD.mT)
        self._falling = z_TR.numpy().reshape(-1)[book._order]
        squares = np.square(self._falling, dtype=np.float64)
        # What is lost where the first n coefficients are coded: those after them, and what lies outside the basis.
        self._left = np.append(np.cumsum(squares[::-1])[::-1], 0.0)
        if book.rank < book.dim:
            self._left += max(0.0, float(centred_TD.double().square().sum()) - self._left[0])

    def step_within(self, target: float) -> int:
        """The largest step whose relative error is within the target, or nearly."""
        low, high = FINEST, (int(self._book._falling[0]) - LOWEST + 1) * FINE
        step, error = low, self.error(low)
        if error > target:
            raise UnreachableError(
                f"rank {self._book.rank} holds this image to a relative error of {error:.4g}, not {target:g}; "
                "allow more, or apply a model of a higher rank"
            )
        best, ends = low, {low: error}
        step = min(max(low + 1, round(OCTAVE * FINE * math.log2(target * 12**0.5))), high)
        while low < high and ends[best] < CLOSE * target:
            error = ends[step] = self.error(step)
            low, high = (step, high) if error <= target else (low, step - 1)
            best = max(best, low)
            # The error grows nearly as the step does; bisection where that leads outside.
            near = step + math.floor(OCTAVE * FINE * math.log2(max(target, 1e-9) / max(error, 1e-9)))
            step = near if low < near <= high else (low + high + 1) // 2
        return best

    def rounded(self, step: int) -> Whole:
        """The coefficients as whole steps [T, R]."""
        book = self._book
        number, size = self._sizes(step)
        whole = np.zeros(book.tokens * book.rank, np.int64)
        whole[book._order[:number]] = np.copysign(size, self._falling[:number]).astype(np.int64)
        return whole.reshape(book.tokens, book.rank)

    def error(self, step: int) -> float:
        number, size = self._sizes(step)
        lost = np.abs(self._falling[:number]) - size * np.float32(_power(step))
        squares = float(np.dot(lost, lost)) + float(self._left[number])
        return math.sqrt(squares / self._energy)

    def _sizes(self, step: int) -> tuple[int, NDArray[np.float32]]:
        """How many of the coefficients are coded, and their sizes in whole steps, nearer to 0 where that saves."""
        book, shift = self._book, _whole_levels(step)
        number = int(np.searchsorted(-book._falling, -(LOWEST + shift), side="right"))
        place = np.minimum(book._falling[:number] - shift - LOWEST, len(book._arrays["border"]) - 1)
        size = np.abs(self._falling[:number]) * np.float32(1 / _power(step))
        return number, np.floor(size + (1 - book._arrays["border"][place]))


def make_codebook(model: Shared, rank: int | None = None) -> Codebook:
    """Make what the coded images of a model share: its weights, of all ranks or the first, and whole-number tables."""
    levels = np.arange(LOWEST, HIGHEST + 1)
    tables = [_counts(2.0 ** (level / OCTAVE)) for level in levels]
    # Of the level that is not coded, and of all that sizes may have.
    every = torch.arange(LOWEST, 20 * OCTAVE, dtype=torch.float64) * (math.log(2) / OCTAVE)
    expected = expected_size(every)
    weight, awaited = (WEIGHT / (expected + SMALL)), (WEIGHT * expected / (expected + SMALL))
    scale_TR = model.log_scale_TR[:, :rank].detach().double().cpu() * (OCTAVE / math.log(2))
    return Codebook(
        {
            "basis": model.basis[:rank].detach().float().cpu().contiguous().numpy(),
            "mean": model.mean_D.detach().float().cpu().numpy(),
            "transform": model.transform.detach().float().cpu().contiguous().numpy(),
            "scale": scale_TR.round().clamp(-(2**14), 2**14).numpy().astype(np.int16),
            "group": model.group_T.cpu().numpy().astype(np.int32),
            "adaptation": np.array([round(TURN * PACE * model.adaptation.item())], np.int32),
            "counts": np.concatenate(tables).astype(np.uint32),
            "symbols": np.array([len(table) for table in tables], np.int32),
            "weight": np.append(0, weight.round().numpy()).astype(np.int64),
            "awaited": np.append(0, awaited.round().numpy()).astype(np.int64),
            "powers": np.round(WEIGHT * 2.0 ** (np.arange(24 * OCTAVE) / OCTAVE)).astype(np.int64),
            "border": borders(every).float().numpy(),
        }
    )


def _counts(ratio: float) -> NDArray[np.int64]:
    """Counts out of `TOTAL`, none of them 0, of the whole numbers -K..K with the tails at the ends, K by the scale."""
    end = math.ceil(TAIL * ratio) + 1
    size = np.arange(end + 1)
    chance = 2.0 ** -laplace_bits(torch.from_numpy(size).double(), torch.tensor(ratio, dtype=torch.float64)).numpy()
    chance[end] = 0.5 * math.exp(-(end - 0.5) / ratio)
    counts = np.maximum(1, np.floor(np.append(chance[:0:-1], chance) * TOTAL)).astype(np.int64)
    counts[end] += TOTAL - counts.sum()
    return counts


def _by_table(level_TR: NDArray[np.int16]) -> tuple[Whole, Whole, Whole]:
    """Return the places of the coefficients that are coded, by rising level, their tables and their low bits."""
    flat = level_TR.reshape(-1)
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


def _beyond(size: Whole) -> list[tuple[NDArray[Any], Any]]:
    """What codes by how much coefficients lie beyond their tables: how many bits that has, and the bits."""
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


def _read_beyond(coder: Any, number: int) -> Whole:
    """Read what `_beyond` coded of so many coefficients."""
    bits = coder.decode(_uniform(MOST_BITS), number).astype(np.int64) if number else np.zeros(0, np.int64)
    beyond: Whole = np.minimum(bits, 1)
    for count in np.unique(bits[bits > 1]).tolist():
        which = np.flatnonzero(bits == count)
        beyond[which] = (1 << count - 1) + coder.decode(_uniform(1 << count - 1), len(which))
    return beyond


def _whole_levels(step: int) -> int:
    return (step + FINE // 2) // FINE


def _power(logarithm: int) -> float:
    return float(2.0 ** (logarithm / (OCTAVE * FINE)))


def _sealed(size: int, step: int, payload: bytes) -> bytes:
    return HEADER.pack(size, step, zlib.crc32(payload, (size * 2**16 + step) % 2**32)) + payload
