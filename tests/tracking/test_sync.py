"""MLflow holds what a study's files hold, whatever store and driver went through: nothing lost, doubled or open."""

import json
import math
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
import sqlalchemy
from tracked_once import assert_tracked_once
from tracked_study import (
    Reader,
    build_plan,
    config_of,
    metrics_of,
    outcome_of,
    track_trial,
    write_status,
    write_study,
    write_trial,
)

from lowrank_tune.config.plan import Plan
from lowrank_tune.measured import Comparison, Compression, RateRow
from lowrank_tune.tracking import tracker as tracker_module
from lowrank_tune.tracking.database import database_fault
from lowrank_tune.tracking.reconcile import reconcile
from lowrank_tune.tracking.store import local_uri
from lowrank_tune.tracking.sync import Repairs
from lowrank_tune.tracking.tracker import Tracker

FINISHED, PRUNED, FAILED, UNHEARD, CUT, DIRECT = (*(config_of(n) for n in range(5)), config_of(5, "direct", 4))
HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker_module, "PAUSE_S", 0.1)


@pytest.fixture
def plan(tmp_path: Path, migrated: Path) -> Plan:
    shutil.copy(migrated, tmp_path / "mlflow.db")
    return build_plan(tmp_path)


def read(plan: Plan) -> Reader:
    return Reader(local_uri(plan.results), plan.spec.tracking.experiment or plan.spec.name)


def write_all(plan: Plan) -> None:
    """A study whose driver was killed: three trials had ended, one just now, one was being trained."""
    write_trial(plan, FINISHED, 3, outcome_of(plan, FINISHED))
    write_trial(plan, PRUNED, 1, outcome_of(plan, PRUNED, "asha", epochs=1, best_epoch=1))
    write_trial(plan, FAILED, 2, outcome_of(plan, FAILED, "error", epochs=2, reason="its process died"))
    write_trial(plan, UNHEARD, 3)
    write_trial(plan, CUT, 2)
    write_status(plan, "running")


def check_truth(plan: Plan) -> None:
    """Of what `write_all` wrote, once reconciled."""
    reader = read(plan)
    (parent,) = (run for run in reader.runs("study") if run.data.tags["lowrank.study_id"] == plan.study_id)
    children = [run for run in reader.runs("trial") if run.data.tags["mlflow.parentRunId"] == parent.info.run_id]
    runs = {run.data.tags["lowrank.trial_id"]: run for run in children}
    truth = {
        FINISHED.trial_id: ("FINISHED", "budget", 3),
        PRUNED.trial_id: ("FINISHED", "asha", 1),
        FAILED.trial_id: ("FAILED", "error", 2),
        UNHEARD.trial_id: ("FINISHED", "budget", 3),
        CUT.trial_id: ("KILLED", None, 2),
    }
    assert len(children) == len(runs) == len(truth)
    for trial_id, (status, stopped_by, epochs) in truth.items():
        run = runs[trial_id]
        assert (run.info.status, run.data.tags.get("lowrank.stopped_by")) == (status, stopped_by)
        for key in ("train_loss", "val_mse", "val_token_cosine", "val_residual_ratio", "lr"):
            assert [step for step, _ in reader.history(run, key)] == list(range(1, epochs + 1))
        assert ("best_val_mse" in run.data.metrics) == (status != "KILLED")
        assert run.data.params["family"] == "sketch"
    assert runs[FAILED.trial_id].data.tags["lowrank.reason"] == "its process died"
    assert "interrupted" in runs[CUT.trial_id].data.tags["lowrank.reason"]
    assert parent.info.status == "KILLED"


def snapshot(plan: Plan) -> list[Any]:
    reader = read(plan)
    runs = [*reader.runs("study"), *reader.runs("trial")]
    return [
        (
            *(run.info.run_id, run.info.status, run.info.start_time, run.info.end_time),
            *(sorted(run.data.tags.items()), sorted(run.data.params.items()), sorted(reader.artifacts(run))),
            {key: reader.history(run, key) for key in run.data.metrics},
            run.outputs.model_outputs if run.outputs else [],
        )
        for run in runs
    ]


def test_a_run_says_what_was_tried_and_how_it_went(plan: Plan) -> None:
    repetition = replace(DIRECT, trial_id=f"{DIRECT.trial_id}-s1", seed=99, confirms=DIRECT.trial_id)
    with Tracker(plan) as tracker:
        track_trial(tracker, plan, DIRECT, "patience")
        track_trial(tracker, plan, repetition)
    assert tracker.problems == ()
    assert_tracked_once(local_uri(plan.results), plan.study_dir)
    reader = read(plan)
    parent, run, (again,) = reader.parent(), reader.trial(DIRECT.trial_id), reader.runs("confirmation")
    assert reader.experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    assert (parent.info.run_name, parent.data.tags["lowrank.spec_hash"]) == (plan.study_id, plan.spec_hash)
    assert parent.data.params["method"] == "grid"
    expected = {
        "family": "direct",
        "rank": "4",
        "lr": "0.001",
        "weight_decay": "1e-05",
        "batch_size": "8",
        "seed": "12",
    }
    assert run.data.params == expected | {"lambda_b": "0.0001", "lambda_ortho": "0.001"}
    assert (again.info.run_name, again.data.tags["lowrank.confirms"]) == (repetition.trial_id, DIRECT.trial_id)
    assert again.data.params == run.data.params | {"seed": "99"}
    assert set(run.data.metrics) == {
        *("train_loss", "val_mse", "val_token_cosine", "val_residual_ratio", "lr"),
        *("best_val_mse", "best_val_token_cosine", "best_val_residual_ratio", "best_epoch"),
    }
    assert reader.history(run, "val_mse") == [(1, 1.0), (2, 1 / 2), (3, 1 / 3)]
    assert run.info.end_time - run.info.start_time >= 300


def test_no_value_that_is_no_number_is_logged(plan: Plan) -> None:
    write_trial(plan, CUT, 1)
    path = plan.study_dir / "trials" / CUT.trial_id / "history.json"
    path.write_text(json.dumps([metrics_of(1, val_mse=math.nan, train_loss=math.inf)]))
    reconcile(plan)
    assert set(read(plan).trial(CUT.trial_id).data.metrics) == {"val_token_cosine", "val_residual_ratio", "lr"}


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, "KILLED"), (RuntimeError, "FAILED")])
def test_a_study_that_is_cut_off_leaves_no_run_open(plan: Plan, error: type[BaseException], status: str) -> None:
    with pytest.raises(error), Tracker(plan) as tracker:
        track_trial(tracker, plan, FINISHED)
        write_trial(plan, CUT, 1)
        tracker.trial_started(CUT)
        time.sleep(0.5)  # its run may be there before the end, or not
        raise error
    reader = read(plan)
    ended = [
        each.info.status for each in (reader.parent(), reader.trial(CUT.trial_id), reader.trial(FINISHED.trial_id))
    ]
    assert ended == [status, "KILLED", "FINISHED"]


def test_a_study_that_fails_before_its_first_trial_leaves_no_run(plan: Plan) -> None:
    with pytest.raises(RuntimeError), Tracker(plan):
        raise RuntimeError
    assert mlflow.MlflowClient(local_uri(plan.results)).get_experiment_by_name("tracked") is None


def test_studies_of_one_name_share_an_experiment_and_nothing_else(plan: Plan) -> None:
    named = {"tracking": {"experiment": "vision / low rank"}}
    plans = [build_plan(plan.results, **named), build_plan(plan.results, seed=1, **named)]
    for each in plans:
        with Tracker(each) as tracker:
            track_trial(tracker, each, FINISHED)
        assert_tracked_once(local_uri(plan.results), each.study_dir)
    assert len(read(plans[0]).runs("study")) == len(read(plans[0]).runs("trial")) == 2


def test_what_the_store_refuses_is_a_problem_and_no_exception(plan: Plan) -> None:
    client = mlflow.MlflowClient(local_uri(plan.results))
    tracker, experiment = Tracker(plan), client.create_experiment("tracked")
    client.delete_experiment(experiment)
    with tracker:
        track_trial(tracker, plan, FINISHED)
    assert tracker.problems[0] == "2 records could not be delivered"
    assert "restore" in tracker.problems[1]
    assert f"lowrank-tune reconcile {plan.study_id}" in tracker.problems[2]


def test_the_comparison_lies_in_the_parent_with_rank_as_its_step_and_is_told_once(plan: Plan) -> None:
    configs = [FINISHED, DIRECT]
    with Tracker(plan) as tracker:
        for config in configs:
            track_trial(tracker, plan, config)
        rates = (RateRow("jpeg-q75", 0, "jpeg", "", 4, 2e4, 0.2, 0.3, 0.98, 2.5),)
        comparison = replace(write_study(plan, configs), compression=Compression(rates=rates))
        tracker.compared(comparison, [outcome_of(plan, config) for config in configs])
    assert tracker.problems == ()
    reader = read(plan)
    parent = reader.parent()
    assert reader.history(parent, "test.svd.residual_ratio") == [(2, 1.0), (4, 1.0)]
    assert reader.history(parent, "test.sketch.token_cosine") == [(2, 0.9)]
    assert reader.artifacts(parent) == {
        *("report.html", "study.yaml", "study.resolved.yaml", "comparison.json", "per_image.parquet"),
        *("pareto.json", "compression.json", "comparison_table.json", "rates_table.json", "plots"),
    }
    assert reader.artifacts(parent, "plots") == {"plots/rank_curve.png"}
    assert reader.artifacts(reader.trial(FINISHED.trial_id)) == {"loss_curves.png"}
    assert parent.data.tags["mlflow.note.content"] == "random weights"
    table = reader.table("comparison_table.json")
    assert [row[table["columns"].index("method")] for row in table["data"]] == ["svd", "svd", "sketch", "direct"]
    kept = reader.table("rates_table.json")
    assert dict(zip(kept["columns"], kept["data"][0], strict=True))["bytes_per_image"] == 2e4
    write_status(plan, "finished")
    before = snapshot(plan)
    assert reconcile(plan, comparison) == Repairs()
    assert snapshot(plan) == before
    (plan.study_dir / "report.html").write_text("written again")
    assert reconcile(plan, comparison) == Repairs(comparison_added=True)
    assert [len(run[-2].get("test.svd.residual_ratio", ())) for run in snapshot(plan)] == [2, 0, 0]


def test_a_store_that_knows_nothing_is_told_everything_once(plan: Plan) -> None:
    write_all(plan)
    assert reconcile(plan) == Repairs(runs_made=5, runs_ended=6, epochs_added=11)
    check_truth(plan)
    reader = read(plan)
    points = reader.client.get_metric_history(reader.trial(FINISHED.trial_id).info.run_id, "val_mse")
    history = plan.study_dir / "trials" / FINISHED.trial_id / "history.json"
    ended = history.stat().st_mtime_ns // 1_000_000
    assert sorted(point.timestamp for point in points) == [ended - back for back in (200, 100, 0)]
    before = snapshot(plan)
    assert reconcile(plan) == Repairs()
    assert snapshot(plan) == before
    for again, began in ((reader.trial(FINISHED.trial_id), None), *3 * [(reader.parent(), plan.started)]):
        moment = began and int(began.timestamp() * 1000)
        reader.client.create_run(reader.experiment.experiment_id, moment, again.data.tags, again.info.run_name)
    shutil.rmtree(plan.study_dir / "trials" / CUT.trial_id)
    reader.client.update_run(reader.trial(CUT.trial_id).info.run_id, status="RUNNING")
    assert reconcile(plan) == Repairs(runs_removed=4, runs_ended=1), "further runs, and one of a trial without a file"
    check_truth(plan)


def test_a_database_that_another_process_locks_for_a_while_costs_nothing(plan: Plan) -> None:
    # MLflow itself waits for 20 s.
    def impatient(connection: Any, cursor: Any, statement: str, parameters: Any, *rest: Any) -> tuple[str, Any]:
        return statement.replace("busy_timeout = 20000", "busy_timeout = 300"), parameters

    sqlalchemy.event.listen(sqlalchemy.Engine, "before_cursor_execute", impatient, retval=True)
    locker = sqlite3.connect(plan.results / "mlflow.db", isolation_level=None, check_same_thread=False)

    try:
        with Tracker(plan) as tracker:
            track_trial(tracker, plan, FINISHED)
            time.sleep(0.5)  # it is on its way
            locker.execute("BEGIN EXCLUSIVE")
            track_trial(tracker, plan, DIRECT)
            time.sleep(1.5)
            locker.execute("ROLLBACK")
    finally:
        locker.close()
        sqlalchemy.event.remove(sqlalchemy.Engine, "before_cursor_execute", impatient)
    assert tracker.problems == ()
    assert_tracked_once(local_uri(plan.results), plan.study_dir)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, migrated: Path) -> Path:
    """What `killed.py` leaves."""
    home = tmp_path_factory.mktemp("killed")
    shutil.copy(migrated, home / "mlflow.db")
    paths = os.pathsep.join(map(str, (HERE, *HERE.parents[:2])))
    command = [sys.executable, str(HERE / "killed.py"), str(home), "runs", "webhook_events"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return home


def test_a_driver_that_is_killed_at_ten_random_moments_loses_and_doubles_nothing(killed: Path) -> None:
    (study,) = (killed / "studies").iterdir()
    assert len(list(study.glob("trials/*/outcome.json"))) == 12
    assert_tracked_once(local_uri(killed), study)


def test_a_database_whose_making_was_killed_is_set_aside_and_told_all_that_is_on_file(killed: Path) -> None:
    for table in ("runs", "webhook_events"):
        results = killed / table
        assert not (results / "ours" / "mlflow.db").exists(), "a database is there whole, or not at all"
        assert "half made" in database_fault(results / "mlflow.db")
    assert list((results / "ours").glob("mlflow.db.*.making"))
    plan, other = build_plan(results), build_plan(results, seed=1)
    write_all(other)
    others: list[tuple[Plan, Comparison | None]] = [(other, None)]
    with Tracker(plan, lambda: others) as tracker:
        track_trial(tracker, plan, FINISHED)
    assert tracker.problems == ()
    assert_tracked_once(local_uri(results), plan.study_dir)
    check_truth(other)
    assert len(list(results.glob("mlflow.db.unusable-*"))) == 1
    assert not list(results.glob("mlflow.db.*.making"))
