"""The header of a safetensors file, read without loading a tensor."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, Protocol


class Readable(Protocol):
    """A binary file."""

    def read(self, size: int, /) -> bytes:
        """Read so many bytes, or fewer at the file's end."""


def read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Read where the values begin and what they are.

    Returns:
        The offset of the first value in the file, and each tensor's `dtype`, `shape` and `data_offsets`; these count
        from there.

    Raises:
        ValueError: it is no safetensors file, or a truncated one.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        data, header = parse_header(file, path.stat().st_size)
    return len(data), header


def parse_header(file: Readable, size: int) -> tuple[bytes, dict[str, Any]]:
    """Read the header of a file that is open at its start.

    Args:
        file: a safetensors file.
        size: its bytes.

    Returns:
        The file's bytes before the first value, and each tensor's `dtype`, `shape` and `data_offsets`.

    Raises:
        ValueError: it is no safetensors file, or a truncated one.
        OSError: it cannot be read.
    """
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
