"""Caches of factors: A [T, R] and B [R, D] of each image, read back as the features they stand for.

In float16 and float32 they are what the decomposer gave. For integers the same product is first ordered, as
`stored_factors.py` tells: what is on disk is what the comparison of bytes and error measured.

N images, T tokens, D dim, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowrank_tune.errors import CacheError, InputError
from lowrank_tune.lowrank.compression import pack, unpack
from lowrank_tune.lowrank.dataset import FeatureMatrix
from lowrank_tune.lowrank.decomposers import Factors
from lowrank_tune.lowrank.stored_factors import ordered
from lowrank_tune.records import FeatureSet


def pack_factors(a_TR: Tensor, b_RD: Tensor, dtype: str) -> dict[str, Tensor]:
    """Store one image's factors.

    Args:
        a_TR: A [T, R].
        b_RD: B [R, D].
        dtype: one of `STORE_DTYPES`.

    Returns:
        What `pack` makes of each, by name: `a.values`, `b.codes` and so on.

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
    """Restore what `pack_factors` stored: A [T, R] and B [R, D], float32.

    Raises:
        InputError: the parts are not what it makes of this dtype and these sizes.
    """
    a_TR = unpack(_of_side(parts, "a"), dtype, (tokens, rank))
    return a_TR, unpack(_of_side(parts, "b"), dtype, (rank, dim))


def open_matrix(features: FeatureSet) -> FeatureMatrix:
    """The features of a cache of either kind: as they are stored, or A·B where it holds factors."""
    return FactorMatrix(features) if features.rank else FeatureMatrix(features)


class FactorMatrix(FeatureMatrix):
    """Features that are stored as factors: `load` gives A·B, `factors` gives A and B themselves, both in float32.

    Args:
        features: The images, in the order that indices count; of a cache of factors.
    """

    def __init__(self, features: FeatureSet) -> None:
        super().__init__(replace(features, dtype="float32"))
        self.features = features
        self.rank = features.rank
        self._parts: dict[str, dict[str, Tensor]] = {}

    def load(self, indices: Sequence[int], dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
        """Reconstruct some images; arguments, result and errors are those of `FeatureMatrix.load`."""
        x_NTD = torch.empty(len(indices), self.tokens, self.dim, dtype=dtype) if out is None else out
        for x_TD, index in zip(x_NTD, indices, strict=True):
            a_TR, b_RD = self._image(index)
            x_TD.copy_(a_TR @ b_RD)
        return x_NTD

    def factors(self, indices: Sequence[int]) -> Factors:
        """Read the factors of some images.

        Returns:
            A [n, T, R] and B [n, R, D], float32.

        Raises:
            CacheError: As `load`.
        """
        images = [self._image(index) for index in indices]
        a_NTR = torch.stack([a_TR for a_TR, _ in images]) if images else torch.empty(0, self.tokens, self.rank)
        b_NRD = torch.stack([b_RD for _, b_RD in images]) if images else torch.empty(0, self.rank, self.dim)
        return Factors(a_NTR, b_NRD)

    def _image(self, index: int) -> tuple[Tensor, Tensor]:
        row = self.features.rows[index]
        if row.shard not in self._parts:
            self._parts[row.shard] = self._map_parts(row.shard)
        parts = {name: part[row.row] for name, part in self._parts[row.shard].items()}
        return unpack_factors(parts, self.features.dtype, self.tokens, self.dim, self.rank)

    def _map_parts(self, name: str) -> dict[str, Tensor]:
        path = Path(self.features.directory) / "shards" / name
        try:
            with safe_open(path, framework="pt", device="cpu") as shard:
                return {part: shard.get_tensor(part) for part in shard.keys()}  # noqa: SIM118 (not a mapping)
        except (OSError, SafetensorError) as error:
            raise CacheError(
                f"{path}: the shard cannot be read ({error}); run `lowrank-tune features verify`, then apply again"
            ) from error


def _of_side(parts: Mapping[str, Tensor], side: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{side}."): part for name, part in parts.items() if name.startswith(f"{side}.")}
