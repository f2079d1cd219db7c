"""Ways to keep one image as bytes: each writes a whole stream, and reads X back from nothing but it.

Of X itself and of factors in few bits the general compressors and the entropy coder of `shared` are rivals, so each is
shown at its best: int8, int5 and int4 compress best as one byte a code, as a rule channel after channel.

T tokens, D dim, R rank, K = min(T, D).
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from lowrank_tune.comparison.compression import svd_factors
from lowrank_tune.lowrank.codebooks import book_of
from lowrank_tune.lowrank.coding import Codebook, UnreachableError
from lowrank_tune.lowrank.decomposers import Factors
from lowrank_tune.lowrank.decomposers.shared import LEAST_SCALE, unit_images
from lowrank_tune.lowrank.quantization import (
    dequantise,
    layout,
    ordered,
    pack,
    prune,
    quantise,
    residual_by_rank,
    restored_factors,
    unpack,
)

INTEGERS = ("int8", "int5", "int4")
STORED = ("float16", *INTEGERS)
"""What factors are stored in without an entropy coder."""
ZSTD_LEVEL = 15
"""A percent from the highest, at half its time."""
COUNT = struct.Struct("<H")
"""How many components an image keeps."""
PRIOR_IMAGES = 8
"""For so many images a component's mean size counts in the scale of each of its coefficients."""
NEAR, AIM = 0.98, 0.98
"""Of the error that is allowed, what is near enough; and of the squared one that steps may make, what is aimed at."""
TRIES = 4


class Seen:
    """An image [T, D], and what several ways need of it."""

    def __init__(self, x_TD: Tensor, decompose: Callable[[Tensor], Factors] | None = None) -> None:
        self.x_TD = x_TD
        self.energy = float(x_TD.double().square().sum())
        self._decompose = decompose

    @cached_property
    def svd(self) -> Components:
        """The SVD's."""
        return Components(self.x_TD, svd_factors(self.x_TD[None]))

    @cached_property
    def trained(self) -> Components:
        """The trained model's."""
        if self._decompose is None:
            raise ValueError("there is no trained model")
        return Components(self.x_TD, ordered(self._decompose(self.x_TD[None])))

    def error(self, y_TD: Tensor) -> float:
        """‖X − Y‖ / ‖X‖."""
        return math.sqrt(float((y_TD.double() - self.x_TD.double()).square().sum()) / self.energy)


class Components:
    """An image's factors, A and B alike in size, components by falling size; and what is left of X by their number."""

    def __init__(self, x_TD: Tensor, factors: Factors) -> None:
        self.x_TD, self.factors = x_TD, factors
        self.left_R = residual_by_rank(x_TD[None], factors)[0]
        lengths = torch.linalg.vector_norm(factors.a_NTR[0], dim=0), torch.linalg.vector_norm(factors.b_NRD[0], dim=1)
        self.size_R = (lengths[0] * lengths[1]).double()
        self._kept: dict[str, Tensor] = {}

    def left_in(self, dtype: str) -> Tensor:
        """‖X − A_r B_r‖² for r from none to all, both in this dtype."""
        if dtype not in self._kept:
            self._kept[dtype] = residual_by_rank(self.x_TD[None], restored_factors(self.factors, dtype))
        return self._kept[dtype]

    def stacked(self, rank: int) -> Tensor:
        """AΣ over (ΣB)ᵀ [T + D, R] of unit A and B: an error in either counts as it is in X."""
        root_R = self.size_R[:rank].sqrt().float()
        return torch.cat([self.factors.a_NTR[0, :, :rank] * root_R, self.factors.b_NRD[0, :rank].mT * root_R])


@dataclass(frozen=True, slots=True)
class Way:
    """One way to keep an image: `encode(image, target)` makes a stream that `decode` makes Y of."""

    method: str
    rank: int
    dtype: str
    encode: Callable[[Seen, float], bytes]  # UnreachableError where it cannot meet the target
    decode: Callable[[bytes], Tensor]
    targeted: bool = True  # whether it heeds a target
    shared_bytes: int = 0
    trial_id: str = ""


def plain(tokens: int, dim: int, dtype: str) -> Way:
    """X in a dtype, a scale a token."""
    return Way(
        "x", 0, dtype, lambda seen, _: _packed(seen.x_TD, dtype), partial(_unpacked, dtype=dtype, shape=(tokens, dim)),
        targeted=False,
    )  # fmt: skip


class _Form(NamedTuple):
    """In which order codes go into a compressor, and which."""

    order: str  # `channels`, `tokens` one byte a code, or `packed` as `plain` has them
    squeeze: Callable[[bytes], bytes]
    stretch: Callable[[bytes, int], bytes]


def squeezed(tokens: int, dim: int, dtype: str, compressor: str, examples: Sequence[Tensor]) -> Way:
    """X in a dtype, its codes by zlib or zstd in the form that takes the fewest bytes of the examples."""

    def codes_of(x_TD: Tensor, order: str) -> tuple[bytes, bytes]:
        if order == "packed":
            parts = pack(x_TD, dtype)
            return parts["codes"].numpy().tobytes(), parts["scales"].numpy().tobytes()
        codes_TD, scales_T = quantise(x_TD, dtype)
        whole = codes_TD.to(torch.int8).numpy()
        return (whole.T if order == "channels" else whole).tobytes(), scales_T.numpy().tobytes()

    def encode(seen: Seen, _: float, form: _Form) -> bytes:
        codes, scales = codes_of(seen.x_TD, form.order)
        return scales + form.squeeze(codes)

    def decode(stream: bytes, form: _Form) -> Tensor:
        scales, packed_bytes = stream[: 4 * tokens], layout((tokens, dim), dtype)["codes"][0]
        size = math.prod(packed_bytes) if form.order == "packed" else tokens * dim
        codes = form.stretch(stream[4 * tokens :], size)
        if form.order == "packed":
            return _unpacked(codes + scales, dtype, (tokens, dim))
        whole = np.frombuffer(codes, np.int8)
        codes_TD = whole.reshape(dim, tokens).T if form.order == "channels" else whole.reshape(tokens, dim)
        return dequantise(torch.from_numpy(codes_TD.copy()), torch.from_numpy(np.frombuffer(scales, np.float32).copy()))

    forms = _zlib_forms() if compressor == "zlib" else _zstd_forms()
    seen = [Seen(x_TD) for x_TD in examples]
    best = min(forms, key=lambda form: sum(len(encode(each, 0.0, form)) for each in seen))
    name = f"{dtype}+{compressor}"
    return Way("x", 0, name, partial(encode, form=best), partial(decode, form=best), targeted=False)


def _zlib_forms() -> list[_Form]:
    def squeeze(data: bytes, strategy: int) -> bytes:
        coder = zlib.compressobj(zlib.Z_DEFAULT_COMPRESSION, strategy=strategy)
        return coder.compress(data) + coder.flush()

    # Where nothing repeats, looking for repetitions costs bits, and time.
    tried = [("channels", zlib.Z_RLE), ("tokens", zlib.Z_RLE), ("packed", zlib.Z_DEFAULT_STRATEGY),
             ("channels", zlib.Z_DEFAULT_STRATEGY)]  # fmt: skip
    return [
        _Form(order, partial(squeeze, strategy=strategy), lambda data, _: zlib.decompress(data))
        for order, strategy in tried
    ]


def _zstd_forms() -> list[_Form]:
    coder = pa.Codec("zstd", ZSTD_LEVEL)
    return [
        _Form(
            order,
            lambda data: coder.compress(data, asbytes=True),
            lambda data, size: coder.decompress(data, size, asbytes=True),
        )
        for order in ("channels", "tokens", "packed")
    ]


def coded_itself(tokens: int, dim: int, train: Iterable[Tensor]) -> Way:
    """X in uniform steps by the entropy coder, less its channels' means, with the training images' scales."""
    unit = [unit_images(x_TD[None])[0][0] for x_TD in train]
    mean_D = torch.stack([x_TD.mean(0) for x_TD in unit]).mean(0)
    book = _book([x_TD - mean_D for x_TD in unit], mean_D)
    return Way(
        "x", 0, "coded", lambda seen, target: book.encode(seen.x_TD, target_error=target), book.decode,
        shared_bytes=_without_matrices(book),
    )  # fmt: skip


def coded_shared(name: str, book: Codebook, trial_id: str) -> Way:
    """A `shared` model's coefficients."""

    def encode(seen: Seen, target: float) -> bytes:
        return book.encode(seen.x_TD, target_error=target)

    shared = book.shared_bytes
    return Way(name, book.rank, "coded", encode, book.decode, shared_bytes=shared, trial_id=trial_id)


def stored_factors(
    name: str,
    rank: int,
    trial_id: str,
    components: Callable[[Seen], Components],
    shape: tuple[int, int],
    dtype: str,
) -> Way:
    """As few leading components as the target needs, A and B in a dtype, a scale a row."""
    tokens, dim = shape

    def encode(seen: Seen, target: float) -> bytes:
        own = components(seen)
        least = int(prune(own.left_in(dtype), torch.tensor([target**2 * seen.energy], dtype=torch.float64)))
        # Packed without the others a token has another scale, and may need one more.
        for count in range(least, min(least + 2, rank) + 1) if least >= 0 else ():
            a_TR, b_RD = own.factors.a_NTR[0, :, :count], own.factors.b_NRD[0, :count]
            stream = COUNT.pack(count) + (_packed(a_TR, dtype) + _packed(b_RD, dtype) if count else b"")
            if seen.error(decode(stream)) <= target:
                return stream
        raise UnreachableError(f"{name} in {dtype} does not hold this image to a relative error of {target:g}")

    def decode(stream: bytes) -> Tensor:
        (rank,) = COUNT.unpack_from(stream)
        if not rank:
            return torch.zeros(tokens, dim)
        end = COUNT.size + sum(math.prod(part) * kind.itemsize for part, kind in layout((tokens, rank), dtype).values())
        a_TR = _unpacked(stream[COUNT.size : end], dtype, (tokens, rank))
        return a_TR @ _unpacked(stream[end:], dtype, (rank, dim))

    return Way(name, rank, dtype, encode, decode, trial_id=trial_id)


class FactorBooks:
    """Codebooks of factors [T, R] and [R, D] at a few ranks: a scale a component, of training images' SVDs."""

    def __init__(self, train: Iterable[Tensor]) -> None:
        found = [(x_TD, Components(x_TD, svd_factors(x_TD[None]))) for x_TD in train]
        self.tokens, self.dim = found[0][0].shape
        most = len(found[0][1].size_R)
        self.ranks = sorted({max(1, most >> halvings) for halvings in range(5)} | {max(1, 3 * most // 4)})
        self._found = [own for _, own in found]
        self._spare: dict[tuple[int, float], float] = {}
        self.book = cache(self._make)

    def _make(self, rank: int) -> Codebook:
        stacks = [unit_images(own.stacked(rank)[None])[0][0] for own in self._found]
        return _book([torch.cat([_levelled(m_NR[: self.tokens]), _levelled(m_NR[self.tokens :])]) for m_NR in stacks])

    def way(self, name: str, rank: int, trial_id: str, components: Callable[[Seen], Components]) -> Way:
        """Factors by the entropy coder, both in one step, at the rank that should take the fewest bytes."""
        shared = _without_matrices(self.book(self.ranks[-1]))
        return Way(
            name, rank, "coded", partial(self._encode, components), self._decode, shared_bytes=shared, trial_id=trial_id
        )

    def _encode(self, components: Callable[[Seen], Components], seen: Seen, target: float) -> bytes:
        own, allowed = components(seen), target**2 * seen.energy
        left = own.left_R
        ranks = [rank for rank in self.ranks if rank < len(left) and float(left[rank]) < 0.98 * allowed]
        for rank in sorted(ranks, key=lambda rank: self._bits(own, rank, allowed)):
            stacked_NR = own.stacked(rank)
            energy, lost = float(stacked_NR.double().square().sum()), float(left[rank])
            place, best = (rank, target), b""
            step_error = math.sqrt(self._spare.get(place, 1.0) * (allowed - lost) / energy)
            for _ in range(TRIES):
                try:
                    stream = COUNT.pack(rank) + self.book(rank).encode(stacked_NR, target_error=step_error)
                except UnreachableError:
                    break
                error = seen.error(self._decode(stream))
                best = stream if error <= target and (not best or len(stream) < len(best)) else best
                if NEAR * target <= error <= target:
                    break
                # What the steps lose grows as their square.
                gained = max(error**2 * seen.energy - lost, 1e-3 * (allowed - lost))
                step_error *= math.sqrt(AIM * (allowed - lost) / gained)
            if best:
                # What one image's steps lose of what they may tells where to begin with the next.
                self._spare[place] = step_error**2 * energy / (allowed - lost)
                return best
        raise UnreachableError(f"these factors do not hold this image to a relative error of {target:g}")

    def _bits(self, own: Components, rank: int, allowed: float) -> float:
        """What the coefficients should take in steps that lose what is left, Laplace's entropy at each."""
        size_R = own.size_R[:rank]
        step = math.sqrt(12 * (allowed - float(own.left_R[rank])) / ((self.tokens + self.dim) * rank))
        bits = (
            count * 0.5 * torch.log2(1 + 2 * math.e**2 * (size_R / step).square() / count)
            for count in (self.tokens, self.dim)
        )
        return float(sum(part.sum() for part in bits))

    def _decode(self, stream: bytes) -> Tensor:
        (rank,) = COUNT.unpack_from(stream)
        stacked_NR = self.book(rank).decode(stream[COUNT.size :])
        b_RD = stacked_NR[self.tokens :].mT
        lengths_R1 = torch.linalg.vector_norm(b_RD, dim=1, keepdim=True)
        y_TD: Tensor = stacked_NR[: self.tokens] @ (b_RD / lengths_R1.clamp_min(torch.finfo(b_RD.dtype).tiny))
        return y_TD


def _levelled(m_NR: Tensor) -> Tensor:
    """The mean size of each column in all of its rows, for the rows of factors are alike."""
    return m_NR.abs().mean(0).expand(len(m_NR), -1)


def _book(units: Sequence[Tensor], mean_D: Tensor | None = None) -> Codebook:
    """The codebook of matrices [N, R] as they are, but for a mean: scales by the sizes in those given."""
    rows, columns = units[0].shape
    sizes_NR = torch.stack([unit.abs() for unit in units]).mean(0)
    weight = len(units) / (len(units) + PRIOR_IMAGES)
    sizes_NR = weight * sizes_NR + (1 - weight) * (sizes_NR.mean(0) if mean_D is not None else sizes_NR)
    return book_of(
        torch.eye(columns),
        torch.zeros(columns) if mean_D is None else mean_D,
        torch.eye(rows),
        sizes_NR.clamp_min(LEAST_SCALE).log(),
        torch.zeros(rows, dtype=torch.int64),  # no adaptation, for which rows would be coded in groups
    )


def _without_matrices(book: Codebook) -> int:
    """What a codebook of X or factors as they are shares: its basis and its transform are none."""
    size: int = book.shared_bytes - 4 * (book.rank * book.dim + book.tokens**2)
    return size


def _packed(x: Tensor, dtype: str) -> bytes:
    return b"".join(part.numpy().tobytes() for part in pack(x, dtype).values())


def _unpacked(stream: bytes, dtype: str, shape: tuple[int, int]) -> Tensor:
    parts, start = {}, 0
    for name, (part, kind) in layout(shape, dtype).items():
        end = start + math.prod(part) * kind.itemsize
        parts[name] = torch.frombuffer(bytearray(stream[start:end]), dtype=kind).reshape(part)
        start = end
    return unpack(parts, dtype, shape)
