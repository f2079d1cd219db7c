"""Whether a study can be tracked in a store: asked before anything is trained, and told in a sentence.

A local database is looked at without MLflow, whose import takes seconds; anything else is knocked at first, because
MLflow tries a database that is away for minutes, and then asked through MLflow itself.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import shlex
import socket
import sqlite3
import ssl
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

from lowrank_tune.config.schema import StudySpec
from lowrank_tune.errors import InputError, LowrankTuneError, TrackingError, is_utf8, redact
from lowrank_tune.tracking.database import database_state, is_known_revision, is_older
from lowrank_tune.tracking.store import Store, brief, open_sqlite, resolve_store, set_mlflow_defaults

PROBE_TIMEOUT_S = 5.0
_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
"""Where the databases that MLflow knows listen, unless an address says otherwise."""
_DRIVERS = {"psycopg2": "psycopg2-binary", "psycopg": "psycopg[binary]", "MySQLdb": "mysqlclient"}
"""The packages of database drivers that are not called as their module is."""
_PATIENCE = dict.fromkeys(("psycopg", "psycopg2"), ("connect_timeout",)) | dict.fromkeys(
    ("pymysql", "mysqldb"), ("connect_timeout", "read_timeout")
)
"""What makes a driver give up a server that takes a connection and says nothing, in seconds."""
_NAME_ANOTHER = "name another in tracking.uri or MLFLOW_TRACKING_URI (both unset: a database in the results directory)"


def reach_store(spec: StudySpec | None, results: Path) -> Store:
    """Choose the store, and have it answer whether it can take a study, if one is given; nothing is changed there.

    Raises:
        InputError: the address is not one that MLflow can use, or the experiment was deleted there.
        TrackingError: what is there does not answer, refuses, is of another version, or is no MLflow.
    """
    set_mlflow_defaults()
    store = resolve_store(spec.tracking.uri if spec else None, results)
    experiment = spec.experiment if spec else "Default"
    if store.database:
        _look_at_database(store, store.database, experiment)
    else:
        if _knock(store):
            _ask(store, experiment)
    registry = os.environ.get("MLFLOW_REGISTRY_URI")
    if registry and spec and spec.tracking.register_as:
        _ask_registry(store, Store(registry, None))
    return store


def _knock(store: Store) -> bool:
    """Whether there is anything to ask MLflow of, which makes its tables where there is none."""
    scheme = re.split(r"[:+]", store.uri.lower())[0]
    if scheme in ("http", "https"):
        _knock_at_server(store)
    elif scheme in _PORTS:
        return _knock_at_database(store, _PORTS[scheme])
    elif not store.is_local:
        _check_form(store)
    return True


def _look_at_database(store: Store, path: Path, experiment: str) -> None:
    if not is_utf8(str(path)):
        raise InputError(f"tracking store {path}: MLflow cannot open a file whose name is not UTF-8; rename it")
    try:
        # Not in sqlite's own way, which makes an empty file where there is none. Beside it, sqlite keeps a journal.
        with tempfile.TemporaryFile(dir=path.resolve().parent):
            pass
        if path.exists() and not path.is_file():
            raise sqlite3.OperationalError("not a file")
        if path.exists():
            with contextlib.closing(open_sqlite(path, PROBE_TIMEOUT_S)) as connection:
                connection.execute("BEGIN IMMEDIATE")
    except (OSError, sqlite3.OperationalError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise TrackingError(
            f"tracking store {store.shown}: {why}; see that its folder is there, that both can be written to and that "
            f"no other process holds it, or {_NAME_ANOTHER}"
        ) from None
    except sqlite3.DatabaseError:
        pass  # what is no database is told of below
    state = database_state(path)
    if not store.is_own and state == "damaged":
        raise TrackingError(
            f"tracking store {store.shown}: no database, or a damaged one; move it away, or {_NAME_ANOTHER}"
        )
    if not store.is_own and state == "older":
        raise TrackingError(is_older(store))
    if state in ("older", "current"):
        with contextlib.closing(open_sqlite(path)) as connection, contextlib.suppress(sqlite3.DatabaseError):
            query = "SELECT experiment_id FROM experiments WHERE name = ? AND lifecycle_stage = 'deleted'"
            if found := connection.execute(query, (experiment,)).fetchone():
                raise deleted(store, experiment, str(found[0]))


def _knock_at_server(store: Store) -> None:
    try:
        with urllib.request.urlopen(store.shown.rstrip("/") + "/health", timeout=PROBE_TIMEOUT_S):
            return
    except urllib.error.HTTPError as error:
        # Any other status comes from something that is alive; MLflow itself says what it refuses.
        if error.code < 500:
            return
        why = f"it answers {error.code} {error.reason}"
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):
            return  # MLflow has settings for certificates
        why = "within 5 seconds" if isinstance(reason, TimeoutError) else brief(reason)
    raise TrackingError(f"tracking server {store.shown} does not answer ({why}); start it, or {_NAME_ANOTHER}")


def _knock_at_database(store: Store, port: int) -> bool:
    from sqlalchemy import create_engine, inspect, make_url
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError

    try:
        url = make_url(store.uri)
        patience = _PATIENCE.get(url.get_dialect().driver, ())
        engine = create_engine(url, connect_args=dict.fromkeys(patience, int(PROBE_TIMEOUT_S)))
    except ImportError as error:
        name = error.name or str(error)
        raise InputError(
            f"tracking store {store.shown}: its database driver {name} is not installed; "
            f"`pip install {shlex.quote(_DRIVERS.get(name, name))}`, or {_NAME_ANOTHER}"
        ) from None
    except (ArgumentError, NoSuchModuleError, ValueError) as error:
        raise InputError(
            f"tracking store {store.shown}: no address of a database ({store.hide(error)}); correct it"
        ) from None
    try:
        if url.host:
            socket.create_connection((url.host, url.port or port), PROBE_TIMEOUT_S).close()
        return bool(inspect(engine).get_table_names())
    except Exception as error:  # each driver has its own
        raise TrackingError(
            f"tracking store {store.shown} cannot be used ({store.hide(error)}); see that it runs and knows user and "
            f"password, or {_NAME_ANOTHER}"
        ) from None
    finally:
        engine.dispose()


def _check_form(store: Store) -> None:
    """Refuse what MLflow takes for a folder of files, and addresses that lack a part."""
    uri = store.uri
    if uri.lower().startswith("sqlite"):
        raise InputError(
            f"tracking store {store.shown}: write sqlite:///relative/path.db or sqlite:////absolute/path.db"
        )
    if re.fullmatch(r"[\w.-]+:\d+(/.*)?", uri):
        raise InputError(f"tracking store {store.shown}: write http://{store.shown} for an MLflow server")
    folder = uri.startswith("file:") or not re.match("databricks|[a-z][a-z0-9+.-]+:", uri, re.IGNORECASE)
    if folder and os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() not in ("true", "1"):
        path = re.sub(r"^file:(//)?", "", uri)
        move = f"`mlflow migrate-filestore --source {shlex.quote(path)} --target sqlite:///mlflow.db` makes one of it; "
        raise InputError(
            f"tracking store {store.shown}: a folder of files, which MLflow has given up for databases and servers; "
            f"{move if Path(path).is_dir() else ''}{_NAME_ANOTHER}"
        )


def _ask(store: Store, experiment: str) -> None:
    try:
        from mlflow import MlflowClient

        client = MlflowClient(store.uri)
        found = client.get_experiment_by_name(experiment)
        sibling = found or client.get_experiment_by_name("Default")
    except Exception as error:  # of MLflow, of requests, of a database's driver, of a plugin
        raise _explained(store, error) from error
    if found is not None and found.name != experiment:
        raise _no_mlflow(store)
    if found is not None and found.lifecycle_stage != "active":
        raise deleted(store, experiment, found.experiment_id)
    if store.uri.lower().startswith("http") and sibling is not None and sibling.artifact_location:
        _check_artifacts(store, sibling.artifact_location)


def _check_artifacts(store: Store, address: str) -> None:
    """A server may leave artifacts to its clients: to a cloud's package, or to a folder that is there only."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    try:
        repository = get_artifact_repository(address, tracking_uri=store.uri)
        if isinstance(repository, LocalArtifactRepository):
            folder = Path(repository.artifact_dir)
            with tempfile.TemporaryFile(dir=next(path for path in (folder, *folder.parents) if path.exists())):
                pass
    except OSError as error:
        raise TrackingError(
            f"tracking server {store.shown} keeps artifacts in a folder, {address}, that this machine cannot write to "
            f"({error.strerror}); start it with --artifacts-destination, to take them itself, or mount the folder"
        ) from None
    except Exception as error:  # of whichever package the address needs
        raise TrackingError(
            f"tracking server {store.shown} keeps artifacts at {redact(address)}, which cannot be used from here "
            f"({store.hide(error)}); install what that needs, or start the server with --artifacts-destination"
        ) from None


def _ask_registry(store: Store, registry: Store) -> None:
    try:
        _knock(registry)
        from mlflow import MlflowClient

        MlflowClient(store.uri, registry.uri).search_registered_models(max_results=1)
    except Exception as error:
        said = str(error) if isinstance(error, LowrankTuneError) else registry.hide(error)
        raise TrackingError(
            f"MLFLOW_REGISTRY_URI, where tracking.register_as goes: {said.partition('; ')[0]}; correct or unset it"
        ) from error


def _explained(store: Store, error: Exception) -> LowrankTuneError:
    """What MLflow says of a store, with what to do about it."""
    code, said = getattr(error, "error_code", ""), store.hide(error)
    if code in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
        status = 401 if code == "UNAUTHENTICATED" else 403
        return TrackingError(
            f"tracking server {store.shown} refuses these credentials ({status}); set MLFLOW_TRACKING_USERNAME and "
            f"MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, to what it knows, or {_NAME_ANOTHER}"
        )
    if "unsupported URI" in said:
        return InputError(
            f"tracking store {store.shown}: no address that MLflow knows: http(s)://HOST:PORT, sqlite:///FILE, "
            f"postgresql://…, mysql://…, mssql://…, databricks; {_NAME_ANOTHER}"
        )
    if version := re.search(r"out-of-date database schema \(found version (\w+)", said):
        newer = f"tracking store {store.shown}: a newer MLflow has written it; install that, or {_NAME_ANOTHER}"
        return TrackingError(is_older(store) if is_known_revision(version[1]) else newer)
    if code == "ENDPOINT_NOT_FOUND" or "valid JSON" in said or "error code 405" in said or "redirects" in said:
        return _no_mlflow(store)
    kind = InputError if code == "INVALID_PARAMETER_VALUE" else TrackingError
    return kind(f"tracking store {store.shown}: {said}; correct it, or {_NAME_ANOTHER}")


def _no_mlflow(store: Store) -> TrackingError:
    return TrackingError(
        f"tracking server {store.shown} is no MLflow server, or asks for a login: it answers otherwise; check address, "
        f"path and credentials, or {_NAME_ANOTHER}"
    )


def deleted(store: Store, experiment: str, experiment_id: str) -> InputError:
    """A study that would go into an experiment which was deleted, as the UI does that."""
    where = f"MLFLOW_TRACKING_URI={shlex.quote(store.shown)} " if store.shown == store.uri else ""
    return InputError(
        f"MLflow experiment {experiment} was deleted from {store.shown}: restore it with `{where}mlflow experiments "
        f"restore --experiment-id {experiment_id}`, or name another in tracking.experiment"
    )
