"""Records of images: where the bytes of each lie, their digests, and the table that keeps the user's columns."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from lowrank_tune.errors import InputError, printable, unescaped
from lowrank_tune.features.cache import SOURCES
from lowrank_tune.features.commits import checksum
from lowrank_tune.features.embedded import find_place, parts, read_place, turn
from lowrank_tune.files import file_sha256, write_durably
from lowrank_tune.records import FeatureSet

HASHING_THREADS = 8
_REASONS_SHOWN, _PATH_SHOWN = 5, 1000


@dataclass(frozen=True)
class SourceRecords:
    """A user's records, in order."""

    images: tuple[str | None, ...]  # where each one's image lies, as `read_bytes` takes it; None where it names none
    columns: pa.Table  # the user's own columns, a row a record; none where the source has none
    notes: tuple[str, ...] = ()  # what whoever gave the source should know, a sentence each: what was left out, …
    numbers: tuple[int, ...] | None = None  # each one's place in the user's list; their own where that is the list


def read_bytes(image: str) -> bytes:
    """Read an image's file, a tensor's, or what lies at its place in a table or a tar; an OSError where it cannot."""
    place = find_place(image)
    return read_place(place) if place else _regular(image).read_bytes()


def _regular(image: str) -> Path:
    """A path that has an end; an OSError of a pipe or a device, at which a reader would wait for ever."""
    if not stat.S_ISREG(os.stat(image).st_mode):
        raise OSError(errno.EINVAL, "is no regular file", image)
    return Path(image)


def read_recorded(path: str) -> bytes:
    """`read_bytes` of what a table of records names, which shows a name that is not UTF-8 with escapes."""
    try:
        return read_bytes(path)
    except FileNotFoundError:
        if unescaped(path) == path:
            raise
        return read_bytes(unescaped(path))


def read_original(features: FeatureSet, key: str) -> bytes:
    """Read the file behind an image's features; an OSError, with a reason, where no record names one that is here."""
    try:
        records = pyarrow.parquet.read_table(
            features.records_path, columns=["key", "path"], filters=[("key", "==", key)]
        )
    except pa.ArrowException as error:
        raise OSError(f"{features.records_path}: the images' paths cannot be read ({error})") from error
    reason = f"no record names the file of {key[:16]}"
    for path in filter(None, records["path"].to_pylist()):
        try:
            data = read_recorded(path)
        except (OSError, ValueError) as error:  # a path with a NUL is a ValueError
            reason = f"{path}: {getattr(error, 'strerror', None) or error}"
            continue
        if hashlib.sha256(data).hexdigest() == key:
            return data
        reason = f"{path}: has changed since"
    raise OSError(reason)


def read_unchanged(image: str, key: str) -> bytes:
    """Read bytes whose sha256 is known; an InputError where they cannot be read, or have changed."""
    try:
        data = read_bytes(image)
    except OSError as error:
        raise InputError(f"{error}; run again") from error
    if hashlib.sha256(data).hexdigest() != key:
        raise InputError(f"{image}: changed while the extraction was running; run again")
    return data


@dataclass(frozen=True)
class SourceFiles:
    """The files of a source, or the images of a cache, which have keys alone."""

    keys: tuple[str | None, ...]  # sha256 of each record's file, None where it cannot be read
    unread: tuple[str | None, ...]  # why not, None where it can
    records: tuple[str | None, ...]
    images: Mapping[str, str | None]  # key -> one place that has it, in the order of the records

    def errors(self, quarantined: Mapping[str, str]) -> list[str | None]:
        """Why each record has no features, with what is known of keys; None for those that have or may have."""
        return [
            error if key is None else quarantined.get(key) for key, error in zip(self.keys, self.unread, strict=True)
        ]

    def check(self, quarantined: Mapping[str, str], limit: float, source: str, option: str) -> None:
        """Refuse, as an InputError, where more than the fraction `limit` of all records, or every one, has no image."""
        errors = self.errors(quarantined)
        named = zip(self.records, self.keys, errors, strict=True)
        broken = [f"{(path or (key or 'a record')[:16])[:_PATH_SHOWN]}: {error}" for path, key, error in named if error]
        if len(broken) <= limit * len(errors) and len(broken) < len(errors):
            return
        shown = broken[:_REASONS_SHOWN]
        if len(broken) > len(shown):
            shown.append(f"and {len(broken) - len(shown)} more")
        listed = "\n  ".join(shown)
        advice = f"Correct or remove them, or raise {option}."
        if errors.count(os.strerror(errno.ENOENT)) == len(errors):
            advice = "None is there: features.source.root is the folder that a manifest's images are named from."
        raise InputError(
            f"{source}: {len(broken)} of {len(errors)} files cannot be used, {option} = {limit:g} allows "
            f"{int(limit * len(errors))}:\n  {listed}\n{advice}"
        )


def hash_files(records: SourceRecords) -> SourceFiles:
    """Read every image once, in bounded memory; one that cannot be read becomes an error of its records."""

    def digest(image: str | None) -> tuple[str | None, str | None]:
        if image is None:
            return None, "the record names no file"
        try:
            place = find_place(image)
            key = hashlib.sha256(read_place(place)).hexdigest() if place else file_sha256(_regular(image))
        except (OSError, ValueError) as error:  # a path with a NUL is a ValueError
            return None, getattr(error, "strerror", None) or str(error)
        return key, None

    def digests(part: range) -> list[tuple[str | None, str | None]]:
        with turn(records.images[part[0]]):
            return [digest(records.images[number]) for number in part]

    keys: list[str | None] = []
    unread: list[str | None] = []
    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        for made in threads.map(digests, parts(records.images)):
            keys += [key for key, _ in made]
            unread += [error for _, error in made]
    pa.default_memory_pool().release_unused()  # what was read of tables
    images: dict[str, str | None] = {}
    for key, path in zip(keys, records.images, strict=True):
        if key is not None:
            images.setdefault(key, path)
    return SourceFiles(tuple(keys), tuple(unread), records.images, images)


RECORD_COLUMNS = ("record", "key", "path", "error")
"""Of the table of a source's records, before the user's own."""


def write_record_table(
    directory: Path, records: SourceRecords, keys: Sequence[str | None], errors: Sequence[str | None]
) -> Path:
    """Write a parquet named by its content's digest, one row a record: number, key, path, error and the user's columns.

    A user's column whose name is taken becomes `source_<name>`.
    """
    places = [image and printable(image) for image in records.images]
    texts = (pa.array(each, pa.string()) for each in (keys, places, errors))
    numbers = range(len(keys)) if records.numbers is None else records.numbers
    own = [pa.array(numbers, pa.int64()), *texts]
    columns = dict(zip(RECORD_COLUMNS, own, strict=True))
    for name, column in zip(records.columns.column_names, records.columns.columns, strict=True):
        while name in columns:
            name = f"source_{name}"
        columns[name] = column
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.table(columns), sink)
    data = sink.getvalue().to_pybytes()
    path = directory / SOURCES / f"{checksum(data)}.parquet"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)  # a copy from an object store has no empty folders
        write_durably(path, data)
    return path
