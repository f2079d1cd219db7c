"""The shards of a feature cache and their commit records, as files: named, read, checked. Needs no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lowrank_tune.features.headers import read_header
from lowrank_tune.features.identity import Identity

SHARD_ROWS = 64
"""Images a shard, at most."""

TENSOR = "features"
SHARDS = "shards"
COMMITS = "commits"

_STORED = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
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


def read_commit(path: Path) -> Commit:
    """Read what `commit_shard` wrote.

    Raises:
        ValueError: the file is damaged.
        OSError: it cannot be read.
    """
    try:
        fields = json.loads(path.read_bytes())
        rows = tuple((str(key), str(check)) for key, check in fields["rows"])
        quarantined = tuple((str(key), str(error)) for key, error in fields["quarantined"])
        return Commit(fields["shard"], fields["size"], fields["header"], rows, quarantined)
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a commit record ({error!r})") from error


def shard_problems(directory: Path, commit: Commit, identity: Identity, *, full: bool) -> list[str]:
    """What is wrong with a committed shard: one text each, none when it is sound.

    Args:
        directory: the cache.
        commit: what the shard should be.
        identity: the cache's; gives tokens, dim and dtype.
        full: also read every value and compare checksums.
    """
    if not commit.rows:
        return []
    path = directory / SHARDS / commit.shard
    try:
        size = path.stat().st_size
        if size != commit.size:
            return [f"{path}: has {size} bytes, {commit.size} were committed"]
        start, header = read_header(path)
    except FileNotFoundError:
        return [f"{path}: is missing"]
    except (OSError, ValueError) as error:
        return [f"{path}: cannot be read ({error})"]
    shape = [len(commit.rows), identity["tokens"], identity["dim"]]
    entry = header.get(TENSOR, {})
    found = (entry.get("dtype"), entry.get("shape"), entry.get("data_offsets"))
    row_bytes = shape[1] * shape[2] * _ITEM_BYTES[identity["store_dtype"]]
    if found != (_STORED[identity["store_dtype"]], shape, [0, row_bytes * shape[0]]):
        return [f"{path}: holds {found[0]} {found[1]}, expected {_STORED[identity['store_dtype']]} {shape}"]
    return _checksum_problems(path, commit, start, row_bytes) if full else []


def _checksum_problems(path: Path, commit: Commit, start: int, row_bytes: int) -> list[str]:
    problems = []
    with path.open("rb") as file:
        if checksum(file.read(start)) != commit.header:
            problems.append(f"{path}: the header is not the one that was committed")
        for row, (key, expected) in enumerate(commit.rows):
            if checksum(file.read(row_bytes)) != expected:
                problems.append(f"{path}: row {row} ({key[:16]}) is not what was committed")
    return problems


def checksum(data: bytes | memoryview) -> str:
    """16 hex digits of blake2b."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()
