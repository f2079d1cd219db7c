"""A shard of a cache and its commit record: written, read and checked."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyarrow.fs import FileType

from lowrank_tune.errors import redact
from lowrank_tune.features.places import Place
from lowrank_tune.files import Readable, parse_header, write_durably

if TYPE_CHECKING:
    from torch import Tensor

Identity = dict[str, Any]
"""What the features of a cache depend on, beside the images' bytes."""
Layout = dict[str, tuple[str, list[int]]]
"""By name, in a shard's order, safetensors' dtype and the shape of each tensor that one image is."""
LENGTH, STREAM = "length", "stream"
CODED_IMAGE: Layout = {LENGTH: ("U32", []), STREAM: ("U8", [-1])}
"""Of a coded image, of as many bytes as `length` says: a shard's `stream` is those of all, one after another."""

SHARD_ROWS = 64
"""Images a shard, at most."""
TENSOR = "features"
SHARDS = "shards"
COMMITS = "commits"

STORED = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "int8": "I8", "uint8": "U8", "uint32": "U32"}
"""What safetensors calls each dtype of a cache."""
ITEM_BYTES = {"F16": 2, "BF16": 2, "F32": 4, "I8": 1, "U8": 1, "U32": 4}


class UnusableError(Exception):
    """This one image or tensor file cannot become features; the message is the reason, for its quarantine row."""


def to_stored(features_TD: Tensor, store_dtype: str) -> Tensor:
    """Convert floating [T, D] to the cache's dtype; an UnusableError where it does not hold what they are."""
    import torch

    if not torch.isfinite(features_TD).all():
        raise UnusableError("the features hold NaN or infinite values")
    dtype = getattr(torch, store_dtype)
    stored, largest = features_TD.to(dtype), features_TD.abs().max().item()
    # Below the least normal number digits are lost, and zeros are what is left in the end.
    vanish = 0 < largest < torch.finfo(dtype).tiny
    if vanish or not torch.isfinite(stored).all():
        remedy = "set features.store_dtype to bfloat16 or float32" if store_dtype == "float16" else "scale the features"
        said = f"the largest value, {largest:.4g}, vanishes in" if vanish else f"a value of {largest:.4g} does not fit"
        raise UnusableError(f"{said} {store_dtype}; {remedy}")
    return stored


@dataclass(frozen=True)
class Commit:
    """What is known about a shard, written after it.

    Attributes:
        shard: file name under `shards/`.
        size: the file's bytes; 0, and no file, where no image was usable.
        header: checksum of the file's bytes before the first value.
        rows: key and checksum of each row, in the tensors' order.
        quarantined: key and reason of each image that was to be in this shard and could not be used.
    """

    shard: str
    size: int
    header: str
    rows: tuple[tuple[str, str], ...]
    quarantined: tuple[tuple[str, str], ...]

    @classmethod
    def read(cls, data: bytes) -> Commit:
        """Read the content of a commit record; a damaged one is a ValueError."""
        try:
            fields = json.loads(data)
            rows = tuple((str(key), str(check)) for key, check in fields["rows"])
            quarantined = tuple((str(key), str(error)) for key, error in fields["quarantined"])
            return cls(fields["shard"], fields["size"], fields["header"], rows, quarantined)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a commit record ({error!r})") from error


def checksum(*pieces: bytes | memoryview) -> str:
    """16 hex digits of blake2b over the pieces, one after the other."""
    digest = hashlib.blake2b(digest_size=8)
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def shard_name(keys: Sequence[str]) -> str:
    """The file name of the shard that is planned for these keys: the same keys give the same name in every run."""
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()[:16] + ".safetensors"


def layout(identity: Identity) -> Layout:
    """The tensors of one image in a cache of this identity: wide items first, as safetensors has them."""
    feature = STORED.get(identity["store_dtype"], ""), [identity["tokens"], identity["dim"]]
    tensors = identity.get("tensors", {TENSOR: feature})
    return {
        name: (kind, list(shape))
        for name, (kind, shape) in sorted(tensors.items(), key=lambda entry: (-ITEM_BYTES[entry[1][0]], entry[0]))
    }


def _header(tensors: Layout, count: int, size: int) -> dict[str, Any]:
    """What a safetensors header says of so many images in `size` bytes: `dtype`, `shape`, `data_offsets` of tensors."""
    entries: dict[str, Any] = {}
    start = 0
    for name, (kind, shape) in tensors.items():
        end = size if name == STREAM else start + count * _row_bytes(kind, shape)
        rows = [end - start] if name == STREAM else [count, *shape]
        entries[name] = {"dtype": kind, "shape": rows, "data_offsets": [start, end]}
        start = end
    return entries


def _row_bytes(kind: str, shape: Sequence[int]) -> int:
    return math.prod(shape) * ITEM_BYTES[kind]


def commit_shard(
    directory: Path,
    shard: str,
    keys: Sequence[str],
    tensors: Mapping[str, Tensor | Sequence[Tensor]],
    quarantined: Sequence[tuple[str, str]],
) -> Commit:
    """Write a shard and then its commit record; safetensors' own writer would copy the values twice.

    `tensors` has, by name in the order of the cache's layout, a row in the cache's dtype for each of `keys`, which may
    be none; `quarantined` has key and reason of the other images. An OSError (no space, no permission, no such folder)
    leaves nothing committed.
    """
    import torch

    # numpy has no bfloat16, but it has bytes.
    pieces = [[row.reshape(-1).view(torch.uint8).numpy().data for row in rows] for rows in tensors.values()]
    values = sum(piece.nbytes for rows in pieces for piece in rows)
    header = b""
    if keys:
        shapes = CODED_IMAGE if STREAM in tensors else {name: stored_as(rows[0]) for name, rows in tensors.items()}
        text = json.dumps(_header(shapes, len(keys), values), separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        header = struct.pack("<Q", len(text)) + text
        write_durably(directory / SHARDS / shard, header, *itertools.chain.from_iterable(pieces))
    commit = Commit(
        shard=shard,
        size=len(header) + values,
        header=checksum(header) if keys else "",
        rows=tuple((key, checksum(*row)) for key, row in zip(keys, zip(*pieces, strict=True), strict=True)),
        quarantined=tuple(quarantined),
    )
    record = directory / COMMITS / Path(shard).with_suffix(".json").name
    write_durably(record, json.dumps(asdict(commit), sort_keys=True).encode())
    return commit


def stored_as(row: Tensor) -> tuple[str, list[int]]:
    """Safetensors' dtype and the shape of a tensor, as a cache's layout has them."""
    return STORED[str(row.dtype).removeprefix("torch.")], list(row.shape)


def shard_problems(cache: Place, commit: Commit, identity: Identity, *, full: bool) -> list[str]:
    """What is wrong with a committed shard, one text each; `full` also reads every value and compares checksums."""
    if not commit.rows:
        return []
    path = f"{SHARDS}/{commit.shard}"
    name = f"{cache.name}/{path}"
    try:
        info = cache.get_file_info(path)
        if info.type != FileType.File:
            return [f"{name}: is missing"]
        if info.size != commit.size:
            return [f"{name}: has {info.size} bytes, {commit.size} were committed"]
        with cache.open(path) as file:
            start, header = parse_header(file, commit.size)
            tensors = layout(identity)
            if header != (expected := _header(tensors, len(commit.rows), commit.size - len(start))):
                return [f"{name}: holds {_shown(header)}, expected {_shown(expected)}"]
            if not full:
                return []
            found = _row_checksums(file, tensors, len(commit.rows), commit.size - len(start))
    except FileNotFoundError:
        return [f"{name}: is missing"]
    except (OSError, ValueError) as error:
        return [f"{name}: cannot be read ({redact(str(error))})"]
    problems = [] if checksum(start) == commit.header else [f"{name}: the header is not the one that was committed"]
    for number, (row, (key, committed)) in enumerate(zip(found, commit.rows, strict=True)):
        if row != committed:
            problems.append(f"{name}: row {number} ({key[:16]}) is not what was committed")
    return problems


def _row_checksums(file: Readable, tensors: Layout, count: int, size: int) -> list[str]:
    """The checksum of each of `count` rows whose values are the next `size` bytes; a ValueError where they are not."""
    digests = [hashlib.blake2b(digest_size=8) for _ in range(count)]
    lengths: list[int] = []
    for name, (kind, shape) in tensors.items():
        if name == STREAM and sum(lengths) != size - count * _row_bytes(*CODED_IMAGE[LENGTH]):
            raise ValueError("the lengths of its streams do not add up to their bytes")
        for number, digest in enumerate(digests):
            piece = file.read(lengths[number] if name == STREAM else _row_bytes(kind, shape))
            digest.update(piece)
            if name == LENGTH:
                lengths.append(int.from_bytes(piece, "little"))
    return [digest.hexdigest() for digest in digests]


def stream_lengths(cache: Place, shard: str, count: int) -> list[int]:
    """Bytes of each of the `count` coded images of a shard; an OSError or ValueError where it cannot be read."""
    path = f"{SHARDS}/{shard}"
    with cache.open(path) as file:
        parse_header(file, cache.get_file_info(path).size)
        return [int.from_bytes(file.read(_row_bytes(*CODED_IMAGE[LENGTH])), "little") for _ in range(count)]


def _shown(header: dict[str, Any]) -> str:
    entries = [
        f"{name} {entry.get('dtype')} {entry.get('shape')}" if isinstance(entry, dict) else name
        for name, entry in sorted(header.items())
    ]
    return ", ".join(entries) or "nothing"
