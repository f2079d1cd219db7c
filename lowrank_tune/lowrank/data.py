"""A feature cache as a matrix per image, mapped into memory.

N images, T tokens, D dim.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowrank_tune.errors import CacheError, InputError
from lowrank_tune.lowrank.coding import Codebook
from lowrank_tune.lowrank.decomposers import Factors
from lowrank_tune.lowrank.linalg import stream
from lowrank_tune.lowrank.quantization import ordered, pack, unpack
from lowrank_tune.records import CODED, FeatureSet

_SERIAL_ELEMENTS = 32768
"""The most that torch copies on the calling thread when it has several."""
NUMBERS_AT_ONCE = 2**23
"""Of features, in memory at a time where nothing is trained: 16 images of [256, 2048]."""
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class FeatureMatrix:
    """The features of a study's images, read where they lie.

    All shards are mapped at the first `load`; their pages are the system's, so a process holds its batches alone.
    """

    def __init__(self, features: FeatureSet) -> None:
        self.features = features
        self.tokens = features.tokens
        self.dim = features.dim
        self.dtype = DTYPES[features.dtype]
        self._shards: dict[str, Tensor] = {}
        self._lent_NTD = torch.empty(0, self.tokens, self.dim)

    def __len__(self) -> int:
        return len(self.features.rows)

    def load(self, indices: Sequence[int], dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
        """Copy the features of some images to [n, T, D].

        Args:
            indices: Positions in `features.rows`, in any order, repeated or not.
            dtype: Of the copy.
            out: Where to put them, on the CPU, in any dtype; memory used again is several times as fast as new.

        Raises:
            CacheError: A shard is missing, or does not hold what the cache says.
        """
        if not self._shards:
            # All at once: what mapping allocates for good, one shard at a time between batches, would split the heap
            # under them, and the process would grow by a batch or two a shard.
            self._shards = {name: self._map(name) for name in sorted({row.shard for row in self.features.rows})}
        x_NTD = torch.empty(len(indices), self.tokens, self.dim, dtype=dtype) if out is None else out
        # A copy shared between threads waits for each of them, once a row: where other trials have the cores, a batch
        # would take ten times as long.
        parts = 1 if torch.get_num_threads() == 1 else math.ceil(self.tokens * self.dim / _SERIAL_ELEMENTS)
        rows = [self.features.rows[index] for index in indices]
        pieces = [piece for row in rows for piece in self._shards[row.shard][row.row].chunk(parts)]
        if pieces:
            torch._foreach_copy_([piece for x_TD in x_NTD for piece in x_TD.chunk(parts)], pieces)
        return x_NTD

    def lend(self, indices: Sequence[int]) -> Tensor:
        """As `load`, into memory that the next call uses again."""
        if len(indices) > len(self._lent_NTD):
            self._lent_NTD = torch.empty(len(indices), self.tokens, self.dim)
        return self.load(indices, out=self._lent_NTD[: len(indices)])

    def batches(self, indices: Sequence[int], size: int, dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
        """Yield some images in order, [size, T, D] at a time, the last perhaps fewer; errors as `load`."""
        for start in range(0, len(indices), size):
            yield self.load(indices[start : start + size], dtype)

    def _map(self, name: str) -> Tensor:
        path, parts = _map_shard(self.features, name)
        mapped_NTD = parts.get("features", torch.empty(0))
        if mapped_NTD.shape[1:] != (self.tokens, self.dim) or mapped_NTD.dtype != self.dtype:
            raise CacheError(
                f"{path}: holds {list(mapped_NTD.shape)} of {mapped_NTD.dtype}, "
                f"not images of [{self.tokens}, {self.dim}] of {self.dtype}; "
                "run `lowrank-tune features verify`, then extract the cache again"
            )
        return mapped_NTD


RESIDENT_FRACTION = 0.25
"""Of a device's free memory, the most that the features may take: four trials may share one device, and a trial needs
room for its own work."""
_COPIED_AT_ONCE = 64


@lru_cache(maxsize=1)
def batches_on(data: FeatureMatrix, device: str) -> FeatureMatrix | Resident | Streamed:
    """The mini-batches for a device, the same object for the next trial of this process."""
    if torch.device(device).type != "cuda":
        return data
    size = len(data) * data.tokens * data.dim * data.dtype.itemsize
    if fits(size, torch.cuda.mem_get_info(device)[0]):
        try:
            return Resident(data, device)
        except torch.OutOfMemoryError:  # another trial was quicker
            torch.cuda.empty_cache()
    return Streamed(data, device)


def fits(size: int, free: int) -> bool:
    """Whether a device with `free` bytes holds features of `size` bytes."""
    return size <= RESIDENT_FRACTION * free


class Resident:
    """Batches of features that a device holds whole, in the cache's dtype."""

    def __init__(self, data: FeatureMatrix, device: str) -> None:
        self._all_NTD = torch.empty(len(data), data.tokens, data.dim, dtype=data.dtype, device=device)
        for start in range(0, len(data), _COPIED_AT_ONCE):
            part = range(start, min(start + _COPIED_AT_ONCE, len(data)))
            self._all_NTD[start : start + len(part)] = data.load(part, data.dtype).to(device)

    def load(self, indices: Sequence[int]) -> Tensor:
        """Pick them on the device."""
        chosen = torch.tensor(indices, dtype=torch.int64).to(self._all_NTD.device)
        return self._all_NTD.index_select(0, chosen).float()

    lend = load


class Streamed:
    """Batches copied to a device, in the cache's dtype, through memory that the next one uses again."""

    def __init__(self, data: FeatureMatrix, device: str) -> None:
        self._data = data
        self._device = device
        self._buffer_NTD = torch.empty(0, data.tokens, data.dim, dtype=data.dtype)

    def load(self, indices: Sequence[int]) -> Tensor:
        """Send them to the device."""
        if len(indices) > len(self._buffer_NTD):
            self._buffer_NTD = self._buffer_NTD.new_empty(len(indices), *self._buffer_NTD.shape[1:])
        host_NTD = self._data.load(indices, out=self._buffer_NTD[: len(indices)])
        return torch.empty_like(host_NTD, device=self._device).copy_(host_NTD).float()

    lend = load


def pack_factors(a_TR: Tensor, b_RD: Tensor, dtype: str) -> dict[str, Tensor]:
    """Store one image's A [T, R] and B [R, D]: what `pack` makes of each, by name, `a.values`, `b.codes`.

    Raises:
        InputError: a number is not finite, or does not fit the dtype.
    """
    if not (a_TR.isfinite().all() and b_RD.isfinite().all()):
        raise InputError("NaN or infinity among them")
    if not dtype.startswith("float"):
        try:
            (a_TR,), (b_RD,) = ordered(Factors(a_TR[None], b_RD[None]))
        except RuntimeError as error:  # as torch raises what LAPACK fails at
            raise InputError(f"they cannot be ordered ({str(error).splitlines()[0]})") from error
    sides = {"a": a_TR, "b": b_RD}
    return {f"{side}.{name}": part for side, factor in sides.items() for name, part in pack(factor, dtype).items()}


def unpack_factors(parts: Mapping[str, Tensor], dtype: str, tokens: int, dim: int, rank: int) -> tuple[Tensor, Tensor]:
    """Restore A [T, R] and B [R, D], float32; an InputError where the parts are not `pack_factors`' for these sizes."""
    sides: dict[str, dict[str, Tensor]] = {"a": {}, "b": {}}
    for name, part in parts.items():
        sides[name[0]][name[2:]] = part
    return unpack(sides["a"], dtype, (tokens, rank)), unpack(sides["b"], dtype, (rank, dim))


def open_matrix(features: FeatureSet) -> FeatureMatrix:
    """The features of a cache of any kind: as stored, A·B where it holds factors, or decoded."""
    if features.dtype == CODED:
        return CodedMatrix(features)
    return FactorMatrix(features) if features.rank else FeatureMatrix(features)


class RestoredMatrix(FeatureMatrix):
    """Features that come back, an image at a time, from what is stored in their place."""

    def __init__(self, features: FeatureSet) -> None:
        super().__init__(replace(features, dtype="float32"))
        self.features = features
        self.rank = features.rank
        self._parts: dict[str, dict[str, Tensor]] = {}

    def load(self, indices: Sequence[int], dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
        """Restore some images; otherwise as `FeatureMatrix.load`."""
        x_NTD = torch.empty(len(indices), self.tokens, self.dim, dtype=dtype) if out is None else out
        for x_TD, index in zip(x_NTD, indices, strict=True):
            x_TD.copy_(self._image(index))
        return x_NTD

    def _image(self, index: int) -> Tensor:
        """Restore [T, D], float32."""
        raise NotImplementedError

    def _shard(self, name: str) -> dict[str, Tensor]:
        if name not in self._parts:
            self._parts[name] = _map_shard(self.features, name)[1]
        return self._parts[name]


class FactorMatrix(RestoredMatrix):
    """Features stored as factors: `load` gives A·B, `factors` A and B."""

    def factors(self, indices: Sequence[int]) -> Factors:
        """Read A [n, T, R] and B [n, R, D] of some images, float32; errors as `load`."""
        images = [self._factors(index) for index in indices]
        a_NTR = torch.stack([a_TR for a_TR, _ in images]) if images else torch.empty(0, self.tokens, self.rank)
        b_NRD = torch.stack([b_RD for _, b_RD in images]) if images else torch.empty(0, self.rank, self.dim)
        return Factors(a_NTR, b_NRD)

    def _image(self, index: int) -> Tensor:
        a_TR, b_RD = self._factors(index)
        return a_TR @ b_RD

    def _factors(self, index: int) -> tuple[Tensor, Tensor]:
        row = self.features.rows[index]
        parts = {name: part[row.row] for name, part in self._shard(row.shard).items()}
        return unpack_factors(parts, self.features.dtype, self.tokens, self.dim, self.rank)


class CodedMatrix(RestoredMatrix):
    """Features stored as coded streams, each decoded when it is asked for."""

    def __init__(self, features: FeatureSet) -> None:
        super().__init__(features)
        self._codebook = Codebook.load(Path(features.directory) / "codebook.safetensors")

    def _image(self, index: int) -> Tensor:
        row = self.features.rows[index]
        parts = self._shard(row.shard)
        try:
            lengths = parts["length"].tolist()
            if sum(lengths) != len(parts["stream"]):
                raise ValueError("the lengths of its shard's streams do not add up to their bytes")
            start = sum(lengths[: row.row])
            return self._codebook.decode(parts["stream"][start : start + lengths[row.row]].numpy().tobytes())
        except (ValueError, LookupError) as error:
            place = self.features.directory
            remedy = (
                f"remove this copy of {self.features.origin}"
                if self.features.origin
                else f"remove {place}/manifest.json and `apply` again: what is sound is kept, the rest made anew"
            )
            raise CacheError(
                f"{place}/shards/{row.shard}: row {row.row} ({row.key[:16]}) cannot be decoded ({error}); {remedy}"
            ) from error


def _map_shard(features: FeatureSet, name: str) -> tuple[Path, dict[str, Tensor]]:
    """A shard's path, and its tensors, mapped into memory."""
    path = Path(features.directory) / "shards" / name
    try:
        with safe_open(path, framework="pt", device="cpu") as shard:
            return path, {part: shard.get_tensor(part) for part in shard.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError) as error:
        made_by = "apply" if features.rank else "extract the cache"
        raise CacheError(
            f"{path}: the shard cannot be read ({error}); run `lowrank-tune features verify`, then {made_by} again"
        ) from error


def spread(groups: Sequence[str], most: int, seed: int) -> list[int]:
    """Places of at most so many images: one of each group, then a second one of each, in an order of the seed."""
    members: dict[str, list[int]] = {}
    for place in torch.randperm(len(groups), generator=stream(seed, "pictures")).tolist():
        members.setdefault(groups[place], []).append(place)
    turns = itertools.zip_longest(*members.values())
    return [place for turn in turns for place in turn if place is not None][:most]


def evenly(count: int, most: int) -> list[int]:
    """Places of at most so many of `count` things, rising, the first and the last among them where there are two."""
    places: list[int] = np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int)).tolist()
    return places
