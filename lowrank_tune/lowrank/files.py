"""Files that are either whole or absent."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Give `path` its content in one step: a reader sees the old file or the new one, never a part.

    Args:
        path: The file to make or replace; its folder is made when missing.
        write: Writes the content to the path that it is given, a temporary neighbour of `path`.

    Raises:
        OSError: The folder cannot be written; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
