"""Where a study is tracked: which MLflow store.

Nothing here imports MLflow, which takes seconds.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import sqlite3
import warnings
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from lowrank_tune.errors import redact
from lowrank_tune.files import quoted_in_sqlite

_SQLITE, _SQLITE_QUOTED = "sqlite:///", "sqlite+pysqlite:///"
REASON_LENGTH = 300
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
"""The schemes of databases that MLflow itself opens."""
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

    A database's artifacts go to `artifacts`, for MLflow would put them into the working directory; None leaves it to
    the server.
    """

    uri: str
    artifacts: Path | None

    @property
    def shown(self) -> str:
        if self.is_local or self.uri.startswith("file:///") or not re.search("[:?].*@|[?]", self.uri, re.DOTALL):
            return self.uri
        scheme, mark, rest = self.uri.rpartition("://") if "://" in self.uri else ("", "", self.uri)
        place, _, query = rest.partition("?")
        # Of a password with a question mark, and of an @ in a query, nobody knows where they end.
        return f"{scheme}{mark}{'…' if '@' in query else place.rpartition('@')[2]}"

    @property
    def database(self) -> Path | None:
        return Path(unquote(self.uri.partition("///")[2].partition("?")[0])) if self.is_local else None

    @property
    def is_local(self) -> bool:
        return self.uri.startswith((_SQLITE, _SQLITE_QUOTED)) and not self.uri.endswith(("///", ":memory:"))

    @property
    def is_own(self) -> bool:
        """Whether it is the results directory's own database, which nobody else is asked about."""
        path = self.database
        return path is not None and self.artifacts == path.absolute().with_name("mlartifacts")

    @property
    def page(self) -> str:
        """Where its pages are, or the command that serves them; empty for the results directory's own database."""
        if self.is_own:
            return ""
        served = self.uri.lower().startswith(("http", "databricks"))
        return self.shown if served else f"mlflow ui --backend-store-uri {shlex.quote(self.shown)}"

    def hide(self, error: Exception) -> str:
        """An error in one line, without this address's credentials."""
        text = brief(error).replace(self.uri, self.shown)
        with contextlib.suppress(ValueError):
            password = urlsplit(self.uri).password or ""
            for secret in {password, unquote(password)} - {""}:
                text = text.replace(secret, "***")
        return redact(text)[:REASON_LENGTH]


def brief(error: object) -> str:
    """The first line of an error; of a request that MLflow could not make, where and why only."""
    said = (str(error).splitlines() or [""])[0] or type(error).__name__
    failed = re.search(r"API request to (\S+?)/api/.* failed with exception (?:.*\(Caused by (\w+))?", said)
    return f"{failed[1]} does not answer ({failed[2] or 'its answer is broken off'})" if failed else said


def set_mlflow_defaults() -> None:
    """Keep MLflow quiet and quick to give up, unless the environment says otherwise; call before importing it."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    # Whatever it says: an answer that is not waited for tells nothing, and no figure here is of another's model.
    os.environ["MLFLOW_ENABLE_ASYNC_LOGGING"] = "false"
    os.environ.pop("MLFLOW_ACTIVE_MODEL_ID", None)
    # About type hints of its own, whenever its model side is imported.
    warnings.filterwarnings("ignore", r".*Any type hint is inferred as AnyType", UserWarning)


def resolve_store(uri: str | None, results: Path) -> Store:
    """Choose the store: the study file's, else MLFLOW_TRACKING_URI's, else sqlite in the results directory."""
    chosen = (uri or os.environ.get("MLFLOW_TRACKING_URI") or "").strip() or local_uri(results)
    artifacts = results.absolute() / "mlartifacts"
    return Store(chosen, artifacts if chosen.startswith(DATABASES) else None)


def local_uri(results: Path) -> str:
    """The address of a results directory's own database."""
    return sqlite_uri(results.absolute() / "mlflow.db")


def sqlite_uri(path: Path) -> str:
    """The address of a database file, whatever characters its name has."""
    name = quoted_in_sqlite(path)
    # MLflow makes the folder that it reads in a plain address, which for a quoted one is another folder.
    return (_SQLITE if name == str(path) else _SQLITE_QUOTED) + name


def open_sqlite(path: Path, timeout_s: float = 5.0) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{quote(str(path))}?mode=rw", uri=True, timeout=timeout_s, isolation_level=None)
