"""The features that a decomposer is applied to: a cache, or a directory of `features_N.pt`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lowrank_tune.caches.catalog import find_cache
from lowrank_tune.caches.identity import fingerprint
from lowrank_tune.caches.places import is_uri
from lowrank_tune.caches.sealed import SOURCES
from lowrank_tune.caches.staging import open_local
from lowrank_tune.features.files import SourceFiles, hash_files
from lowrank_tune.features.record_table import write_record_table
from lowrank_tune.features.sources import SourceRecords, read_records
from lowrank_tune.features.tensors import first_shape
from lowrank_tune.spec.features import TensorSource


@dataclass(frozen=True)
class Given:
    """What is to be decomposed.

    Attributes:
        shown: its place, for messages.
        tokens: T.
        dim: D.
        fingerprint: a cache's; for tensors it says no more than what they are, for their bytes are their keys.
        encoder: what made the features, for people.
        weights: `random`, `pretrained` or `unknown`.
        keys: of every image that can be read, each once, in order.
        unreadable: for each record that has none, why.
        place: the cache's; empty for tensors.
        paths: key -> file, for tensors.
        records: the user's records: of tensors, or the cache's own table.
    """

    shown: str
    tokens: int
    dim: int
    fingerprint: str
    encoder: str
    weights: str
    keys: tuple[str, ...]
    unreadable: tuple[str, ...]
    place: str
    paths: Mapping[str, Path]
    records: tuple[SourceRecords, SourceFiles] | Path | None

    def write_records(self, directory: Path, reasons: Mapping[str, str]) -> None:
        """Write down which record each image is of, into another cache's `sources/`.

        Args:
            directory: that cache.
            reasons: key -> why it is quarantined there.

        Raises:
            OSError: the directory cannot be written.
        """
        if isinstance(self.records, tuple):
            records, files = self.records
            errors = [
                error if key is None else reasons.get(key) for key, error in zip(files.keys, files.errors, strict=True)
            ]
            write_record_table(directory, records, files.keys, errors)
        elif self.records is not None and not (copy := directory / SOURCES / self.records.name).exists():
            partial = copy.with_name(f".{os.getpid()}-{copy.name}")
            shutil.copyfile(self.records, partial)
            os.replace(partial, copy)


def find_given(name: str, results: str | Path | None) -> Given:
    """Find what is to be decomposed.

    Args:
        name: a cache's fingerprint, the beginning of it, its path or address; or a directory with `features_N.pt`.
        results: where fingerprints are looked for; as for the commands on caches.

    Raises:
        InputError: there is nothing of that name, or nothing in it.
        CacheError: the cache is unsealed or damaged.
    """
    directory = Path(name).expanduser()
    if is_uri(name) or not directory.is_dir():
        return _of_cache(find_cache(results, name))
    if any(directory.glob("features_*.pt")):
        return _of_tensors(directory)
    return _of_cache(find_cache(results, str(directory.absolute())))


def _of_cache(place: str) -> Given:
    features = open_local(place)
    table = Path(features.records_path) if features.records_path else None
    return Given(
        shown=features.directory,
        tokens=features.tokens,
        dim=features.dim,
        fingerprint=features.fingerprint,
        encoder=features.encoder,
        weights=features.weights,
        keys=tuple(row.key for row in features.rows),
        unreadable=(),
        place=place,
        paths={},
        records=table if table is not None and table.is_file() else None,
    )


def _of_tensors(directory: Path) -> Given:
    records = read_records(TensorSource(tensors=str(directory)), directory, 0)
    files = hash_files(records)
    tokens, dim = first_shape(path for path in records.paths if path is not None)
    unreadable = [f"{path}: {error}" for path, error in zip(files.records, files.errors, strict=True) if error]
    return Given(
        shown=str(directory),
        tokens=tokens,
        dim=dim,
        fingerprint=fingerprint({"kind": "tensors", "tokens": tokens, "dim": dim}),
        encoder="imported tensors",
        weights="unknown",
        keys=tuple(files.paths),
        unreadable=tuple(unreadable),
        place="",
        paths=files.paths,
        records=(records, files),
    )
