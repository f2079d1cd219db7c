"""What people write down about a study: kept in its folder, from where MLflow and the report have it."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock

from lowrank_tune.errors import InputError, is_utf8, printable
from lowrank_tune.files import read_fields, write_json

_NOTES, _LOCK = "notes.json", ".notes.lock"
_LONGEST = 2000


def add_note(directory: Path, text: str) -> str:
    """Add a note to a study's folder, whether or not the study runs; returns it as it is shown.

    Raises:
        InputError: it is empty, too long, or no text.
    """
    # Paragraphs tell the notes apart in MLflow.
    text = re.sub(r"\n\s*\n", "\n", printable(text)).strip()
    if not text or len(text) > _LONGEST or not is_utf8(text):
        raise InputError(f"note: a text of 1 to {_LONGEST} characters is expected, and this one has {len(text)}")
    with FileLock(directory / _LOCK):
        notes = [*_read(directory), {"at": datetime.now(UTC).isoformat(timespec="seconds"), "text": text}]
        write_json(directory / _NOTES, {"notes": notes}, indent=2)
    return read_notes(directory)[-1]


def read_notes(directory: Path) -> list[str]:
    """A study's notes with their days, the oldest first."""
    return [f"{note['at'][:10]}: {note['text']}" for note in _read(directory)]


def _read(directory: Path) -> list[dict[str, str]]:
    notes: list[dict[str, str]] = read_fields(directory / _NOTES).get("notes", [])
    return notes
