"""Folders on any file system, and their names."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import fsspec
import pyarrow as pa
from pyarrow.fs import (
    FileSelector,
    FileSystem,
    FileType,
    FSSpecHandler,
    LocalFileSystem,
    PyFileSystem,
    SubTreeFileSystem,
)

from lowrank_tune.errors import InputError, redact
from lowrank_tune.files import is_uri

_READ_AHEAD = 8 * 2**20
"""Bytes of one request to an object store: some rows, so that a request's delay does not count."""


class Place(SubTreeFileSystem):
    """A folder that is only read, at a path or any address that pyarrow or fsspec knows (`file://`, `s3://`, …).

    Attributes:
        name: its path, or its address without credentials.
        last: the folder's own name.
        is_local: whether it lies on this machine's file system.

    Raises:
        InputError: the address is of no known kind, or what its kind needs is missing.
    """

    def __init__(self, place: str | Path) -> None:
        address, path = str(place), os.path.abspath(os.path.expanduser(place))
        filesystem: FileSystem = LocalFileSystem()
        self.name = path
        if is_uri(address):
            try:
                try:
                    filesystem, path = FileSystem.from_uri(address)
                except pa.ArrowInvalid:
                    other, path = fsspec.core.url_to_fs(address)
                    filesystem = PyFileSystem(FSSpecHandler(other))
            except (OSError, ValueError, ImportError, pa.ArrowException) as error:
                raise InputError(
                    f"{redact(address)}: no place to read from ({redact(str(error))}); "
                    "give a local path, or an address such as s3://bucket/results"
                ) from error
            self.name = redact(address).partition("?")[0].rstrip("/")
        super().__init__(path.rstrip("/"), filesystem)
        self.path = path.rstrip("/")
        self.last = self.path.rpartition("/")[2]
        self.is_local = isinstance(filesystem, LocalFileSystem)

    def open(self, path: str) -> pa.NativeFile:
        """Open a file in it, to be read from its start on."""
        return self.open_input_stream(path, compression=None, buffer_size=None if self.is_local else _READ_AHEAD)

    def read(self, path: str) -> bytes:
        """Read a file in it as a whole; an OSError where it is missing or the place does not answer."""
        with self.open(path) as file:
            return bytes(file.read())

    def entries(self, kind: FileType, folder: str = "") -> dict[str, int]:
        """Name and bytes of the files or folders in it or in a folder of it, the latest last; none if it is missing."""
        found = []
        for info in self.get_file_info(FileSelector(folder, allow_not_found=True)):
            if info.type == kind:
                with suppress(UnicodeDecodeError):  # a name in no encoding, which nothing of a cache has
                    found.append((info.mtime_ns or 0, str(info.base_name), int(info.size or 0)))
        return {name: size for _, name, size in sorted(found)}


def join(place: str, name: str) -> str:
    """A place within a place; the query of an address stays at its end."""
    address, mark, query = place.partition("?") if is_uri(place) else (place, "", "")
    return f"{address.rstrip('/')}/{name}{mark}{query}"
