"""Writing a shard of a feature cache and committing it. N images, T tokens, D dim."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from lowrank_tune.caches.shards import SHARDS, STORED, TENSOR, Commit, checksum, commit_path
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
    rows = [_bytes_of(row_TD) for row_TD in features_NTD]
    header = _header(features_NTD[0], len(rows)) if rows else b""
    if rows:
        write_pieces_durably(directory / SHARDS / shard, [header, *rows])
    commit = Commit(
        shard=shard,
        size=len(header) + sum(row.nbytes for row in rows),
        header=checksum(header) if rows else "",
        rows=tuple((key, checksum(row)) for key, row in zip(keys, rows, strict=True)),
        quarantined=tuple(quarantined),
    )
    write_durably(commit_path(directory, shard), json.dumps(asdict(commit), sort_keys=True).encode())
    return commit


def _header(row_TD: Tensor, count: int) -> bytes:
    """What safetensors writes before the values of one tensor [N, T, D]; its own writer would copy them twice."""
    kind = STORED[str(row_TD.dtype).removeprefix("torch.")]
    entry = {"dtype": kind, "shape": [count, *row_TD.shape], "data_offsets": [0, count * row_TD.nbytes]}
    text = json.dumps({TENSOR: entry}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _bytes_of(row_TD: Tensor) -> memoryview:
    # numpy has no bfloat16, but it has bytes.
    return row_TD.reshape(-1).view(torch.uint8).numpy().data
