"""One process at a time tells MLflow of a study."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from lowrank_tune.errors import InputError

LOCK = "tracker.lock"
"""In the study's folder; the system lets go of it when the process that holds it dies, however it dies."""


@contextmanager
def the_only_tracker(study_dir: Path) -> Iterator[None]:
    """Be the one process that tells MLflow of a study.

    Raises:
        InputError: another one is.
    """
    study_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(study_dir / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(
            f"study {study_dir.name}: a process is at work on it and keeps MLflow up to date; stop that one first"
        ) from None
    except (NotImplementedError, OSError):
        # A file system without locks: better unguarded than not at all.
        yield
        return
    try:
        yield
    finally:
        lock.release()
