"""Folders to read from, wherever they lie: a local path, or the address of an object store."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import fsspec
import psutil
import pyarrow as pa
from pyarrow.fs import FileSelector, FileSystem, FileType, FSSpecHandler, LocalFileSystem, PyFileSystem

from lowrank_tune.errors import InputError, redact

_NETWORK_FILESYSTEMS = frozenset(
    {"9p", "afs", "beegfs", "ceph", "cifs", "glusterfs", "gpfs", "lustre", "nfs", "nfs4", "smb3", "smbfs", "virtiofs"}
)
_READ_AHEAD = 8 * 2**20
"""Bytes of one request to an object store: some rows, so that a request's delay does not count."""


class Mount(Protocol):
    """What psutil tells of a mounted file system."""

    @property
    def mountpoint(self) -> str:
        """Where it is seen."""

    @property
    def fstype(self) -> str:
        """Its kind."""


@dataclass(frozen=True)
class Folder:
    """A folder that is only read.

    Attributes:
        name: its path, or its address without credentials.
        filesystem: where it lies.
        path: its path there.
    """

    name: str
    filesystem: FileSystem
    path: str

    @classmethod
    def at(cls, place: str | Path) -> Folder:
        """The folder at a path, or at any address that pyarrow or fsspec knows (`file://`, `s3://`, `gs://`, …).

        Raises:
            InputError: the address is of no known kind, or what its kind needs is missing.
        """
        if not is_uri(place):
            path = os.path.abspath(Path(place).expanduser())
            return cls(path, LocalFileSystem(), path)
        address = str(place)
        try:
            try:
                filesystem, path = FileSystem.from_uri(address)
            except pa.ArrowInvalid:
                other, path = fsspec.core.url_to_fs(address)
                filesystem = PyFileSystem(FSSpecHandler(other))
        except (OSError, ValueError, ImportError, pa.ArrowException) as error:
            raise InputError(f"{redact(address)}: no place to read from ({redact(str(error))}); "
                             "give a local path, or an address such as s3://bucket/results") from error  # fmt: skip
        return cls(redact(address).partition("?")[0].rstrip("/"), filesystem, path.rstrip("/"))

    def __truediv__(self, name: str) -> Folder:
        return Folder(f"{self.name}/{name}", self.filesystem, f"{self.path}/{name}")

    @property
    def last(self) -> str:
        """The folder's own name."""
        return self.path.rpartition("/")[2]

    @property
    def is_remote(self) -> bool:
        """Whether reading it goes over a network: an object store, or a network mount."""
        local = isinstance(self.filesystem, LocalFileSystem)
        return not local or on_network_mount(self.path, psutil.disk_partitions(all=True))

    def exists(self) -> bool:
        """Whether there is such a folder."""
        return bool(self.filesystem.get_file_info(self.path).type == FileType.Directory)

    def size(self, name: str) -> int:
        """Bytes of a file in it.

        Raises:
            FileNotFoundError: there is no such file.
            OSError: the place does not answer.
        """
        info = self.filesystem.get_file_info(f"{self.path}/{name}")
        if info.type != FileType.File:
            raise FileNotFoundError(f"{self.name}/{name}")
        return int(info.size)

    def read(self, name: str) -> bytes:
        """Read a file in it as a whole.

        Raises:
            OSError: it is missing, or the place does not answer.
        """
        with self.open(name) as file:
            return bytes(file.read())

    def open(self, name: str) -> pa.NativeFile:
        """Open a file in it, to be read from its start on."""
        ahead = None if isinstance(self.filesystem, LocalFileSystem) else _READ_AHEAD
        return self.filesystem.open_input_stream(f"{self.path}/{name}", compression=None, buffer_size=ahead)

    def files(self) -> list[str]:
        """Names of the files in it, the latest last; none when it is missing."""
        infos = self.filesystem.get_file_info(FileSelector(self.path, allow_not_found=True))
        found = [(info.mtime_ns or 0, str(info.base_name)) for info in infos if info.type == FileType.File]
        return [name for _, name in sorted(found)]

    def bytes(self) -> int:
        """How many bytes its files have."""
        infos = self.filesystem.get_file_info(FileSelector(self.path, allow_not_found=True))
        return sum(info.size for info in infos if info.type == FileType.File)

    def folders(self) -> list[str]:
        """Names of the folders in it, sorted; none when it is missing."""
        infos = self.filesystem.get_file_info(FileSelector(self.path, allow_not_found=True))
        return sorted(str(info.base_name) for info in infos if info.type == FileType.Directory)


def is_uri(place: str | Path) -> bool:
    """Whether a place is an address and no path."""
    return isinstance(place, str) and "://" in place


def join(place: str, name: str) -> str:
    """A place within a place; the query of an address stays at its end."""
    address, mark, query = place.partition("?") if is_uri(place) else (place, "", "")
    return f"{address.rstrip('/')}/{name}{mark}{query}"


def results_place(results: str | Path | None) -> str:
    """The results directory's name: what is given, else LOWRANK_TUNE_RESULTS, else `results`."""
    return str(results or os.environ.get("LOWRANK_TUNE_RESULTS") or "results")


def on_network_mount(path: str, partitions: Iterable[Mount]) -> bool:
    """Whether a local path lies on a network mount or a FUSE file system.

    Args:
        path: absolute; links are followed.
        partitions: what is mounted, as `psutil.disk_partitions(all=True)` tells it.
    """
    place = Path(os.path.realpath(path))
    above = [part for part in partitions if place.is_relative_to(part.mountpoint)]
    if not above:
        return False
    # Of two mounts at one point the later one is seen.
    kind = max(enumerate(above), key=lambda entry: (len(Path(entry[1].mountpoint).parts), entry[0]))[1].fstype
    return kind in _NETWORK_FILESYSTEMS or kind.startswith("fuse.")
