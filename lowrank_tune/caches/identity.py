"""What makes two feature caches the same cache: their identity, its fingerprint, and in what two of them differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

Identity = dict[str, Any]


def fingerprint(identity: Identity) -> str:
    """16 hex digits of the identity's sha256."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def differences(expected: Identity, found: Identity) -> list[str]:
    """One text for each field in which two identities differ: `vision.depth: expected 32, found 24`."""
    wanted, there = dict(_fields(expected)), dict(_fields(found))
    return [
        f"{name}: expected {wanted.get(name)!r}, found {there.get(name)!r}"
        for name in sorted(wanted.keys() | there.keys())
        if wanted.get(name) != there.get(name)
    ]


def _fields(identity: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in identity.items():
        if isinstance(value, Mapping):
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
