"""A feature cache as a matrix per image, mapped into memory.

N images, T tokens, D dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowrank_tune.errors import CacheError
from lowrank_tune.records import FeatureSet

_SERIAL_ELEMENTS = 32768
"""The most that torch copies on the calling thread when it has several."""
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class FeatureMatrix:
    """The features of a study's images, read where they lie.

    The first row asked for maps all shards, and they stay mapped: their pages belong to the system's page cache, which
    all processes share, so a process needs memory for the batches that it holds and for nothing else.

    Args:
        features: The images, in the order that indices count.
    """

    def __init__(self, features: FeatureSet) -> None:
        self.features = features
        self.tokens = features.tokens
        self.dim = features.dim
        self.dtype = DTYPES[features.dtype]
        self._shards: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self.features.rows)

    def load(self, indices: Sequence[int], dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
        """Copy the features of some images.

        Args:
            indices: Positions in `features.rows`, in any order; repetitions are allowed.
            dtype: What the copy is converted to; `self.dtype` converts nothing.
            out: Where to put them, [n, T, D] on the CPU, in any dtype; new memory when None. Memory that is used again
                is several times as fast: the system hands out new memory page by page.

        Returns:
            A tensor [n, T, D] that belongs to the caller: `out`, when it is given.

        Raises:
            CacheError: A shard is missing, is not a safetensors file, or does not hold what the cache says.
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

    def batches(self, indices: Sequence[int], size: int, dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
        """Yield the features of some images in order, `size` images [size, T, D] at a time (the last may be fewer).

        Raises:
            CacheError: As `load`.
        """
        for start in range(0, len(indices), size):
            yield self.load(indices[start : start + size], dtype)

    def _map(self, name: str) -> Tensor:
        path = Path(self.features.directory) / "shards" / name
        remedy = "run `lowrank-tune features verify`, then extract the cache again"
        try:
            with safe_open(path, framework="pt", device="cpu") as shard:
                mapped_NTD: Tensor = shard.get_tensor("features")
        except (OSError, SafetensorError) as error:
            raise CacheError(f"{path}: the shard cannot be read ({error}); {remedy}") from error
        if mapped_NTD.shape[1:] != (self.tokens, self.dim) or mapped_NTD.dtype != self.dtype:
            raise CacheError(
                f"{path}: holds {list(mapped_NTD.shape)} of {mapped_NTD.dtype}, "
                f"not images of [{self.tokens}, {self.dim}] of {self.dtype}; {remedy}"
            )
        return mapped_NTD
