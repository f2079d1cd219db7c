"""MLflow's server on a results directory, served as `lowrank-tune ui` does: what its failing costs, and its end."""

import contextlib
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from gate import Gate
from mlflow import MlflowClient
from tracked_once import assert_tracked_once
from tracked_study import Reader, build_plan, config_of, outcome_of, track_trial, write_status, write_study

from lowrank_tune.errors import InputError, TrackingError
from lowrank_tune.tracking import tracker as tracker_module
from lowrank_tune.tracking.reconcile import reconcile
from lowrank_tune.tracking.removal import remove_tracked
from lowrank_tune.tracking.tracker import Tracker
from lowrank_tune.tracking.ui import serve_ui

SERVE = (
    "import sys; from pathlib import Path; from lowrank_tune.tracking.ui import serve_ui; "
    "sys.exit(serve_ui(Path(sys.argv[1]), port=int(sys.argv[2])))"
)


Served = tuple[subprocess.Popen[bytes], int]
"""The server's process, and its port."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, migrated: Path) -> Iterator[Served]:
    results, port = tmp_path_factory.mktemp("served"), free_port()
    shutil.copy(migrated, results / "mlflow.db")
    command = [sys.executable, "-c", SERVE, str(results), str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 120
            while True:
                with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                    break
                assert time.monotonic() < deadline, "the server did not answer"
                time.sleep(0.2)
            yield process, port
        finally:
            process.terminate()
            process.wait(20)


@pytest.fixture
def gate(served: Served, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    monkeypatch.setattr(tracker_module, "PAUSE_S", 0.1)
    gate = Gate(served[1])
    yield gate
    gate.close()


def dead(gate: Gate, number: int) -> None:
    if number == 1:
        gate.close()
    elif number == 3:
        time.sleep(1.0)  # the tracker has met nobody
        gate.open()


def broken(gate: Gate, number: int) -> None:
    gate.status = 500 * (number >= 1)
    if number == 3:
        deadline = time.monotonic() + 30
        while gate.refused < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        gate.status = 0


def forgetful(gate: Gate, number: int) -> None:
    if number in (1, 2):
        gate.lose += ["runs/create", "runs/log-batch", "runs/update"]


@pytest.mark.parametrize("fail", [dead, broken, forgetful])
def test_a_server_that_fails_for_a_while_costs_nothing_and_makes_nothing_twice(
    gate: Gate, tmp_path: Path, fail: Callable[[Gate, int], None]
) -> None:
    plan = build_plan(tmp_path, name=fail.__name__, tracking={"uri": gate.uri})
    with Tracker(plan) as tracker:
        for number in range(3):
            fail(gate, number)
            track_trial(tracker, plan, config_of(number))
            time.sleep(0.5)  # each trial is on its way before the next
        fail(gate, 3)
    assert tracker.problems == ()
    assert_tracked_once(gate.uri, plan.study_dir)
    assert set(gate.lost) == ({"runs/create", "runs/log-batch", "runs/update"} if fail is forgetful else set())


def test_a_server_that_stays_away_leaves_what_a_reconciliation_tells(
    gate: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker_module, "PATIENCE_S", 1.0)
    plan = build_plan(tmp_path, name="away", tracking={"uri": gate.uri})
    with Tracker(plan) as tracker:
        track_trial(tracker, plan, config_of(0))
        time.sleep(1.0)
        gate.status = 500
        track_trial(tracker, plan, config_of(1), "asha")
        started = time.monotonic()
    assert time.monotonic() - started < 20
    assert tracker.problems[0] == "2 records could not be delivered"
    assert tracker.problems[1] == f"{gate.uri} does not answer (ResponseError)"
    gate.status = 0
    write_status(plan, "finished")
    assert reconcile(plan).runs_made == 1
    assert_tracked_once(gate.uri, plan.study_dir)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("/proc/theirs", "folder, /proc/theirs, that this machine cannot write to .*--artifacts-destination"),
        ("foo://bucket", "at foo://bucket, which cannot be used from here .*; install what that needs"),
    ],
)
def test_a_server_whose_artifacts_cannot_be_written_from_here_is_told(
    served: Served, address: str, said: str, tmp_path: Path
) -> None:
    uri = f"http://127.0.0.1:{served[1]}"
    MlflowClient(uri).create_experiment(address[:3], address)
    with pytest.raises(TrackingError, match=f"{uri} keeps artifacts .*{said}"):
        Tracker(build_plan(tmp_path, tracking={"uri": uri, "experiment": address[:3]}))


def test_a_server_older_than_mlflow_3_takes_all_but_models(gate: Gate, tmp_path: Path) -> None:
    gate.missing = "logged-models"
    plan = build_plan(tmp_path, name="old", tracking={"uri": gate.uri})
    with Tracker(plan) as tracker:
        track_trial(tracker, plan, config_of(0))
        tracker.compared(write_study(plan, [config_of(0)]), [outcome_of(plan, config_of(0))])
    assert [tracker.problems[0], gate.uri in tracker.problems[1]] == ["1 record could not be delivered", True]
    assert "older than MLflow 3" in tracker.problems[1]
    assert Reader(gate.uri, "old").history(Reader(gate.uri, "old").parent(), "test.svd.residual_ratio")


def test_a_removed_studys_files_go_from_its_server_and_where_it_refuses_are_told(gate: Gate, tmp_path: Path) -> None:
    plan = build_plan(tmp_path, name="removed", tracking={"uri": gate.uri})
    with Tracker(plan) as tracker:
        track_trial(tracker, plan, config_of(0))
        tracker.compared(write_study(plan, [config_of(0)]), [outcome_of(plan, config_of(0))])
    reader = Reader(gate.uri, "removed")
    parent = reader.parent()
    assert "report.html" in reader.artifacts(parent)
    gate.missing = "mlflow-artifacts"
    told = remove_tracked(plan)
    assert (told.runs, len(told.left)) == (2, 3)  # a model's, too
    assert parent.info.artifact_uri in told.left
    gate.missing = ""
    assert remove_tracked(plan).left == ()
    assert not reader.artifacts(parent)


def test_there_must_be_something_to_show_and_a_free_port(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"mlflow.db: no study has been tracked"):
        serve_ui(tmp_path, port=free_port())
    (tmp_path / "mlflow.db").touch()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"127.0.0.1:{port}: cannot listen .*--port"):
            serve_ui(tmp_path, port=port)


def test_nothing_of_the_server_survives_it(served: Served) -> None:
    # The last test here, for it ends the server.
    process = served[0]
    helpers = psutil.Process(process.pid).children(recursive=True)
    assert len(helpers) > 1
    process.terminate()
    assert process.wait(20) == 0
    assert psutil.wait_procs(helpers, timeout=5)[1] == []
