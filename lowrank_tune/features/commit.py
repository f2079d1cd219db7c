"""Writing a shard of a feature cache and committing it. N images, T tokens, D dim."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save

from lowrank_tune.caches.shards import SHARDS, TENSOR, Commit, checksum, commit_path
from lowrank_tune.features.durable import write_durably
from lowrank_tune.features.jobs import UnusableError


def to_stored(features_TD: torch.Tensor, store_dtype: str) -> torch.Tensor:
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
    directory: Path, shard: str, keys: Sequence[str], features_NTD: torch.Tensor, quarantined: Sequence[tuple[str, str]]
) -> Commit:
    """Write a shard and then its commit record.

    Args:
        directory: the cache; `shards/` and `commits/` are there.
        shard: file name.
        keys: one a row.
        features_NTD: [N, T, D] in the cache's dtype, on the CPU; N may be 0.
        quarantined: key and reason of the images without a row.

    Raises:
        OSError: no space, no permission; nothing is committed then.
    """
    data = b""
    header = ""
    if keys:
        data = save({TENSOR: features_NTD.contiguous()})
        write_durably(directory / SHARDS / shard, data)
        header = checksum(data[: len(data) - features_NTD.nbytes])
    row_bytes = features_NTD[0].nbytes if keys else 0
    start = len(data) - row_bytes * len(keys)
    values = memoryview(data)[start:]
    rows = tuple((key, checksum(values[row * row_bytes : (row + 1) * row_bytes])) for row, key in enumerate(keys))
    commit = Commit(shard, len(data), header, rows, tuple(quarantined))
    write_durably(commit_path(directory, shard), json.dumps(asdict(commit), sort_keys=True).encode())
    return commit
