"""What a tracking store may do to a study that is running: no figure is lost or doubled, and nobody waits."""

import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow_server import Gate, MlflowServer
from tracked_study import Reader, build_plan, config_of, metrics_of, outcome_of

from lowrank_tune.config.plan import Plan
from lowrank_tune.tracking.mlflow_tracker import StudyTracker
from lowrank_tune.tracking.store import local_uri

TRIALS, EPOCHS = 3, 4
LOCKER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
sys.stdin.readline()
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, migrated: Path) -> Iterator[MlflowServer]:
    database = tmp_path_factory.mktemp("server") / "mlflow.db"
    shutil.copy(migrated, database)
    server = MlflowServer(database)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def gate(server: MlflowServer) -> Iterator[Gate]:
    gate = Gate(server.port)
    yield gate
    gate.close()


def track(plan: Plan, between: Callable[[int], None]) -> StudyTracker:
    """Track some trials, with an event before each and a last one after them.

    A store that is down is mended by the last event only: telling it of a trial must not wait for it.
    """
    with StudyTracker(plan) as tracker:
        for number in range(TRIALS):
            config = config_of(number)
            between(number)
            tracker.trial_started(config)
            for epoch in range(1, EPOCHS + 1):
                tracker.trial_epoch(config.trial_id, epoch, metrics_of(epoch))
            tracker.trial_ended(outcome_of(plan, config, epochs=EPOCHS))
        between(TRIALS)
    return tracker


def check_complete(plan: Plan, uri: str) -> None:
    reader = Reader(uri, plan.spec.tracking.experiment or plan.spec.name)
    runs = reader.runs("trial")
    assert sorted(run.info.run_name for run in runs) == [config_of(number).trial_id for number in range(TRIALS)]
    assert {run.info.status for run in (reader.parent(), *runs)} == {"FINISHED"}
    for run in runs:
        for key in ("train_loss", "val_mse", "val_token_cosine", "val_residual_ratio", "lr"):
            assert [step for step, _ in reader.history(run, key)] == [1, 2, 3, 4]
        assert len(reader.history(run, "best_val_mse")) == 1


def test_a_server_that_is_killed_and_started_again_costs_nothing(server: MlflowServer, tmp_path: Path) -> None:
    plan = build_plan(tmp_path, name="killed", tracking={"uri": server.uri})

    def fail(number: int) -> None:
        if number == 1:
            time.sleep(1.0)  # the first trial is on its way
            server.kill()
        elif number == TRIALS:
            time.sleep(3.0)  # the writer has met the dead server
            server.start()

    tracker = track(plan, fail)
    assert tracker.problems == ()
    check_complete(plan, server.uri)


def test_a_server_that_answers_500_for_a_while_costs_nothing(gate: Gate, server: MlflowServer, tmp_path: Path) -> None:
    plan = build_plan(tmp_path, name="errors", tracking={"uri": gate.uri})

    def fail(number: int) -> None:
        gate.broken = 1 <= number < TRIALS
        if number == TRIALS:
            gate.broken = True
            deadline = time.monotonic() + 20
            while gate.refused < 2 and time.monotonic() < deadline:
                time.sleep(0.1)
            gate.broken = False

    tracker = track(plan, fail)
    assert tracker.problems == ()
    assert gate.refused >= 2
    check_complete(plan, server.uri)


def test_an_answer_that_is_lost_makes_no_second_run_and_no_second_figure(
    gate: Gate, server: MlflowServer, tmp_path: Path
) -> None:
    plan = build_plan(tmp_path, name="lost", tracking={"uri": gate.uri})
    endings = ["runs/create", "runs/log-batch", "runs/update"]

    def fail(number: int) -> None:
        if number in (1, 2):
            time.sleep(1.0)
            gate.lose += endings

    tracker = track(plan, fail)
    assert tracker.problems == ()
    assert set(gate.lost) == set(endings)
    check_complete(plan, server.uri)


def test_a_database_that_another_process_locks_for_a_while_costs_nothing(tmp_path: Path, migrated: Path) -> None:
    shutil.copy(migrated, tmp_path / "mlflow.db")
    plan = build_plan(tmp_path, name="locked")
    # MLflow waits for 20 s by itself; this lock outlasts it.
    command = [sys.executable, "-c", LOCKER, str(tmp_path / "mlflow.db")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as locker:
        assert locker.stdin is not None and locker.stdout is not None

        def fail(number: int) -> None:
            if number == 1:
                time.sleep(1.0)
            elif number == TRIALS:
                time.sleep(23.0)
                locker.stdin.close()

        def lock_then(number: int) -> None:
            if number == 1:
                assert locker.stdout.readline() == "locked\n"
                with pytest.raises(sqlite3.OperationalError, match="locked"):
                    sqlite3.connect(tmp_path / "mlflow.db", timeout=0).execute("BEGIN IMMEDIATE")
            fail(number)

        tracker = track(plan, lock_then)
    assert tracker.problems == ()
    check_complete(plan, local_uri(tmp_path))
