"""Files that are either whole or absent, and JSON."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from lowrank_tune.errors import InputError, is_utf8

TEMPORARY_PREFIX = ".tmp-"
"""Names that begin so belong to an unfinished write; whoever holds the folder may delete them."""
LFS_POINTER = b"version https://git-lfs"
"""How a file begins that Git LFS has left in the place of one."""


def is_uri(place: str | Path) -> bool:
    """Whether a place is an address and no path."""
    return isinstance(place, str) and "://" in place


def quoted_in_sqlite(path: Path) -> str:
    """A path as it stands in an address of sqlite's."""
    return str(path).replace("%", "%25").replace("?", "%3F")


def results_place(results: str | Path | None) -> str:
    """The results directory, absolute unless it is an address: the given, else LOWRANK_TUNE_RESULTS, else `results`.

    Raises:
        InputError: its name is not UTF-8.
    """
    name = str(results or os.environ.get("LOWRANK_TUNE_RESULTS") or "results")
    place = name if is_uri(name) else os.path.abspath(os.path.expanduser(name))
    if not is_utf8(place):
        raise InputError(
            f"results directory {place}: its name is not UTF-8, so neither Ray nor MLflow opens it; name another with "
            "--results"
        )
    return place


def write_whole(path: Path, write: Callable[[Path], object], *, durable: bool = False) -> None:
    """Give `path` its content in one step: a reader sees the old file or the new one, never a part.

    `write` gets a temporary neighbour's path. A `durable` file outlives the machine's own death, at the cost of two
    fsyncs. The folder must be there: one made here would hide that its mount has gone.
    """
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}-{path.name}")
    try:
        write(temporary)
        if durable:
            sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync(path.parent)


def write_durably(path: Path, *pieces: bytes | memoryview) -> None:
    """Write these bytes one after the other, whole and durable."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            for piece in pieces:
                file.write(piece)

    write_whole(path, write, durable=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: object, *, indent: int | None = 1) -> None:
    """Write a value or record as JSON, whole; NaN is a ValueError."""
    write_text(path, json.dumps(value, indent=indent, allow_nan=False, default=asdict) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; a damaged one is a ValueError."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_fields(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty where the file is missing or damaged."""
    try:
        fields = read_json(path)
    except (OSError, ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_directory_once(directory: Path, files: Mapping[str, bytes]) -> None:
    """Make a folder with these files in one step, unless it, or another process's copy, is there."""
    if directory.exists():
        return
    temporary = directory.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}-{directory.name}")
    temporary.mkdir(parents=True)
    try:
        for name, data in files.items():
            write_durably(temporary / name, data)
        os.rename(temporary, directory)
    except OSError:
        if not directory.exists():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync(directory.parent)


def bytes_below(directory: Path) -> int:
    """What the files of a folder, and of those in it, hold."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file() and not path.is_symlink())


def remove_temporaries(directory: Path) -> None:
    """Delete what unfinished writes left in this folder."""
    for path in directory.glob(f"{TEMPORARY_PREFIX}*"):
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have the disk hold this file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Readable(Protocol):
    """A binary file."""

    def read(self, size: int, /) -> bytes:
        """Read so many bytes, or fewer at the file's end."""


def read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where a safetensors file's values begin, and each tensor's `dtype`, `shape` and `data_offsets` from there."""
    with path.open("rb") as file:
        data, header = parse_header(file, path.stat().st_size)
    return len(data), header


def parse_header(file: Readable, size: int) -> tuple[bytes, dict[str, Any]]:
    """The bytes before a safetensors file's first value, and its tensors; a ValueError where it is damaged."""
    start = file.read(8)
    if len(start) < 8:
        raise ValueError("shorter than a header")
    (length,) = struct.unpack("<Q", start)
    if 8 + length > size:
        raise ValueError("the header is longer than the file")
    text = file.read(length)
    header = json.loads(text)
    if not isinstance(header, dict):
        raise ValueError("the header is no JSON object")
    header.pop("__metadata__", None)
    return start + text, header
