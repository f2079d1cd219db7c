"""The files of a source: their keys, and which of them cannot be used."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from lowrank_tune.errors import InputError
from lowrank_tune.features.sources import SourceRecords

HASHING_THREADS = 8
REASONS_SHOWN = 5


@dataclass(frozen=True)
class SourceFiles:
    """The files of a source.

    Attributes:
        keys: sha256 of each record's file, None where it cannot be read.
        errors: why not, None where it can.
        records: each record's file, for messages.
        paths: key -> one file that has it, in the order of the records.
    """

    keys: tuple[str | None, ...]
    errors: tuple[str | None, ...]
    records: tuple[Path | None, ...]
    paths: dict[str, Path]


def hash_files(records: SourceRecords) -> SourceFiles:
    """Read every file once; one that cannot be read becomes an error of its records."""

    def digest(path: Path | None) -> tuple[str | None, str | None]:
        if path is None:
            return None, "the record names no file"
        try:
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest(), None
        except (OSError, ValueError) as error:  # a path with a NUL is a ValueError
            return None, getattr(error, "strerror", None) or str(error)

    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        keys, errors = zip(*threads.map(digest, records.paths), strict=True)
    paths: dict[str, Path] = {}
    for key, path in zip(keys, records.paths, strict=True):
        if key is not None and path is not None:
            paths.setdefault(key, path)
    return SourceFiles(keys, errors, records.paths, paths)


class Quarantine:
    """Which records have no usable image, and how many may.

    Args:
        files: the source's.
        limit: `features.max_quarantined`, a fraction of all records.
    """

    def __init__(self, files: SourceFiles, limit: float) -> None:
        self.files = files
        self.limit = limit

    def errors(self, reasons: Mapping[str, str]) -> list[str | None]:
        """Why each record has no features, None for those that have or may still have.

        Args:
            reasons: key -> why it is quarantined.
        """
        return [
            error if key is None else reasons.get(key)
            for key, error in zip(self.files.keys, self.files.errors, strict=True)
        ]

    def check(self, reasons: Mapping[str, str]) -> None:
        """Compare with the limit.

        Raises:
            InputError: it is exceeded, or no record is left; the message has the first reasons.
        """
        errors = self.errors(reasons)
        broken = [(path, error) for path, error in zip(self.files.records, errors, strict=True) if error]
        if len(broken) <= self.limit * len(errors) and len(broken) < len(errors):
            return
        listed = [f"\n  {path or 'a record'}: {error}" for path, error in broken[:REASONS_SHOWN]]
        more = f"\n  and {len(broken) - REASONS_SHOWN} more" if len(broken) > REASONS_SHOWN else ""
        raise InputError(
            f"features.source: {len(broken)} of {len(errors)} files cannot be used, "
            f"features.max_quarantined = {self.limit:g} allows {int(self.limit * len(errors))}:"
            f"{''.join(listed)}{more}\n"
            "Correct or remove them, or raise features.max_quarantined."
        )
