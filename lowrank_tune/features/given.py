"""What is read, or decomposed, apart from a study: the images of a cache, or files of tensors."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lowrank_tune.config.source import TensorSource
from lowrank_tune.features.cache import fingerprint
from lowrank_tune.features.commits import UnusableError
from lowrank_tune.features.images import SourceFiles, SourceRecords, hash_files, read_unchanged
from lowrank_tune.features.remote import find_cache, is_cache, open_local
from lowrank_tune.features.shards import ShardPlan
from lowrank_tune.features.tensors import common_shape, find_tensors, load_tensor
from lowrank_tune.files import is_uri
from lowrank_tune.lowrank.data import FeatureMatrix, open_matrix
from lowrank_tune.records import FeatureSet


@dataclass(frozen=True)
class Given:
    """What is to be decomposed: a cache, or a directory of tensors.

    Attributes:
        features: what they are; those of tensors have no rows.
        files: the images that can be read, in order; those of a cache lie there.
        records: those of tensors; None for a cache.
    """

    features: FeatureSet
    files: SourceFiles
    records: SourceRecords | None = None

    @property
    def place(self) -> str:
        """Where the cache lies, for the workers; empty for tensors, whose paths are in the plans."""
        return "" if self.records else self.features.origin or self.features.directory


def find_given(name: str, results: str | Path | None) -> Given:
    """Find what is to be decomposed: what is there and is no cache are tensors.

    Args:
        name: a cache's fingerprint, the beginning of it, its path or address; or files of tensors: a directory, a file
            or a glob, as in a study file.
        results: where fingerprints are looked for.

    Raises:
        InputError: there is nothing of that name, or nothing in it.
        CacheError: the cache is unsealed or damaged.
    """
    directory = Path(os.path.expanduser(name))
    exists = not is_uri(name) and directory.exists()
    if not is_uri(name) and (exists or re.search(r"[*?\[{]", name)) and not is_cache(str(directory)):
        records = find_tensors(TensorSource(tensors=name), "FEATURES, which is no feature cache")
        files = hash_files(records)
        tokens, dim = common_shape(records, said="FEATURES")
        # It says no more than what they are, for their bytes are their keys.
        mark = fingerprint({"kind": "tensors", "tokens": tokens, "dim": dim})
        features = FeatureSet(str(directory), mark, "imported tensors", "unknown", "", tokens, dim, (), "")
        return Given(features, files, records)
    features = open_local(find_cache(results, str(directory.absolute()) if exists else name))
    keys = tuple(row.key for row in features.rows)
    nothing = (None,) * len(keys)
    return Given(features, SourceFiles(keys, nothing, nothing, dict.fromkeys(keys)))


def open_features(directory: str | Path) -> FeatureMatrix:
    """Open all images of a sealed feature cache, `results/features/<fingerprint>`, or of what `apply` wrote.

    `load([0, 1])` gives float32 [2, tokens, dim], of factors A·B, and `factors([0, 1])` A and B; coded images are
    decoded. A cache on an object store is copied to this node first, once (LOWRANK_TUNE_STAGING says where to).

    Raises:
        CacheError: it is unsealed or damaged.
        InputError: the address does not answer, or there is no room for a copy.
    """
    return open_matrix(open_local(directory))


def image_reader(place: str, shape: tuple[int, int]) -> Callable[[ShardPlan, int], Tensor]:
    """What reads the n-th image of a plan, finite float32 [T, D] = `shape`; its UnusableError says why one has none.

    `place` is `Given.place`.
    """
    matrix = open_matrix(open_local(place)) if place else None
    rows = {row.key: number for number, row in enumerate(matrix.features.rows)} if matrix else {}

    def read(plan: ShardPlan, number: int) -> Tensor:
        key = plan.keys[number]
        if matrix is not None:
            x_TD = matrix.load([rows[key]])[0]
        else:
            x_TD = load_tensor(read_unchanged(plan.images[number], key), shape).float()
        if not torch.isfinite(x_TD).all():
            raise UnusableError("the features hold NaN or infinite values")
        return x_TD

    return read
