import contextlib
import shutil
import sqlite3
from pathlib import Path

import alembic.command
import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.store.db import utils
from tracked_study import Reader, build_plan, config_of, outcome_of, track_trial, write_study

from lowrank_tune.config.paths import anchored
from lowrank_tune.errors import TrackingError, redact
from lowrank_tune.tracking.database import database_fault, open_database
from lowrank_tune.tracking.reach import reach_store
from lowrank_tune.tracking.store import Store, resolve_store
from lowrank_tune.tracking.tracker import Tracker


def test_the_study_file_comes_before_the_environment_and_that_before_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resolve_store(None, tmp_path) == Store(f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "mlartifacts")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker:5000")
    assert resolve_store(None, tmp_path) == Store("http://tracker:5000", None)
    assert resolve_store("http://mine:1", tmp_path) == Store("http://mine:1", None)
    assert resolve_store("postgresql://me@host/db", tmp_path).artifacts == tmp_path / "mlartifacts"


@pytest.mark.parametrize("name", ["100%25", "what?mode=ro", "a b#c", "at@home", 'it\'s ["x"] & back\\slash; ü'])
def test_a_database_and_artifacts_lie_in_their_results_directory_whatever_that_is_called(
    name: str, tmp_path: Path, migrated: Path
) -> None:
    results = tmp_path / name
    results.mkdir()
    store = reach_store(None, results)
    assert list(results.iterdir()) == [], "asking makes no file"
    assert redact(store.shown) == store.uri, "no part of a path is taken for a secret"
    shutil.copy(migrated, results / "mlflow.db")
    plan = build_plan(results)
    with Tracker(plan) as tracker:
        track_trial(tracker, plan, config_of(0))
        tracker.compared(write_study(plan, [config_of(0)]), [outcome_of(plan, config_of(0))])
    assert (tracker.problems, store.database) == ((), results / "mlflow.db")
    parent = Reader(store.uri).parent()
    assert mlflow.artifacts.load_text(f"{parent.info.artifact_uri}/report.html") == "report.html"
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert {path.name for path in results.iterdir()} == {"mlflow.db", "mlartifacts", "studies"}


def test_a_relative_database_lies_in_the_working_directory_whatever_that_is_called(
    tmp_path: Path, migrated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "100%25 ?"
    home.mkdir()
    shutil.copy(migrated, home / "a%b.db")
    monkeypatch.chdir(home)
    spec = anchored(build_plan(tmp_path, tracking={"uri": "sqlite:///a%25b.db"}).spec)
    monkeypatch.chdir(tmp_path)
    assert resolve_store(spec.tracking.uri, tmp_path).database == home / "a%b.db"
    MlflowClient(reach_store(spec, tmp_path).uri).search_experiments()
    assert [path.name for path in tmp_path.rglob("*.db")] == ["a%b.db"]


def test_a_database_with_runs_that_cannot_be_brought_up_to_date_is_left_where_it_is(
    tmp_path: Path, migrated: Path
) -> None:
    path = tmp_path / "mlflow.db"
    shutil.copy(migrated, path)
    client = MlflowClient(f"sqlite:///{path}")
    client.create_run(client.create_experiment("theirs"))
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
    with pytest.raises(TrackingError, match="an older MLflow has written it; .*`mlflow db upgrade sqlite:///"):
        Tracker(build_plan(tmp_path)).__enter__()
    assert "cannot be brought up to date" in database_fault(path)
    assert [each.name for each in tmp_path.glob("mlflow.db*")] == ["mlflow.db"]


def test_a_database_of_an_older_mlflow_keeps_its_runs_and_is_brought_up_to_date(tmp_path: Path) -> None:
    store = resolve_store(None, tmp_path)
    engine = utils.create_sqlalchemy_engine(store.uri)
    utils.InitialBase.metadata.create_all(engine)
    with engine.begin() as connection:
        config = utils._get_alembic_config(store.uri)
        config.attributes["connection"] = connection
        alembic.command.upgrade(config, "451aebb31d03")
        connection.exec_driver_sql(
            "INSERT INTO experiments (experiment_id, name, lifecycle_stage) VALUES (1, 'old', 'active')"
        )
    engine.dispose()
    assert database_fault(tmp_path / "mlflow.db") == ""
    open_database(store)
    assert MlflowClient(store.uri).get_experiment_by_name("old") is not None
    assert not list(tmp_path.glob("mlflow.db?*"))


@pytest.mark.parametrize(
    ("statements", "said"),
    [
        (
            ["UPDATE alembic_version SET version_num = 'ffffffffffff'"],
            "a newer MLflow has written it; install that, or move",
        ),
        (["DROP TABLE alembic_version", "DROP TABLE experiments"], "the database is another program's; move it away"),
    ],
)
def test_a_database_that_is_not_ours_to_change_is_refused_in_a_sentence_and_left_alone(
    statements: list[str], said: str, tmp_path: Path, migrated: Path
) -> None:
    path = tmp_path / "mlflow.db"
    shutil.copy(migrated, path)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()
    before = path.read_bytes()
    with pytest.raises(TrackingError, match=said):
        open_database(resolve_store(None, tmp_path))
    with pytest.raises(TrackingError, match=said):
        Tracker(build_plan(tmp_path))
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"no database at all", b"SQLite format 3\0" + 200 * b"torn"])
def test_a_damaged_database_is_set_aside_only_where_it_is_the_results_own(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "notes.db").write_bytes(content)
    (tmp_path / "results").mkdir()
    with pytest.raises(TrackingError, match="notes.db: it was left half made or is damaged; move it away"):
        open_database(resolve_store(f"sqlite:///{tmp_path}/notes.db", tmp_path / "results"))
    assert (tmp_path / "notes.db").read_bytes() == content
    assert "damaged" in database_fault(tmp_path / "notes.db")


@pytest.mark.parametrize(
    "uri", ["http://me:secret@host", "postgresql://host/db?user=me&password=secret", "http://host/?Token=secret"]
)
def test_a_study_file_takes_no_address_with_a_secret(uri: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must not hold a user name or password"):
        build_plan(tmp_path, tracking={"uri": uri})
    build_plan(tmp_path, tracking={"uri": "postgresql://host/db?sslmode=require"})


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:secret@host:5000/base?token=x", "http://host:5000/base"),
        ("postgresql://me:secret@host/db", "postgresql://host/db"),
        ("sqlite:////tmp/me@home/mlflow.db", "sqlite:////tmp/me@home/mlflow.db"),
        ("file:///tmp/me@home, http://me:it's@host/x", "file:///tmp/me@home, http://host/x"),
        ("failed to reach http://me:secret@host/x today", "failed to reach http://host/x today"),
        ("nothing to hide", "nothing to hide"),
    ],
)
def test_credentials_never_show(text: str, shown: str) -> None:
    assert redact(text) == shown
