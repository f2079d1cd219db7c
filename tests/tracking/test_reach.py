"""What a study cannot be tracked in is told before it trains, with the remedy, at once, and without a secret."""

import shutil
import socket
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from gate import Gate
from mlflow import MlflowClient
from tracked_once import assert_tracked_once
from tracked_study import build_plan, config_of, outcome_of, track_trial, write_study

from lowrank_tune.errors import InputError, LowrankTuneError, TrackingError
from lowrank_tune.tracking import reach
from lowrank_tune.tracking.reach import reach_store
from lowrank_tune.tracking.store import local_uri
from lowrank_tune.tracking.tracker import Tracker


@pytest.fixture
def gate() -> Iterator[Gate]:
    with closing(Gate()) as gate:
        yield gate


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("./mlruns", "a folder of files, .*migrate-filestore --source ./mlruns --target sqlite:///mlflow.db"),
        ("file:///no/mlruns", "a folder of files, which MLflow has given up for databases and servers; name another"),
        ("127.0.0.1:5000", "write http://127.0.0.1:5000"),
        ("tracker:5000/base", "write http://tracker:5000/base"),
        ("foo://me:se'cret@host", "foo://host: no address that MLflow knows: http"),
        ("postgres://me:secret@host/db", "postgres://host/db: no address that MLflow knows: .*postgresql://"),
        ("postgresql+psycopg2://me:secret@host/db", "driver psycopg2 is not installed; `pip install psycopg2-binary`"),
        ("mysql://me:se/cret@host/db", "mysql://host/db: its database driver MySQLdb .*`pip install mysqlclient`"),
        ("mysql+foo://me:secret@host/db", "no address of a database .*mysql.foo"),
        ("//me:secret@host/x", "tracking store host/x: a folder of files"),
        ("http://me:se?cret@host", "tracking server http://… does not answer"),
        ("sqlite://", "write sqlite:///relative/path.db or sqlite:////absolute/path.db"),
        ("sqlite:///", "write sqlite:///relative/path.db"),
    ],
)
def test_an_address_that_mlflow_cannot_use_is_the_users_to_correct(
    uri: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mlruns").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(LowrankTuneError, match=said) as raised:
        Tracker(build_plan(tmp_path / "results"))
    assert raised.value.exit_code == 2 or uri.startswith("http")
    assert "cret" not in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (500, b"", "does not answer .it answers 500 "),
        (401, b"<html>", "refuses these credentials .401.; set MLFLOW_TRACKING_USERNAME"),
        (403, b"no", "refuses these credentials .403.; set MLFLOW_TRACKING_USERNAME"),
        (404, b"not here", "is no MLflow server"),
        (405, b"", "is no MLflow server"),
        (200, b"<html>hello</html>", "is no MLflow server"),
        (200, b"{}", "is no MLflow server"),
    ],
)
def test_a_server_that_refuses_or_is_no_mlflow_is_told(
    status: int, body: bytes, said: str, gate: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate.status, gate.body = status, body
    monkeypatch.setenv("MLFLOW_TRACKING_URI", gate.uri.replace("//", "//me:secret@"))
    with pytest.raises(TrackingError, match=f"{gate.uri} {said}.*name another in tracking.uri") as raised:
        Tracker(build_plan(tmp_path))
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("silent", [False, True])
def test_a_server_that_is_away_or_says_nothing_is_told_within_seconds(
    silent: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reach, "PROBE_TIMEOUT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        if not silent:
            listener.close()
        started = time.monotonic()
        with pytest.raises(TrackingError, match=f"http://127.0.0.1:{port} does not answer .*start it, or name another"):
            reach_store(build_plan(tmp_path, tracking={"uri": f"http://127.0.0.1:{port}"}).spec, tmp_path)
    assert time.monotonic() - started < 5


def test_a_deleted_experiment_is_told_with_the_command_that_restores_it(tmp_path: Path, migrated: Path) -> None:
    results = tmp_path / "it's 100%"
    results.mkdir()
    shutil.copy(migrated, results / "mlflow.db")
    plan = build_plan(results)
    uri = reach_store(plan.spec, results).uri
    client = MlflowClient(uri)
    client.delete_experiment(client.create_experiment("tracked"))
    restore = r"restore it with `MLFLOW_TRACKING_URI='sqlite.*100%25/mlflow.db' mlflow experiments restore "
    with pytest.raises(InputError, match=restore + "--experiment-id 1`, or name another in tracking.experiment"):
        Tracker(plan)
    reach_store(build_plan(results, tracking={"experiment": "fresh"}).spec, results)


OLDER, NEWER = (
    ("UPDATE alembic_version SET version_num = '451aebb31d03'",),
    ("UPDATE alembic_version SET version_num = 'ffffffffffff'",),
)


@pytest.mark.parametrize(
    ("statements", "said"),
    [
        (OLDER, "an older MLflow has written it; make a copy, .*`mlflow db upgrade sqlite:///.*shared.db`"),
        (NEWER, "a newer MLflow has written it; install that"),
        (("DROP TABLE alembic_version", "DROP TABLE experiments"), "the database is another program's"),
        ((), ""),
    ],
)
def test_a_database_of_ones_own_is_left_as_it_is_where_mlflow_cannot_use_it(
    statements: tuple[str, ...], said: str, tmp_path: Path, migrated: Path
) -> None:
    path = tmp_path / "shared.db"
    shutil.copy(migrated, path)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(statement)
    before, plan = path.read_bytes(), build_plan(tmp_path / "results", tracking={"uri": f"sqlite:///{path}"})
    if said:
        with pytest.raises(TrackingError, match=said):
            Tracker(plan)
    else:
        Tracker(plan)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["shared.db"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("notes.db", "no database, or a damaged one"),
        ("missing/mlflow.db", "No such file or directory; see that its folder is there"),
        ("folder", "not a file"),
        ("/dev/null", "not a file"),
        ("held.db", "locked; see .*no other process holds it"),
    ],
)
def test_a_file_that_is_no_database_or_cannot_be_written_is_told(
    name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reach, "PROBE_TIMEOUT_S", 0.1)
    (tmp_path / "notes.db").write_bytes(b"no database at all")
    (tmp_path / "folder").mkdir()
    with closing(sqlite3.connect(tmp_path / "held.db")) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        with pytest.raises(LowrankTuneError, match=said):
            Tracker(build_plan(tmp_path / "results", tracking={"uri": f"sqlite:///{tmp_path / name}"}))


def test_a_results_directory_whose_name_is_no_text_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="whose name is not UTF-8"):
        reach_store(None, tmp_path / "caf\udce9")


def test_what_other_work_left_in_the_environment_is_harmless_or_told(
    tmp_path: Path, migrated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(migrated, tmp_path / "mlflow.db")
    left = {"EXPERIMENT_NAME": "other", "EXPERIMENT_ID": "77", "RUN_ID": 32 * "0", "TRACKING_USERNAME": "me"}
    left |= {
        "REGISTRY_URI": "http://127.0.0.1:1",
        "TRACKING_URI": " ",
        "ENABLE_ASYNC_LOGGING": "true",
        "ACTIVE_MODEL_ID": "m-1",
    }
    for name, value in left.items():
        monkeypatch.setenv(f"MLFLOW_{name}", value)
    plan = build_plan(tmp_path)
    with Tracker(plan) as tracker:
        track_trial(tracker, plan, config_of(0))
        tracker.compared(write_study(plan, [config_of(0)]), [outcome_of(plan, config_of(0))])
    assert tracker.problems == ()
    assert_tracked_once(local_uri(tmp_path), plan.study_dir)
    with pytest.raises(
        TrackingError, match=r"MLFLOW_REGISTRY_URI, where .*127.0.0.1:1 does not .*; correct or unset it"
    ):
        Tracker(build_plan(tmp_path, tracking={"register_as": "best"}))
