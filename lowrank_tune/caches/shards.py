"""The shards of a cache and their commit records, as files: named, read, checked. Needs no torch.

An image of a feature cache is one tensor, `features` [T, D]. A cache of another kind says in its identity which tensors
an image is.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank_tune.caches.headers import Readable, parse_header
from lowrank_tune.caches.identity import Identity
from lowrank_tune.caches.places import Folder

SHARD_ROWS = 64
"""Images a shard, at most."""

TENSOR = "features"
SHARDS = "shards"
COMMITS = "commits"

STORED = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "int8": "I8", "uint8": "U8"}
"""What safetensors calls each dtype of a cache."""
ITEM_BYTES = {"F16": 2, "BF16": 2, "F32": 4, "I8": 1, "U8": 1}

Layout = dict[str, tuple[str, list[int]]]
"""By name, in a shard's order, safetensors' dtype and the shape of each tensor that one image is."""


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


def layout(identity: Identity) -> Layout:
    """The tensors of one image in a cache of this identity: wide items first, as safetensors has them."""
    feature = STORED.get(identity["store_dtype"], ""), [identity["tokens"], identity["dim"]]
    tensors = identity.get("tensors", {TENSOR: feature})
    return {
        name: (kind, list(shape))
        for name, (kind, shape) in sorted(tensors.items(), key=lambda entry: (-ITEM_BYTES[entry[1][0]], entry[0]))
    }


def header_of(tensors: Layout, count: int) -> dict[str, Any]:
    """What a safetensors header says of so many images: each tensor's `dtype`, `shape` and `data_offsets`."""
    entries: dict[str, Any] = {}
    start = 0
    for name, (kind, shape) in tensors.items():
        end = start + count * _row_bytes(kind, shape)
        entries[name] = {"dtype": kind, "shape": [count, *shape], "data_offsets": [start, end]}
        start = end
    return entries


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
            tensors = layout(identity)
            if header != (expected := header_of(tensors, len(commit.rows))):
                return [f"{name}: holds {_shown(header)}, expected {_shown(expected)}"]
            return _checksum_problems(name, file, commit, start, tensors) if full else []
    except FileNotFoundError:
        return [f"{name}: is missing"]
    except (OSError, ValueError) as error:
        return [f"{name}: cannot be read ({error})"]


def _checksum_problems(name: str, file: Readable, commit: Commit, start: bytes, tensors: Layout) -> list[str]:
    problems = []
    if checksum(start) != commit.header:
        problems.append(f"{name}: the header is not the one that was committed")
    found = [_hash() for _ in commit.rows]
    for kind, shape in tensors.values():
        for row in found:
            row.update(file.read(_row_bytes(kind, shape)))
    for number, (row, (key, expected)) in enumerate(zip(found, commit.rows, strict=True)):
        if row.hexdigest() != expected:
            problems.append(f"{name}: row {number} ({key[:16]}) is not what was committed")
    return problems


def _row_bytes(kind: str, shape: Sequence[int]) -> int:
    return math.prod(shape) * ITEM_BYTES[kind]


def _shown(header: dict[str, Any]) -> str:
    entries = [
        f"{name} {entry.get('dtype')} {entry.get('shape')}" if isinstance(entry, dict) else name
        for name, entry in sorted(header.items())
    ]
    return ", ".join(entries) or "nothing"


def checksum(*pieces: bytes | memoryview) -> str:
    """16 hex digits of blake2b over the pieces, one after the other."""
    digest = _hash()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def _hash() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=8)
