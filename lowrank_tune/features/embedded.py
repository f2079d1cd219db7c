"""Images inside tables and tars: `FILE::COLUMN[ROW]`, `FILE::COLUMN[ROW][ITEM]` and `FILE::MEMBER`, and their bytes.

Such a place is a text, and any process that sees the file reads it. A table is read forward, one column and some
megabytes at once, from where the reading before it stopped: a shard of records in their order costs one pass.
"""

from __future__ import annotations

import ast
import base64
import bisect
import errno
import hashlib
import json
import os
import re
import tarfile
import threading
import urllib.parse
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from lowrank_tune.errors import InputError
from lowrank_tune.features.tensor_files import is_tensors, read_entry
from lowrank_tune.files import write_whole

BATCH_BYTES, BATCH_ROWS = 16 << 20, 256
"""Of a table, read at once. Its pages, which are read whole, may be larger; of equal images it may store one."""
CONTAINERS_AT_ONCE = 2
"""Tables and tars that threads read side by side: a table's page may hold a hundred photographs."""
FILES_TOGETHER = 256
"""That one thread reads."""

_CELL = re.compile(r"(?P<column>.+?)\[(?P<row>\d+)\](?:\[(?P<item>\d+)\])?", re.DOTALL)
_SIGNATURE = re.compile(
    rb"\xff\xd8\xff|\x89PNG|GIF8|BM.{4}\0{4}|II[*+]\0|MM\0[*+]|RIFF|.{4}ftyp|\0\0\0\x0cjP|\xffO\xffQ|\0\0\x01\0|8BPS",
    re.DOTALL,
)
"""What files of images begin with."""
_DATA = re.compile(r"(data:)?[\w.+-]+/[\w.+-]+(;[^,;]*)*;base64,|data:([\w.+-]+/[\w.+-]+)?(;[^,;]*)*,", re.IGNORECASE)
_BASE64 = re.compile(r"[A-Za-z0-9+/_\r\n-]+=*\s*")
_LISTED = re.compile(r"""\[\s*["'](data:|[A-Za-z0-9+/_-]{32})""")
"""How a text begins that is a list of texts which may be images."""


class Place(NamedTuple):
    """An image inside of a file."""

    file: str
    inside: str  # `COLUMN[ROW]`, `COLUMN[ROW][ITEM]`, a tar's member, or an entry of a file of tensors


def find_place(image: str) -> Place | None:
    """Tell what an image lies in; None where it is a file by itself, or is nowhere."""
    end = image.find("::")
    while end > 0:
        try:
            namesakes = _namesakes(image[:end])
        except OSError:
            end = image.find("::", end + 1)
            continue
        return None if namesakes and os.path.isfile(image) else Place(image[:end], image[end + 2 :])
    return None


@lru_cache(maxsize=1024)
def _namesakes(file: str) -> bool:
    """Whether files lie beside this one whose names look like places in it; an OSError where it is no file.

    One listing: to ask for each of a million places whether it is a file takes minutes on a network's disk.
    """
    if not os.path.isfile(file):
        raise FileNotFoundError(errno.ENOENT, "no such file", file)
    folder, name = os.path.split(file)
    return any(sibling.startswith(f"{name}::") for sibling in os.listdir(folder or "."))


def read_place(place: Place) -> bytes:
    """Read an image's bytes; an OSError that names the place where it cannot be read."""
    status = os.stat(place.file)
    stamp = status.st_ino, status.st_size, status.st_mtime_ns
    try:
        if (_open.file, _open.stamp) != (place.file, stamp):
            _open.file, _open.stamp, _open.reader = place.file, stamp, _reader(place.file, stamp)
        return _open.reader(place.inside)
    except Exception as error:  # a damaged file makes its library trip over whatever it holds
        _open.file = ""
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise OSError(errno.EIO, reason, "::".join(place)) from error


class _Open(threading.local):
    """What a thread has open: one file, in which it goes forward."""

    file = ""
    stamp: tuple[int, int, int] = (0, 0, 0)
    reader: Callable[[str], bytes]


_open = _Open()


def _closed(inside: str) -> bytes:
    raise ValueError(f"{inside}: its file is not open")


_containers_read = threading.BoundedSemaphore(CONTAINERS_AT_ONCE)


@contextmanager
def turn(image: str | None) -> Iterator[None]:
    """While a thread reads the part of a source that begins with this image; it leaves nothing open."""
    place = find_place(image) if image else None
    with _containers_read if _part(place) else nullcontext():
        yield
    if place:
        _open.file, _open.reader = "", _closed


def parts(images: Sequence[str | None]) -> Iterator[range]:
    """Cut images, in their order, into parts that threads read side by side, none of them anything twice."""
    start, current = 0, None
    for number, image in enumerate(images):
        part = _part(find_place(image) if image else None)
        if number > start and (part != current or (part is None and number - start == FILES_TOGETHER)):
            yield range(start, number)
            start = number
        current = part
    if images:
        yield range(start, len(images))


def _part(place: Place | None) -> tuple[str, int] | None:
    """A table's row group, or a tar."""
    try:
        starts = _row_starts(place.file) if place else None
    except (OSError, pa.ArrowException):
        return None
    if place is None or starts is None:
        return None
    cell = _CELL.fullmatch(place.inside)
    return place.file, bisect.bisect(starts, int(cell["row"])) if cell else 0


@lru_cache(maxsize=16)
def _row_starts(file: str) -> list[int] | None:
    """The first row of each row group of a table; empty for a tar, None for another file."""
    if is_table(file):
        return _starts(open_table(file))
    return None if is_tensors(file) else []


def is_table(file: str | Path) -> bool:
    """Whether a file begins as a parquet does."""
    with open(file, "rb") as opened:
        return opened.read(4) == b"PAR1"


def open_table(file: str | Path) -> pq.ParquetFile:
    """Open a parquet so that a column is read as it goes, never a whole row group of it."""
    return pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)


def _starts(table: pq.ParquetFile) -> list[int]:
    counts = (table.metadata.row_group(group).num_rows for group in range(table.num_row_groups))
    return list(accumulate(counts, initial=0))[:-1]


def read_batches(table: pq.ParquetFile, column: str, group: int) -> Iterator[pa.Array]:
    """A column's values in a row group, some megabytes at once."""
    held = table.metadata.row_group(group)
    rows = max(1, min(BATCH_ROWS, BATCH_BYTES * held.num_rows // max(1, held.total_byte_size)))
    for batch in table.iter_batches(rows, row_groups=[group], columns=[column], use_threads=False):
        yield batch.column(batch.schema.names.index(column))


class Column:
    """A table's column of images, read forward."""

    def __init__(self, file: str) -> None:
        self.table = open_table(file)
        self.starts = _starts(self.table)
        self.name, self.group, self.first = "", -1, 0
        self.batches: Iterator[pa.Array] = iter(())
        self.values = pa.nulls(0)

    def __call__(self, cell: str) -> bytes:
        """Read `COLUMN[ROW]` or `COLUMN[ROW][ITEM]`."""
        match = _CELL.fullmatch(cell)
        names = self.table.schema_arrow.names
        if match and match["column"] not in names:  # a name that itself ends like a cell
            match = re.fullmatch(r"(?P<column>.+)\[(?P<row>\d+)\](?P<item>)", cell, re.DOTALL)
        if match is None or match["column"] not in names:
            raise LookupError("there is no such column any more")
        self._go_to(match["column"], int(match["row"]))
        value = self.values[int(match["row"]) - self.first]
        if match["item"] and value.is_valid:
            value = plain(value.values)[int(match["item"])]
        found = value.as_py()
        if found is None:
            raise ValueError("there is no image any more")
        return decode_text(found) if isinstance(found, str) else bytes(found)

    def _go_to(self, name: str, row: int) -> None:
        group = bisect.bisect(self.starts, row) - 1
        if (name, group) != (self.name, self.group) or row < self.first:
            self.name, self.group, self.first, self.values = name, group, self.starts[group], pa.nulls(0)
            self.batches = read_batches(self.table, name, group)
        while row >= self.first + len(self.values):
            self.first += len(self.values)
            values = next(self.batches, None)
            if values is None:
                raise IndexError(f"there is no row {row} any more")
            self.values = values if is_list(values.type) else plain(values)


def is_list(kind: pa.DataType) -> bool:
    """Whether a column holds several values a record."""
    return any(test(kind) for test in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list))


def unwrapped(values: pa.Array) -> pa.Array:
    """The values themselves, out of dictionaries and extension types."""
    while isinstance(values, pa.ExtensionArray | pa.DictionaryArray):
        values = values.storage if isinstance(values, pa.ExtensionArray) else values.dictionary_decode()
    return values


def plain(values: pa.Array) -> pa.Array:
    """Texts or bytes themselves, `unwrapped`, out of structs that have `bytes`."""
    while isinstance(values := unwrapped(values), pa.StructArray):
        values = values.field("bytes")
    return values


class Members:
    """A tar's files, read where they lie."""

    def __init__(self, file: str, stamp: tuple[int, int, int]) -> None:
        self.index = _member_index(file, stamp)
        self.file = file

    def __call__(self, member: str) -> bytes:
        """Read a member."""
        if member not in self.index:
            raise LookupError("there is no such member any more")
        offset, size = self.index[member]
        with open(self.file, "rb") as opened:
            opened.seek(offset)
            data = opened.read(size)
        if len(data) < size:
            raise EOFError("the tar is cut short")
        return data


def _reader(file: str, stamp: tuple[int, int, int]) -> Callable[[str], bytes]:
    if is_table(file):
        return Column(file)
    return partial(read_entry, file) if is_tensors(file) else Members(file, stamp)


@lru_cache(maxsize=4)
def _member_index(file: str, stamp: tuple[int, int, int]) -> dict[str, tuple[int, int]]:
    return {member.name: (member.offset_data, member.size) for member in read_members(file)}


def read_members(file: str | Path) -> Iterator[tarfile.TarInfo]:
    """A tar's files in their order; a tarfile.ReadError where it is damaged, also where tarfile itself just stops."""
    with tarfile.open(file, "r:") as tar:
        placed: dict[str, tuple[int, int]] = {}
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined] # a kilobyte each
            if member.islnk() and member.linkname in placed:
                member.offset_data, member.size = placed[member.linkname]
            elif not member.isreg():
                continue
            placed[member.name] = member.offset_data, member.size
            yield member
        with open(file, "rb") as opened:
            opened.seek(tar.offset)
            if opened.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"no header where one must be, at byte {tar.offset}")


def is_encoded(text: str) -> bool:
    """Whether a text is an image itself, a `data:` URI or base64, and not where one lies."""
    head = text[:512].lstrip()
    if _DATA.match(head):
        return True
    if len(text) < 32 or " " in head[:32] or not _BASE64.fullmatch(head):
        return False
    return _SIGNATURE.match(_from_base64(head[:48])) is not None


def decode_text(text: str) -> bytes:
    """The bytes of a `data:` URI or of base64; what is no base64 in it is passed over, as browsers do."""
    text = text.lstrip()
    head, comma, rest = text.partition(",")
    if comma and head.rstrip().lower().endswith(";base64"):
        return _from_base64(urllib.parse.unquote(rest))
    if comma and head[:5].lower() == "data:":
        return urllib.parse.unquote_to_bytes(rest)
    return _from_base64(text)


def _from_base64(text: str) -> bytes:
    text = re.sub(r"[^A-Za-z0-9+/]", "", text.translate(str.maketrans("-_", "+/")))
    text = text[:-1] if len(text) % 4 == 1 else text
    return base64.b64decode(text + "=" * (-len(text) % 4))


def parsed_text(text: str) -> Any:
    """Return the list or object that a text is, as JSON or Python write it; else the text."""
    if text[:1] + text[-1:] in ("[]", "{}"):  # of a column of several types, or of a CSV
        with warnings.catch_warnings(action="ignore", category=Warning):  # of what is no Python after all
            for parse in (json.loads, ast.literal_eval):
                try:
                    return parse(text)
                except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
                    continue
    return text


def take_out(value: Any, cache_root: Path | None) -> Any:
    """A record, or a part of it, with the paths of images, as `keep_text` keeps them, in the stead of their texts."""
    match value:
        case str():
            if _LISTED.match(value) and (listed := parsed_text(value)) != (taken := take_out(listed, cache_root)):
                return json.dumps(taken)
            return keep_text(value, cache_root) if is_encoded(value) else value
        case list():
            return [take_out(item, cache_root) for item in value]
        case dict():
            return {name: take_out(item, cache_root) for name, item in value.items()}
    return value


def take_out_columns(table: pa.Table, cache_root: Path | None) -> pa.Table:
    """`take_out`, of a table's columns of texts."""
    for number, column in enumerate(table.columns):
        if pa.types.is_string(column.type) and any(
            text is not None and (_LISTED.match(text) or is_encoded(text)) for text in column.to_pylist()
        ):
            table = table.set_column(number, table.field(number).name, [take_out(column.to_pylist(), cache_root)])
    return table


def keep_text(text: str, cache_root: Path | None) -> str:
    """Write the image that a text is below `cache_root`, named by its content, and return its path.

    Where that is None nothing is written, and the path tells images apart; an InputError where it cannot be written.
    """
    data = decode_text(text)
    digest = hashlib.sha256(data).hexdigest()
    path = (cache_root or Path()).absolute() / "embedded" / digest[:2] / digest
    # Not synced: a machine that dies may leave one empty.
    try:
        if cache_root and (not path.exists() or path.stat().st_size != len(data)):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, lambda temporary: temporary.write_bytes(data))
    except OSError as error:
        raise InputError(f"{path}: cannot keep an image out of the manifest ({error}); make room for it") from error
    return str(path)
