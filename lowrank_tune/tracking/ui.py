"""MLflow's own pages on a results directory."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

from lowrank_tune.errors import InputError
from lowrank_tune.tracking.database import database_fault, open_database
from lowrank_tune.tracking.moved import stale_addresses
from lowrank_tune.tracking.store import local_uri, open_sqlite, resolve_store, set_mlflow_defaults
from lowrank_tune.tracking.view import TAG, VIEW

CHARTS = "&compareRunsMode=CHART"
"""After the address of an experiment's runs: its charts in place of its table."""
_GRACE_S = 5.0


def serve_ui(results: Path, *, host: str = "127.0.0.1", port: int = 5000) -> int:
    """Serve the UI until it is interrupted or terminated; anyone who reaches `host` can change the runs.

    Raises:
        InputError: there is nothing to show yet, or the port is taken.
    """
    if not (results / "mlflow.db").is_file():
        raise InputError(f"{results / 'mlflow.db'}: no study has been tracked here yet; run one, or pass --results DIR")
    _check_port(host, port)
    set_mlflow_defaults()
    store = resolve_store(local_uri(results), results)
    path = results.absolute() / "mlflow.db"
    if fault := database_fault(path):
        raise InputError(f"{path}: {fault}")
    open_database(store)
    if stale := sum(1 for _ in stale_addresses(store)):
        print(
            f"{stale} addresses of artifacts lead to where these results were before; "
            "`lowrank-tune reconcile STUDY_ID` corrects them",
            file=sys.stderr,
        )
    # Seven processes that nothing here asks anything of.
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", local_uri(results)]
    command += ["--artifacts-destination", (results.absolute() / "mlartifacts").as_uri()]
    command += ["--host", host, "--port", str(port), "--workers", "1"]
    # A session of its own: MLflow's workers and job runners outlive their parent unless the whole group is ended.
    server = subprocess.Popen(command, start_new_session=True)
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return server.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        signal.signal(signal.SIGTERM, previous)
        _end_group(server)


def first_page(results: Path, *, host: str = "127.0.0.1", port: int = 5000) -> str:
    """The address of the newest study's runs, on the view that is prepared for trials, or of the list of experiments.

    MLflow 3.17 opens an experiment as GenAI, whatever its kind is tagged as, unless the address says otherwise.
    """
    newest = (
        "SELECT experiment_id, EXISTS (SELECT 1 FROM experiment_tags AS tags WHERE tags.experiment_id = "
        "runs.experiment_id AND key = ?) FROM runs WHERE lifecycle_stage = 'active' ORDER BY start_time DESC LIMIT 1"
    )
    try:
        with contextlib.closing(open_sqlite(results / "mlflow.db")) as connection:
            found = connection.execute(newest, (TAG,)).fetchone()
    except sqlite3.Error:
        found = None
    page = f"experiments/{found[0]}/runs" if found else "experiments"
    view = f"&viewStateShareKey={VIEW}" if found and found[1] else ""
    return f"http://{host}:{port}/#/{page}?workflowType=machine_learning{view}"


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
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(server.pid, ending)
            server.wait(_GRACE_S)
