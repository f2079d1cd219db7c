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

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from torch import Tensor
from torch.nn import functional

from lowrank_tune.errors import InputError
from lowrank_tune.files import write_whole
from lowrank_tune.lowrank.decomposers.shared import (
    FADING,
    PRIOR,
)
from lowrank_tune.lowrank.entropy import HIGHEST, LOWEST, MOST, OCTAVE, TOTAL, Tables, Whole, coder

FINE = 32
"""Steps of the step's and the size's logarithm a level."""
WEIGHT, TURN = 2**20, 16
"""What 1 is in the weights of the surprise, and in the adaptation."""
FINEST = -12 * OCTAVE * FINE
"""The least step: a relative error of about 1e-4."""
CLOSE = 0.998
"""Of the error that is allowed, what is near enough."""
HEADER = struct.Struct("<hhI")
"""The image's size, its step, and the checksum of the rest."""
ZERO = -(2**15)
"""In place of the size of an image that holds nothing but zeros."""
LARGEST = torch.finfo(torch.float32).max
LAST = 128 * OCTAVE * FINE
"""The size of an image of such numbers."""
_TOO_FEW = "no stream of this image has {} bytes or less; allow more"


class UnreachableError(InputError):
    """No step makes this image as near, or as small, as is asked for."""


class Codebook:
    """What the coded images of a data set share; `codebooks.make_codebook` makes it of a model, `load` reads it.

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
        # Of a model with a metric, coefficients are products with other rows than those that give X back.
        self._oblique = "taking" in arrays
        self._taking_RD = torch.from_numpy(arrays["taking"]) if self._oblique else self._basis_RD
        self._inner_RR = self._basis_RD @ self._basis_RD.mT if self._oblique else torch.empty(0)
        # What is coded as it is goes through no products.
        self._turned = self._oblique or not torch.equal(self._basis_RD, torch.eye(self.rank, self.dim))
        self._transformed = not torch.equal(self._transform_TT, torch.eye(self.tokens))
        self._scale_TR = arrays["scale"].astype(np.int32)
        groups = int(arrays["group"].max()) + 1
        self._groups = [np.flatnonzero(arrays["group"] == group) for group in range(groups)]
        # The largest scale among a component and those after it: the components that a group codes lead.
        largest_GR = np.stack([self._scale_TR[rows].max(0) for rows in self._groups])
        self._later_GR = np.maximum.accumulate(largest_GR[:, ::-1], axis=1)[:, ::-1]
        self._tables = Tables(arrays["counts"], arrays["symbols"])
        # Largest scales first: at any step, the coefficients that are coded lead.
        self._order = np.argsort(-self._scale_TR, axis=None, kind="stable")
        self._falling = self._scale_TR.reshape(-1)[self._order]
        # The step at which no coefficient is coded.
        self.coarsest = (int(self._falling[0]) - LOWEST + 1) * FINE

    def save(self, path: Path) -> None:
        """Write it as a safetensors file."""
        data = save(self._arrays)
        write_whole(path, lambda temporary: temporary.write_bytes(data))

    @classmethod
    def load(cls, path: Path) -> Codebook:
        """Read what `save` wrote; an InputError where it is missing or none."""
        try:
            return cls(_checked(load_file(path)))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: not a codebook ({error}); apply the model again") from error

    def encode(self, x_TD: Tensor, *, target_error: float | None = None, max_bytes: int | None = None) -> bytes:
        """Write one image: the coarsest stream within a relative error, or the finest within a size.

        Args:
            x_TD: finite [T, D].
            target_error: ‖X − Y‖ / ‖X‖ at most.
            max_bytes: the stream's length at most.

        Raises:
            UnreachableError: The rank does not suffice for the error, or the bytes for anything.
            ValueError: Not all of the image's numbers are finite in float32.
        """
        size, image = self._open(x_TD)
        if image is None:
            if max_bytes is not None and max_bytes < HEADER.size:
                raise UnreachableError(_TOO_FEW.format(max_bytes))
            return _sealed(ZERO, 0, b"")
        if max_bytes is None:
            step = image.step_within(target_error or 0.0)
            return _sealed(size, step, self._write(image.rounded(step), step))
        low, high, best = FINEST, max(FINEST, self.coarsest), b""
        while low <= high:  # the length falls as the step grows
            step = (low + high) // 2
            stream = _sealed(size, step, self._write(image.rounded(step), step))
            low, high, best = (low, step - 1, stream) if len(stream) <= max_bytes else (step + 1, high, best)
        if not best:
            raise UnreachableError(_TOO_FEW.format(max_bytes))
        return best

    def count(self, x_TD: Tensor, *, target_error: float | None = None, step: float = 1.0) -> tuple[int, float]:
        """Count what `encode` would write, by the tables' chances: within an error, or rounded by a step.

        Returns the bytes, a word more or less, and the relative error. A step is over the image's root mean square.
        """
        _, image = self._open(x_TD)
        if image is None:
            return HEADER.size, 0.0
        place = image.step_within(target_error) if target_error else max(FINEST, round(OCTAVE * FINE * math.log2(step)))
        bits = sum(self._tables.bits(values, level) for values, level in self._walk(image.rounded(place), place))
        return HEADER.size + 4 * math.ceil(bits / 32), image.error(place)

    def _open(self, x_TD: Tensor) -> tuple[int, _Image | None]:
        """An image's size and coefficients; None of one that holds nothing but zeros."""
        x = x_TD.double()
        energy = float(x.square().sum())
        if energy == 0:
            return ZERO, None
        if not energy / x.numel() < LARGEST**2:
            raise ValueError("it holds numbers that are not finite, or not in float32")
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
        # Beyond these numbers have more low bits than can be read, or are not finite; no image has them.
        if not (-2 * LAST <= size <= LAST or size == ZERO) or step < FINEST:
            raise ValueError("its size or step is that of no image")
        if size == ZERO:
            return torch.zeros(self.tokens, self.dim)
        whole_TR = self._read(np.frombuffer(payload, "<u4").astype(np.uint32), step)
        last = int(np.flatnonzero(whole_TR.any(axis=0)).max(initial=-1))
        missing = self.dim - last - 1
        z_TR = torch.from_numpy(whole_TR[:, : last + 1]).float() * _power(step)
        a_TR = self._transform_TT.mT @ z_TR if self._transformed else z_TR
        unit_TD = self._mean_D + (
            a_TR @ self._basis_RD[: last + 1] if self._turned else functional.pad(a_TR, (0, missing))
        )
        return (unit_TD.double() * _power(size)).clamp(-LARGEST, LARGEST).float()

    def _write(self, whole_TR: Whole, step: int) -> bytes:
        """Code rounded coefficients; ANS is a stack, so that what is read first is written last."""
        parts: list[tuple[NDArray[Any], Any]] = []
        for values, level in self._walk(whole_TR, step):
            parts += self._tables.parts(values, level)
        ans = coder().stack.AnsCoder()
        for symbols, model in reversed(parts):
            ans.encode_reverse(symbols.astype(np.int32), model)
        return bytes(ans.get_compressed().astype("<u4").tobytes())

    def _read(self, words: NDArray[np.uint32], step: int) -> Whole:
        """Decode what `_write` coded at this step."""
        ans = coder().stack.AnsCoder(words)
        whole_TR = np.zeros((self.tokens, self.rank), np.int64)
        past_2R = np.zeros((2, self.rank), np.int64)
        for group, rows in enumerate(self._groups):
            plain = self._plain(group, step)
            values = self._tables.read(ans, self._adapted(plain, past_2R))
            past_2R = self._remember(past_2R, plain, values)
            whole_TR[rows, : plain.shape[1]] = values
        return whole_TR

    def _walk(self, whole_TR: Whole, step: int) -> Iterator[tuple[Whole, NDArray[np.int16]]]:
        """Yield each group's coefficients and their levels."""
        past_2R = np.zeros((2, self.rank), np.int64)
        for group, rows in enumerate(self._groups):
            plain = self._plain(group, step)
            values = whole_TR[rows, : plain.shape[1]]
            yield values, self._adapted(plain, past_2R)
            past_2R = self._remember(past_2R, plain, values)

    def _plain(self, group: int, step: int) -> NDArray[np.int32]:
        """The levels of a group's coefficients for a step, by their scales alone, up to the last that is coded."""
        lowest = LOWEST + _whole_levels(step)
        count = self.rank - int(np.searchsorted(self._later_GR[group, ::-1], lowest))
        plain: NDArray[np.int32] = self._scale_TR[self._groups[group], :count] - _whole_levels(step)
        return plain

    def _adapted(self, plain: NDArray[np.int32], past_2R: Whole) -> NDArray[np.int16]:
        """The levels with what earlier groups tell of each component; `LOWEST` - 1 is not coded."""
        powers = self._arrays["powers"]
        past_2R = past_2R[:, : plain.shape[1]]
        found_R, awaited_R = np.searchsorted(powers, past_2R + round(PRIOR * WEIGHT), side="right")
        shift_R = (int(self._arrays["adaptation"][0]) * (found_R - awaited_R) + TURN // 2) // TURN
        level = np.where(plain >= LOWEST, np.clip(plain + shift_R, LOWEST, MOST), LOWEST - 1)
        return level.astype(np.int16)

    def _remember(self, past_2R: Whole, plain: NDArray[np.int32], values: Whole) -> Whole:
        """Add a group to what is found and awaited of each component [2, R]; older groups fade."""
        place = np.clip(plain, LOWEST - 1, LOWEST + len(self._arrays["weight"]) - 2) - (LOWEST - 1)
        faded_2R: Whole = past_2R * round(FADING * 8) >> 3
        faded_2R[0, : plain.shape[1]] += np.einsum("tr,tr->r", np.abs(values), self._arrays["weight"][place])
        faded_2R[1, : plain.shape[1]] += self._arrays["awaited"][place].sum(0)
        return faded_2R


class _Image:
    """An image's exact coefficients, and what rounding them by a step loses."""

    def __init__(self, book: Codebook, centred_TD: Tensor, energy: float) -> None:
        self._book, self._energy = book, energy
        z_TR = centred_TD @ book._taking_RD.mT if book._turned else centred_TD
        if book._oblique:
            outside_TD = centred_TD - z_TR @ book._basis_RD
            self._outside = float(outside_TD.double().square().sum())
            self._outside_TR = book._transform_TT @ (outside_TD @ book._basis_RD.mT)
        z_TR = book._transform_TT @ z_TR if book._transformed else z_TR
        self._falling = z_TR.numpy().reshape(-1)[book._order]
        squares = np.square(self._falling, dtype=np.float64)
        # What is lost where the first n coefficients are coded: those after them, and what lies outside the basis.
        self._left = np.append(np.cumsum(squares[::-1])[::-1], 0.0)
        if book.rank < book.dim:
            self._left += max(0.0, float(centred_TD.double().square().sum()) - self._left[0])

    def step_within(self, target: float) -> int:
        """The largest step whose relative error is within the target, or nearly."""
        low, high = FINEST, self._book.coarsest
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
        if self._book._oblique:
            squares = self._squares(np.append(np.sign(self._falling[:number]) * lost, self._falling[number:]))
        else:
            squares = float(np.dot(lost, lost)) + float(self._left[number])
        return math.sqrt(squares / self._energy)

    def _squares(self, lost: NDArray[np.float32]) -> float:
        """‖X − Y‖² when so much is lost of the coefficients, largest scales first, and the basis' rows are oblique."""
        book, whole = self._book, np.empty_like(lost)
        whole[book._order] = lost
        lost_TR = torch.from_numpy(whole).view(book.tokens, book.rank)
        inside_TR = (lost_TR @ book._inner_RR).double() + 2 * self._outside_TR
        return max(0.0, self._outside + float((lost_TR * inside_TR).sum()))

    def _sizes(self, step: int) -> tuple[int, NDArray[np.float32]]:
        """How many of the coefficients are coded, and their sizes in whole steps, nearer to 0 where that saves."""
        book, shift = self._book, _whole_levels(step)
        number = int(np.searchsorted(-book._falling, -(LOWEST + shift), side="right"))
        place = np.minimum(book._falling[:number] - shift - LOWEST, len(book._arrays["border"]) - 1)
        size = np.abs(self._falling[:number]) * np.float32(1 / _power(step))
        return number, np.floor(size + (1 - book._arrays["border"][place]))


def _checked(arrays: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Return the arrays of a codebook; a ValueError or KeyError where they are none, or do not fit each other."""
    (rank, dim), tokens, lengths = arrays["basis"].shape, len(arrays["transform"]), arrays["symbols"]
    levels, powers = len(arrays["border"]), len(arrays["powers"])
    expected: dict[str, tuple[type, tuple[int, ...]]] = {
        "basis": (np.float32, (rank, dim)),
        "mean": (np.float32, (dim,)),
        "transform": (np.float32, (tokens, tokens)),
        "scale": (np.int16, (tokens, rank)),
        "group": (np.int32, (tokens,)),
        "adaptation": (np.int32, (1,)),
        "symbols": (np.int32, (HIGHEST - LOWEST + 1,)),
        "counts": (np.uint32, (int(lengths.sum()),)),
        "weight": (np.int64, (levels + 1,)),
        "awaited": (np.int64, (levels + 1,)),
        "powers": (np.int64, (powers,)),
        "border": (np.float32, (levels,)),
    }
    if "taking" in arrays:
        expected["taking"] = expected["basis"]
    for name, (dtype, shape) in expected.items():
        if arrays[name].dtype != dtype or arrays[name].shape != shape:
            raise ValueError(f"{name} is {arrays[name].dtype} {list(arrays[name].shape)}")
    groups, ends = arrays["group"], np.cumsum(lengths)
    if not (lengths >= 3).all() or not (np.add.reduceat(arrays["counts"], ends - lengths) == TOTAL).all():
        raise ValueError("counts do not add up")
    if not arrays["counts"].all() or not np.array_equal(np.unique(groups), np.arange(groups.max() + 1)):
        raise ValueError("counts are 0, or groups of tokens are missing")
    return arrays


def _whole_levels(step: int) -> int:
    return (step + FINE // 2) // FINE


def _power(logarithm: int) -> float:
    return float(2.0 ** (logarithm / (OCTAVE * FINE)))


def _sealed(size: int, step: int, payload: bytes) -> bytes:
    return HEADER.pack(size, step, zlib.crc32(payload, (size * 2**16 + step) % 2**32)) + payload
