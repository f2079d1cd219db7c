"""The shards of a feature cache and their commit records, as files: named, read, checked. Needs no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lowrank_tune.caches.headers import Readable, parse_header
from lowrank_tune.caches.identity import Identity
from lowrank_tune.caches.places import Folder

SHARD_ROWS = 64
"""Images a shard, at most."""

TENSOR = "features"
SHARDS = "shards"
COMMITS = "commits"

STORED = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
"""What safetensors calls each dtype of a cache."""
_ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Commit:
    """What is known about a shard, written after it.

    Attributes:
        shard: file name under `shards/`.
        size: the file's bytes; 0, and no file, where no image was usable.
        header: checksum of the file's bytes before the first value.
        rows: key and checksum of each row, in the tensor's order.
        quarantined: key and reason of each image that was to be in this shard and could not be encoded.
    """

    shard: str
    size: int
    header: str
    rows: tuple[tuple[str, str], ...]
    quarantined: tuple[tuple[str, str], ...]

    def keys(self) -> set[str]:
        """Every key that this shard has dealt with."""
        return {key for key, _ in self.rows + self.quarantined}


def shard_name(keys: Sequence[str]) -> str:
    """The file name of the shard that is planned for these keys: the same keys give the same name in every run."""
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()[:16] + ".safetensors"


def commit_path(directory: Path, shard: str) -> Path:
    """The commit record of a shard in the cache at `directory`."""
    return directory / COMMITS / Path(shard).with_suffix(".json").name


def read_commit(data: bytes) -> Commit:
    """Read the content of a commit record.

    Raises:
        ValueError: it is damaged.
    """
    try:
        fields = json.loads(data)
        rows = tuple((str(key), str(check)) for key, check in fields["rows"])
        quarantined = tuple((str(key), str(error)) for key, error in fields["quarantined"])
        return Commit(fields["shard"], fields["size"], fields["header"], rows, quarantined)
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a commit record ({error!r})") from error


def shard_problems(cache: Folder, commit: Commit, identity: Identity, *, full: bool) -> list[str]:
    """What is wrong with a committed shard: one text each, none when it is sound.

    Args:
        cache: the cache's folder.
        commit: what the shard should be.
        identity: the cache's; gives tokens, dim and dtype.
        full: also read every value and compare checksums.
    """
    if not commit.rows:
        return []
    shards = cache / SHARDS
    name = f"{shards.name}/{commit.shard}"
    try:
        size = shards.size(commit.shard)
        if size != commit.size:
            return [f"{name}: has {size} bytes, {commit.size} were committed"]
        with shards.open(commit.shard) as file:
            start, header = parse_header(file, size)
            shape = [len(commit.rows), identity["tokens"], identity["dim"]]
            entry = header.get(TENSOR, {})
            found = (entry.get("dtype"), entry.get("shape"), entry.get("data_offsets"))
            row_bytes = shape[1] * shape[2] * _ITEM_BYTES[identity["store_dtype"]]
            if found != (STORED[identity["store_dtype"]], shape, [0, row_bytes * shape[0]]):
                return [f"{name}: holds {found[0]} {found[1]}, expected {STORED[identity['store_dtype']]} {shape}"]
            return _checksum_problems(name, file, commit, start, row_bytes) if full else []
    except FileNotFoundError:
        return [f"{name}: is missing"]
    except (OSError, ValueError) as error:
        return [f"{name}: cannot be read ({error})"]


def _checksum_problems(name: str, file: Readable, commit: Commit, start: bytes, row_bytes: int) -> list[str]:
    problems = []
    if checksum(start) != commit.header:
        problems.append(f"{name}: the header is not the one that was committed")
    for row, (key, expected) in enumerate(commit.rows):
        if checksum(file.read(row_bytes)) != expected:
            problems.append(f"{name}: row {row} ({key[:16]}) is not what was committed")
    return problems


def checksum(data: bytes | memoryview) -> str:
    """16 hex digits of blake2b."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()
