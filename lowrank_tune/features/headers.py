"""The header of a safetensors file, read without loading a tensor."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any


def read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Read where the values begin and what they are.

    Returns:
        The offset of the first value in the file, and each tensor's `dtype`, `shape` and `data_offsets`; these count
        from there.

    Raises:
        ValueError: it is no safetensors file, or a truncated one.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise ValueError("shorter than a header")
        (length,) = struct.unpack("<Q", start)
        if 8 + length > size:
            raise ValueError("the header is longer than the file")
        header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("the header is no JSON object")
    header.pop("__metadata__", None)
    return 8 + length, header
