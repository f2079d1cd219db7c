"""The database file that MLflow keeps its runs in, made whole or not at all.

MLflow makes its forty tables one after the other; killed meanwhile, it leaves a file that no MLflow can use. So a new
database is made beside, as `mlflow.db.<pid>.making`, and moved in when it is at its newest version.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import re
import shlex
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Literal

from filelock import FileLock

from lowrank_tune.errors import TrackingError
from lowrank_tune.tracking.store import Store, open_sqlite, sqlite_uri

logger = logging.getLogger(__name__)

State = Literal["absent", "current", "older", "newer", "foreign", "damaged"]
_SIDE_FILES = ("-journal", "-wal", "-shm")
"""What sqlite puts beside a database and must go wherever it goes: a new one would be ruined by another's journal."""
_REMEDY = "move it away, or name another store in tracking.uri"


def open_database(store: Store, fill: Callable[[Store], None] = lambda fresh: None) -> None:
    """Make a store's database ready for MLflow: it is made, brought to the newest version, or made anew and filled.

    One that was left half made, or is damaged, is set aside as `mlflow.db.unusable-<time>` where it is the results
    directory's own.

    Raises:
        TrackingError: it is of a newer MLflow, or of another program, or not the results directory's own and unusable.
    """
    path = store.database
    if path is None or database_state(path) == "current":
        return
    own, path = store.is_own, path.resolve()  # a link stays one
    with FileLock(path.with_name(f".{path.name}.lock")):
        state = database_state(path)
        if state == "current":
            return
        for left in path.parent.glob(f"{path.name}.*.making*"):
            left.unlink(missing_ok=True)
        making = path.with_name(f"{path.name}.{os.getpid()}.making")
        if state == "older" and _upgraded(path, making):
            making.replace(path)
            return
        unusable = state != "absent"
        if state == "older" and _has_runs(path):
            raise TrackingError(is_older(store))
        if unusable and not own:
            raise TrackingError(f"tracking store {store.shown}: it was left half made or is damaged; {_REMEDY}")
        _migrate(making, fresh=True)
        aside = path.with_name(f"{path.name}.unusable-{time.strftime('%Y%m%dT%H%M%S')}")
        if unusable:
            fill(replace(store, uri=sqlite_uri(making)))
            logger.error("%s was left half made or is damaged: it is now %s, and made anew", path, aside.name)
        # The database last, and by a link: one is there at every moment, and this is begun again where it is cut off.
        for suffix in _SIDE_FILES:
            beside = Path(f"{path}{suffix}")
            if beside.exists():
                beside.rename(f"{aside}{suffix}")
        if unusable:
            os.link(path, aside)
        making.replace(path)


def is_older(store: Store) -> str:
    """What is said of a database that an older MLflow has written."""
    # Only the environment may hold a password.
    address = shlex.quote(store.shown) if store.shown == store.uri else '"$MLFLOW_TRACKING_URI"'
    return (
        f"tracking store {store.shown}: an older MLflow has written it; make a copy, then bring it up to date with "
        f"`mlflow db upgrade {address}`, or {_REMEDY}"
    )


def database_fault(path: Path) -> str:
    """What keeps MLflow from using a database file, in a few words, if anything; errors as `database_state`."""
    state = database_state(path)
    if state in ("absent", "current"):
        return ""
    copy = path.with_name(f"{path.name}.{os.getpid()}.making")
    try:
        usable = state == "older" and _upgraded(path, copy)
    finally:
        copy.unlink(missing_ok=True)
    if not usable and state == "older" and _has_runs(path):
        return f"an older MLflow has written it, and it cannot be brought up to date; {_REMEDY}"
    return "" if usable else "left half made, or damaged; the next study sets it aside and tells MLflow all again"


def database_state(path: Path) -> State:
    """How a database file is, as far as that is seen without trying, which takes seconds.

    Raises:
        TrackingError: it is of a newer MLflow, or of another program.
    """
    state = _state(path)
    if state == "newer":
        raise TrackingError(f"tracking store {path}: a newer MLflow has written it; install that, or {_REMEDY}")
    if state == "foreign":
        raise TrackingError(f"tracking store {path}: the database is another program's; {_REMEDY}")
    return state


def _state(path: Path) -> State:
    if not path.exists() or path.stat().st_size == 0:
        return "absent"
    try:
        with closing(open_sqlite(path)) as connection:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            marked = "alembic_version" in tables
            versions = connection.execute("SELECT version_num FROM alembic_version").fetchall() if marked else []
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError:
        return "damaged"
    known, newest = _revisions()
    found = {version for (version,) in versions}
    if found and found <= known:
        return "current" if found == {newest} else "older"
    if "experiments" in tables:
        return "newer" if found else "older"
    return "foreign" if tables else "absent"


def _has_runs(path: Path) -> bool:
    """Whether anything would be missed; a database that was left half made holds none."""
    try:
        with closing(open_sqlite(path)) as connection:
            return connection.execute("SELECT 1 FROM runs LIMIT 1").fetchone() is not None
    except sqlite3.DatabaseError:
        return False


def is_known_revision(version: str) -> bool:
    """Whether the installed MLflow knows a version of a database."""
    return version in _revisions()[0]


@functools.cache
def _revisions() -> tuple[frozenset[str], str]:
    """The versions that the installed MLflow knows, and the newest, without importing it."""
    spec = importlib.util.find_spec("mlflow")
    (package,) = (spec and spec.submodule_search_locations) or ("",)
    texts = [path.read_text("utf-8") for path in Path(package, "store/db_migrations/versions").glob("*.py")]
    known, before = (
        {found for text in texts for found in re.findall(rf'^{name}\s*=\s*"(\w+)"', text, re.MULTILINE)}
        for name in ("revision", "down_revision")
    )
    (newest,) = known - before
    return frozenset(known), newest


def _upgraded(path: Path, copy: Path) -> bool:
    """Copy a database and bring the copy to the newest version; whether that succeeded."""
    with closing(open_sqlite(path)) as source, closing(sqlite3.connect(copy)) as target:
        source.backup(target)
    try:
        _migrate(copy)
    except Exception as error:  # whatever the tables that are there, or are not, make of a migration
        logger.debug("%s cannot be brought to the newest version: %s", path, error)
        copy.unlink()
        return False
    return True


def _migrate(path: Path, *, fresh: bool = False) -> None:
    from mlflow.store.db import utils

    engine = utils.create_sqlalchemy_engine_with_retry(sqlite_uri(path))
    try:
        if fresh:
            utils._initialize_tables(engine)
        else:
            utils._upgrade_db(engine)
    finally:
        engine.dispose()
