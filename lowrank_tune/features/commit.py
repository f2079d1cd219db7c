"""Writing a shard of a feature cache and committing it. N images, T tokens, D dim."""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from lowrank_tune.caches.shards import SHARDS, STORED, TENSOR, Commit, checksum, commit_path, header_of
from lowrank_tune.features.durable import write_durably, write_pieces_durably
from lowrank_tune.features.jobs import UnusableError


def to_stored(features_TD: Tensor, store_dtype: str) -> Tensor:
    """Convert to the cache's dtype.

    Args:
        features_TD: [T, D], of a floating type.
        store_dtype: `float16`, `bfloat16` or `float32`.

    Returns:
        [T, D] in that dtype.

    Raises:
        UnusableError: a value is NaN or infinite, or too large for the dtype.
    """
    if not torch.isfinite(features_TD).all():
        raise UnusableError("the features hold NaN or infinite values")
    stored = features_TD.to(getattr(torch, store_dtype))
    if not torch.isfinite(stored).all():
        largest = features_TD.abs().max().item()
        raise UnusableError(
            f"a value of {largest:.4g} does not fit {store_dtype}; set features.store_dtype to bfloat16 or float32"
        )
    return stored


def commit_shard(
    directory: Path,
    shard: str,
    keys: Sequence[str],
    features_NTD: Tensor | Sequence[Tensor],
    quarantined: Sequence[tuple[str, str]],
) -> Commit:
    """Write a shard and then its commit record.

    Args:
        directory: the cache; `shards/` and `commits/` are there.
        shard: file name.
        keys: one a row.
        features_NTD: N rows [T, D] in the cache's dtype, on the CPU, written one after the other; N may be 0.
        quarantined: key and reason of the images without a row.

    Raises:
        OSError: no space, no permission; nothing is committed then.
    """
    return commit_rows(directory, shard, keys, {TENSOR: features_NTD}, quarantined)


def commit_rows(
    directory: Path,
    shard: str,
    keys: Sequence[str],
    tensors: Mapping[str, Tensor | Sequence[Tensor]],
    quarantined: Sequence[tuple[str, str]],
) -> Commit:
    """Write a shard whose images are several tensors each, and then its commit record.

    Args:
        directory: as for `commit_shard`.
        shard: as for `commit_shard`.
        keys: one a row.
        tensors: by name, in the order of the cache's layout, N rows each.
        quarantined: as for `commit_shard`.

    Raises:
        OSError: as for `commit_shard`.
    """
    pieces = [[_bytes_of(row) for row in rows] for rows in tensors.values()]
    header = _header({name: rows[0] for name, rows in tensors.items()}, len(keys)) if keys else b""
    if keys:
        write_pieces_durably(directory / SHARDS / shard, [header, *itertools.chain.from_iterable(pieces)])
    commit = Commit(
        shard=shard,
        size=len(header) + sum(piece.nbytes for rows in pieces for piece in rows),
        header=checksum(header) if keys else "",
        rows=tuple((key, checksum(*row)) for key, row in zip(keys, zip(*pieces, strict=True), strict=True)),
        quarantined=tuple(quarantined),
    )
    write_durably(commit_path(directory, shard), json.dumps(asdict(commit), sort_keys=True).encode())
    return commit


def stored_as(row: Tensor) -> tuple[str, list[int]]:
    """Safetensors' dtype and the shape of a tensor, as a cache's layout has them."""
    return STORED[str(row.dtype).removeprefix("torch.")], list(row.shape)


def _header(first: Mapping[str, Tensor], count: int) -> bytes:
    """What safetensors writes before the values of so many such rows; its own writer would copy them twice."""
    entries = header_of({name: stored_as(row) for name, row in first.items()}, count)
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _bytes_of(row: Tensor) -> memoryview:
    # numpy has no bfloat16, but it has bytes.
    return row.reshape(-1).view(torch.uint8).numpy().data
