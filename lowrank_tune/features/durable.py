"""Files that are either whole or not there, through kills and power cuts."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path

TEMPORARY_PREFIX = ".tmp-"
"""Names that begin so belong to an unfinished write; whoever holds the folder may delete them."""


def write_durably(path: Path, data: bytes) -> None:
    """Write a file so that its name never shows anything but all of `data`.

    Raises:
        OSError: as `write_pieces_durably`.
    """
    write_pieces_durably(path, [data])


def write_pieces_durably(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Write a file piece by piece so that its name never shows anything but all of them.

    The order is temporary file, fsync, rename, fsync of the folder.

    Raises:
        OSError: no space, no permission; the temporary file is removed and an older `path` is left as it was.
    """
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}-{path.name}")
    try:
        with temporary.open("wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _fsync_directory(path.parent)


def write_directory_once(directory: Path, files: Mapping[str, bytes]) -> None:
    """Make a folder with these files in one step; where it exists already, leave it.

    Two processes may do so at once: the first rename wins and the other's copy is dropped.

    Raises:
        OSError: no space, no permission.
    """
    if directory.exists():
        return
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}-{directory.name}")
    temporary.mkdir()
    try:
        for name, data in files.items():
            write_durably(temporary / name, data)
        os.rename(temporary, directory)
    except OSError:
        if not directory.exists():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _fsync_directory(directory.parent)


def remove_temporaries(directory: Path) -> None:
    """Delete what unfinished writes left in this folder."""
    for path in directory.glob(f"{TEMPORARY_PREFIX}*"):
        path.unlink(missing_ok=True)


def _fsync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
