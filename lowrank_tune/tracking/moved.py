"""Artifacts that were moved together with their results directory are found again through a local database.

MLflow writes whole addresses of folders into its database, and has no call that changes one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

from lowrank_tune.tracking.store import Store, open_sqlite

_COLUMNS = (
    ("experiments", "artifact_location", 1),
    ("runs", "artifact_uri", 3),
    ("logged_models", "artifact_location", 4),
    ("model_versions", "source", 4),
    ("model_versions", "storage_location", 4),
)
"""Where addresses stand, and how many folders deep below `mlartifacts` they lead: experiment, run, `artifacts`."""


def follow_artifacts(store: Store) -> int:
    """Have a database name this results directory's artifacts where it names those of another that is gone or copied.

    Returns:
        How many addresses were changed.
    """
    stale = list(stale_addresses(store))
    if stale and store.database:
        with closing(open_sqlite(store.database)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            for table, column, row, address in stale:
                connection.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (address, row))
            connection.execute("COMMIT")
    return len(stale)


def stale_addresses(store: Store) -> Iterator[tuple[str, str, int, str]]:
    """The addresses that lead elsewhere, each as table, column, row and the right one."""
    if store.database is None or store.artifacts is None:
        return
    here = store.artifacts.as_uri()
    moved: dict[str, bool] = {}
    with closing(open_sqlite(store.database)) as connection:
        for table, column, depth in _COLUMNS:
            query = f"SELECT rowid, {column} FROM {table} WHERE {column} LIKE 'file:%/mlartifacts/%'"
            for row, address in connection.execute(query).fetchall():
                root, *below = address.rsplit("/", depth)
                if root == here or not root.endswith("/mlartifacts") or len(below) != depth:
                    continue
                if f"{root}/{below[0]}" not in moved:
                    folder = Path(unquote(urlsplit(root).path), unquote(below[0]))
                    moved[f"{root}/{below[0]}"] = _is_moved(folder, store.artifacts / folder.name, store.is_own)
                if moved[f"{root}/{below[0]}"]:
                    yield table, column, row, "/".join((here, *below))


def _is_moved(old: Path, new: Path, own: bool) -> bool:
    # A copy takes its own database along; a database that is shared goes on naming the original.
    if old.exists():
        return own and new.exists() and not old.samefile(new)
    return own or new.exists()
