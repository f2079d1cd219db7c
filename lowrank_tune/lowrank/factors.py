"""Caches of factors: A [T, R] and B [R, D] of each image, few bits a number, read back as the features they stand for.

N images, T tokens, D dim, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowrank_tune.errors import CacheError
from lowrank_tune.lowrank.compression import pack, unpack
from lowrank_tune.lowrank.dataset import FeatureMatrix
from lowrank_tune.lowrank.decomposers import Factors
from lowrank_tune.records import FeatureSet

SIDES = ("a", "b")


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
    sides = zip(SIDES, (a_TR, b_RD), strict=True)
    return {f"{side}.{name}": part for side, factor in sides for name, part in pack(factor, dtype).items()}


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
        shapes = ((self.tokens, self.rank), (self.rank, self.dim))
        a_TR, b_RD = (
            unpack(_of_side(parts, side), self.features.dtype, shape) for side, shape in zip(SIDES, shapes, strict=True)
        )
        return a_TR, b_RD

    def _map_parts(self, name: str) -> dict[str, Tensor]:
        path = Path(self.features.directory) / "shards" / name
        try:
            with safe_open(path, framework="pt", device="cpu") as shard:
                return {part: shard.get_tensor(part) for part in shard.keys()}  # noqa: SIM118 (not a mapping)
        except (OSError, SafetensorError) as error:
            raise CacheError(
                f"{path}: the shard cannot be read ({error}); run `lowrank-tune features verify`, then apply again"
            ) from error


def _of_side(parts: dict[str, Tensor], side: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{side}."): part for name, part in parts.items() if name.startswith(f"{side}.")}
