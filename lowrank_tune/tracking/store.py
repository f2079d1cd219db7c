"""Where a study is tracked: which MLflow store, and whether it answers.

Nothing here imports MLflow, which takes seconds: a wrong address must be told at once.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import urllib.error
import urllib.request
import warnings
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from lowrank_tune.errors import TrackingError, redact

_SQLITE = "sqlite:///"
_PROBE_TIMEOUT_S = 5.0
_DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    # MLflow repeats whatever fails, a run's creation whose answer was lost included, and would make two. The tracker
    # has repetitions of its own, which look first.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}


@dataclass(frozen=True, slots=True)
class Store:
    """An MLflow tracking store; `uri` may hold credentials, so show `shown` instead.

    A local store's artifacts go to `artifacts`; None leaves it to the server.
    """

    uri: str
    artifacts: Path | None

    @property
    def shown(self) -> str:
        return redact(self.uri)

    @property
    def database(self) -> Path | None:
        return Path(unquote(self.uri.removeprefix(_SQLITE).partition("?")[0])) if self.is_local else None

    @property
    def is_local(self) -> bool:
        return self.uri.startswith(_SQLITE)


def set_mlflow_defaults() -> None:
    """Keep MLflow quiet and quick to give up, unless the environment says otherwise; call before importing it."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    # About type hints of its own, whenever its model side is imported.
    warnings.filterwarnings("ignore", r".*Any type hint is inferred as AnyType", UserWarning)


def resolve_store(uri: str | None, results: Path) -> Store:
    """Choose the store: the study file's, else MLFLOW_TRACKING_URI's, else sqlite in the results directory."""
    chosen = uri or os.environ.get("MLFLOW_TRACKING_URI") or local_uri(results)
    local = chosen.startswith(_SQLITE)
    return Store(chosen, results.absolute() / "mlartifacts" if local else None)


def reach_store(uri: str | None, results: Path) -> Store:
    """Choose the store and have it answer, before MLflow is imported."""
    set_mlflow_defaults()
    store = resolve_store(uri, results)
    probe(store)
    return store


def local_uri(results: Path) -> str:
    """The address of a results directory's own database."""
    return sqlite_uri(results.absolute() / "mlflow.db")


def sqlite_uri(path: Path) -> str:
    """The address of a database file, whatever characters its name has."""
    return _SQLITE + str(path).replace("%", "%25").replace("?", "%3F")


def probe(store: Store) -> None:
    """Check within seconds that the store answers; a TrackingError where it does not."""
    if store.database:
        _probe_database(store, store.database)
    elif store.uri.startswith(("http://", "https://")):
        _probe_server(store)


def _probe_server(store: Store) -> None:
    try:
        with urllib.request.urlopen(store.shown.rstrip("/") + "/health", timeout=_PROBE_TIMEOUT_S):
            return
    except urllib.error.HTTPError as error:
        # Any other status comes from something that is alive; MLflow itself says later what it refuses.
        if error.code < 500:
            return
        why = f"it answers {error.code} {error.reason}"
    except (OSError, ValueError) as error:
        why = str(getattr(error, "reason", error))
    raise TrackingError(
        f"tracking server {store.shown} does not answer ({why}); start it, or name another in tracking.uri or "
        "MLFLOW_TRACKING_URI, or leave both unset to use a database in the results directory"
    )


def _probe_database(store: Store, path: Path) -> None:
    try:
        if path.exists():
            # Never in sqlite's own way, which makes an empty file where there is none.
            with contextlib.closing(open_sqlite(path, _PROBE_TIMEOUT_S)) as connection:
                connection.execute("BEGIN IMMEDIATE")
        elif not os.access(path.parent, os.W_OK):
            raise sqlite3.OperationalError("unable to open database file")
    except sqlite3.OperationalError as error:
        raise TrackingError(
            f"tracking store {store.shown}: {error}; check that the file can be written to and that no other "
            "process holds it, or name another store in tracking.uri"
        ) from None
    except sqlite3.DatabaseError:
        pass  # a damaged one is looked at when it is opened


def open_sqlite(path: Path, timeout_s: float = 5.0) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{quote(str(path))}?mode=rw", uri=True, timeout=timeout_s, isolation_level=None)
