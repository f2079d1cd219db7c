"""Where a study is tracked: which MLflow store, and whether it answers.

Nothing here imports MLflow, which takes seconds: a wrong address must be told at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import urllib.error
import urllib.request
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from urllib.parse import quote

from lowrank_tune.errors import InputError, TrackingError, redact

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
    """An MLflow tracking store.

    Attributes:
        uri: what MLflow is given; may hold credentials, so show `shown` instead.
        artifacts: where a local store's artifacts go; None leaves it to the server.
    """

    uri: str
    artifacts: Path | None

    @property
    def shown(self) -> str:
        """The address without credentials."""
        return redact(self.uri)

    @property
    def is_local(self) -> bool:
        """Whether it is a database file, which needs no server."""
        return self.uri.startswith("sqlite:")


def set_mlflow_defaults() -> None:
    """Keep MLflow quiet and quick to give up, unless the environment says otherwise; call before importing it."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    # About type hints of its own, whenever its model side is imported.
    warnings.filterwarnings("ignore", r".*Any type hint is inferred as AnyType", UserWarning)


def resolve_store(uri: str | None, results: Path) -> Store:
    """Choose the store: the study file's, else MLFLOW_TRACKING_URI's, else sqlite in the results directory."""
    chosen = uri or os.environ.get("MLFLOW_TRACKING_URI") or local_uri(results)
    local = chosen.startswith("sqlite:")
    return Store(chosen, results.absolute() / "mlartifacts" if local else None)


def local_uri(results: Path) -> str:
    """The address of a results directory's own database."""
    return f"sqlite:///{results.absolute() / 'mlflow.db'}"


def probe(store: Store) -> None:
    """Check within seconds that the store answers.

    Raises:
        TrackingError: it does not; the message names the address without credentials, and the remedy.
    """
    if store.is_local:
        _probe_database(store)
    elif store.uri.startswith(("http://", "https://")):
        _probe_server(store)


def _probe_server(store: Store) -> None:
    try:
        with urllib.request.urlopen(store.shown.rstrip("/") + "/health", timeout=_PROBE_TIMEOUT_S):
            pass
    except urllib.error.HTTPError as error:
        # Any other status comes from something that is alive; MLflow itself says later what it refuses.
        if error.code >= 500:
            raise TrackingError(_unreachable(store, f"it answers {error.code} {error.reason}")) from None
    except (OSError, ValueError) as error:
        raise TrackingError(_unreachable(store, str(getattr(error, "reason", error)))) from None


def _probe_database(store: Store) -> None:
    path = store.uri.removeprefix("sqlite:///")
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=_PROBE_TIMEOUT_S)) as connection:
            connection.execute("BEGIN IMMEDIATE")
    except sqlite3.Error as error:
        raise TrackingError(
            f"tracking store {store.shown}: {error}; check that the file can be written to and that no other "
            "process holds it, or name another store in tracking.uri"
        ) from None


def _unreachable(store: Store, why: str) -> str:
    return (
        f"tracking server {store.shown} does not answer ({why}); start it, or name another in tracking.uri or "
        "MLFLOW_TRACKING_URI, or leave both unset to use a database in the results directory"
    )


_GRACE_S = 5.0


def serve_ui(results: Path, *, host: str = "127.0.0.1", port: int = 5000) -> int:
    """Serve the UI until it is interrupted or terminated; the server's helper processes end with it.

    Args:
        results: the results directory.
        host: the interface to listen on; anyone who reaches it can change the runs.
        port: the port to listen on.

    Returns:
        The exit code: 0 when it was asked to end.

    Raises:
        InputError: there is nothing to show yet, or the port is taken.
    """
    if not (results / "mlflow.db").is_file():
        raise InputError(f"{results / 'mlflow.db'}: no study has been tracked here yet; run one, or pass --results DIR")
    _check_port(host, port)
    set_mlflow_defaults()
    # Seven processes that nothing here asks anything of.
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", local_uri(results)]
    command += ["--artifacts-destination", str(results.absolute() / "mlartifacts")]
    command += ["--host", host, "--port", str(port), "--workers", "1"]
    # A session of its own: MLflow's workers and job runners outlive their parent unless the whole group is ended.
    server = subprocess.Popen(command, start_new_session=True)
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return server.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        signal.signal(signal.SIGTERM, previous)
        _end_group(server)


def first_page(results: Path, *, host: str = "127.0.0.1", port: int = 5000) -> str:
    """The address of the newest study's runs, as model training.

    MLflow 3.17 opens an experiment as GenAI, whatever its kind is tagged as, unless the address says otherwise.

    Args:
        results: the results directory; without a run in it, the address is that of the list of experiments.
        host: as for `serve_ui`.
        port: as for `serve_ui`.
    """
    store = f"file:{quote(str(results / 'mlflow.db'))}?mode=ro"
    newest = "SELECT experiment_id FROM runs ORDER BY start_time DESC LIMIT 1"
    try:
        with contextlib.closing(sqlite3.connect(store, uri=True)) as connection:
            found = connection.execute(newest).fetchone()
    except sqlite3.Error:
        found = None
    page = f"experiments/{found[0]}/runs" if found else "experiments"
    return f"http://{host}:{port}/#/{page}?workflowType=machine_learning"


def _check_port(host: str, port: int) -> None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except OSError as error:
        raise InputError(
            f"{host}:{port}: cannot listen there ({error.strerror}); pass another --port or --host"
        ) from None


def _end_group(server: subprocess.Popen[bytes]) -> None:
    for ending in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, ending)
        except ProcessLookupError:
            return
        try:
            server.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            continue


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
