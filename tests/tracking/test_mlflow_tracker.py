"""A tracker on a real sqlite store, read back with MLflow's own client."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest
from tracked_study import Reader, build_plan, config_of, metrics_of, outcome_of, write_study

from lowrank_tune.config.plan import Plan
from lowrank_tune.tracking.mlflow_tracker import StudyTracker
from lowrank_tune.tracking.store import local_uri

SKETCH, DIRECT, BAD, RUNNING = config_of(0), config_of(1, "direct", 4), config_of(2), config_of(3)


@pytest.fixture
def plan(tmp_path: Path, migrated: Path) -> Plan:
    shutil.copy(migrated, tmp_path / "mlflow.db")
    return build_plan(tmp_path)


def read(plan: Plan) -> Reader:
    return Reader(local_uri(plan.results), plan.spec.tracking.experiment or plan.spec.name)


def test_a_study_is_a_parent_run_with_a_child_a_trial(plan: Plan) -> None:
    with StudyTracker(plan) as tracker:
        for config in (SKETCH, DIRECT):
            tracker.trial_started(config)
            tracker.trial_ended(outcome_of(plan, config))
    assert tracker.problems == ()
    reader = read(plan)
    parent = reader.parent()
    assert reader.experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    assert parent.info.run_name == plan.study_id
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["lowrank.study_id"] == plan.study_id
    assert parent.data.tags["lowrank.spec_hash"] == plan.spec_hash
    assert {run.info.run_name for run in reader.runs("trial")} == {SKETCH.trial_id, DIRECT.trial_id}
    assert all(run.data.tags["mlflow.parentRunId"] == parent.info.run_id for run in reader.runs("trial"))


def test_a_trials_run_says_what_was_tried_and_how_it_went(plan: Plan) -> None:
    with StudyTracker(plan) as tracker:
        tracker.trial_started(DIRECT)
        for epoch in (1, 2, 3):
            tracker.trial_epoch(DIRECT.trial_id, epoch, metrics_of(epoch))
        tracker.trial_ended(outcome_of(plan, DIRECT, "patience"))
    reader = read(plan)
    run = reader.trial(DIRECT.trial_id)
    assert run.data.params == {
        "family": "direct",
        "rank": "4",
        "lr": "0.001",
        "weight_decay": "1e-05",
        "batch_size": "8",
        "seed": "8",
        "lambda_b": "0.0001",
        "lambda_ortho": "0.001",
    }
    assert set(run.data.metrics) == {
        *("train_loss", "val_mse", "val_token_cosine", "val_residual_ratio", "lr"),
        *("best_val_mse", "best_val_token_cosine", "best_val_residual_ratio", "best_epoch"),
    }
    assert reader.history(run, "val_mse") == [(1, 1.0), (2, 1 / 2), (3, 1 / 3)]
    assert run.data.metrics["best_val_mse"] == 0.3
    assert run.data.tags["lowrank.stopped_by"] == "patience"
    assert run.info.status == "FINISHED"


def test_a_repetition_is_a_child_of_another_kind_than_a_trial(plan: Plan) -> None:
    repetition = replace(SKETCH, trial_id=f"{SKETCH.trial_id}-s1", seed=99, confirms=SKETCH.trial_id)
    with StudyTracker(plan) as tracker:
        for config in (SKETCH, repetition):
            tracker.trial_started(config)
            tracker.trial_epoch(config.trial_id, 1, metrics_of(1))
            tracker.trial_ended(outcome_of(plan, config))
    reader = read(plan)
    assert [run.info.run_name for run in reader.runs("trial")] == [SKETCH.trial_id]
    (run,) = reader.runs("confirmation")
    trial = reader.trial(SKETCH.trial_id)
    assert (run.info.run_name, run.data.tags["lowrank.confirms"]) == (repetition.trial_id, SKETCH.trial_id)
    assert run.data.tags["mlflow.parentRunId"] == reader.parent().info.run_id
    assert run.data.tags["lowrank.stopped_by"] == "budget"
    assert run.data.metrics.keys() == trial.data.metrics.keys()
    assert run.data.params == trial.data.params | {"seed": "99"}


@pytest.mark.parametrize(("stopped_by", "status"), [("budget", "FINISHED"), ("asha", "FINISHED"), ("error", "FAILED")])
def test_a_runs_status_is_how_its_trial_ended(plan: Plan, stopped_by: str, status: str) -> None:
    with StudyTracker(plan) as tracker:
        tracker.trial_started(SKETCH)
        reason = "epoch 2: val_mse not finite" if stopped_by == "error" else ""
        tracker.trial_ended(outcome_of(plan, SKETCH, stopped_by, reason=reason))
    run = read(plan).trial(SKETCH.trial_id)
    assert (run.info.status, run.data.tags["lowrank.stopped_by"]) == (status, stopped_by)
    assert run.data.tags.get("lowrank.reason", "") == reason


def test_no_value_that_is_no_number_is_logged(plan: Plan) -> None:
    with StudyTracker(plan) as tracker:
        tracker.trial_started(BAD)
        tracker.trial_epoch(BAD.trial_id, 1, metrics_of(1, val_mse=math.nan, train_loss=math.inf))
        tracker.trial_ended(outcome_of(plan, BAD, "error", best={}, best_epoch=0, epochs=1))
    assert tracker.problems == ()
    metrics = read(plan).trial(BAD.trial_id).data.metrics
    assert set(metrics) == {"val_token_cosine", "val_residual_ratio", "lr"}


def test_an_interrupted_study_is_killed_with_its_running_trials(plan: Plan) -> None:
    with pytest.raises(KeyboardInterrupt), StudyTracker(plan) as tracker:
        tracker.trial_started(SKETCH)
        tracker.trial_ended(outcome_of(plan, SKETCH))
        tracker.trial_started(RUNNING)
        raise KeyboardInterrupt
    reader = read(plan)
    assert reader.parent().info.status == "KILLED"
    assert reader.trial(RUNNING.trial_id).info.status == "KILLED"
    assert reader.trial(SKETCH.trial_id).info.status == "FINISHED"


def test_a_failed_study_is_failed(plan: Plan) -> None:
    with pytest.raises(RuntimeError), StudyTracker(plan) as tracker:
        tracker.trial_started(SKETCH)
        raise RuntimeError
    assert read(plan).parent().info.status == "FAILED"


def test_a_past_study_looked_at_again_keeps_its_status_and_the_time_it_ended(plan: Plan) -> None:
    comparison = write_study(plan, [SKETCH])
    with StudyTracker(plan) as tracker:
        tracker.trial_started(SKETCH)
    ended = read(plan).parent().info.end_time
    for status in ("FINISHED", None):
        again = StudyTracker(plan, past=True)
        again.log_comparison(comparison, (), plan.study_dir)
        again.finish(status)
        assert again.problems == ()
        parent = read(plan).parent()
        assert (parent.info.status, parent.info.end_time) == ("FINISHED", ended)
        assert "test.svd.token_cosine" in parent.data.metrics


def test_a_study_that_fails_before_its_first_trial_leaves_no_run(plan: Plan) -> None:
    with pytest.raises(RuntimeError), StudyTracker(plan):
        raise RuntimeError
    assert mlflow.MlflowClient(local_uri(plan.results)).get_experiment_by_name("tracked") is None


def test_one_trial_is_one_run_whoever_tracks_it_again(plan: Plan) -> None:
    for epoch in (1, 2):
        with StudyTracker(plan) as tracker:
            tracker.trial_started(SKETCH)
            tracker.trial_started(SKETCH)
            tracker.trial_epoch(SKETCH.trial_id, epoch, metrics_of(epoch))
    reader = read(plan)
    assert len(reader.runs("study")) == 1
    assert [step for step, _ in reader.history(reader.trial(SKETCH.trial_id), "val_mse")] == [1, 2]


def test_studies_of_one_name_share_an_experiment_and_nothing_else(plan: Plan) -> None:
    other = build_plan(plan.results, seed=1)
    for each in (plan, other):
        with StudyTracker(each) as tracker:
            tracker.trial_started(SKETCH)
    reader = read(plan)
    assert {run.data.tags["lowrank.study_id"] for run in reader.runs("study")} == {plan.study_id, other.study_id}
    assert len(reader.runs("trial")) == 2


def test_the_comparison_lies_in_the_parent_with_rank_as_its_step(plan: Plan) -> None:
    comparison = write_study(plan, [SKETCH, DIRECT])
    outcomes = [outcome_of(plan, config) for config in (SKETCH, DIRECT)]
    with StudyTracker(plan) as tracker:
        for outcome in outcomes:
            tracker.trial_started(outcome.config)
            tracker.trial_ended(outcome)
        tracker.log_comparison(comparison, outcomes, plan.study_dir)
    assert tracker.problems == ()
    reader = read(plan)
    parent = reader.parent()
    assert reader.history(parent, "test.svd.residual_ratio") == [(2, 1.0), (4, 1.0)]
    assert reader.history(parent, "test.sketch.token_cosine") == [(2, 0.9)]
    assert reader.history(parent, "test.direct.residual_ratio") == [(4, pytest.approx(1.2))]
    assert reader.artifacts(parent) == {
        *("report.html", "study.yaml", "study.resolved.yaml", "comparison.json", "per_image.parquet"),
        *("pareto.json", "compression.json", "comparison_table.json", "plots"),
    }
    assert reader.artifacts(parent, "plots") == {"plots/rank_curve.png"}
    assert reader.artifacts(reader.trial(SKETCH.trial_id)) == {"loss_curves.png"}
    assert parent.data.tags["mlflow.note.content"] == "random weights"
    table = reader.table("comparison_table.json")
    assert [row[table["columns"].index("method")] for row in table["data"]] == ["svd", "svd", "sketch", "direct"]


def test_a_comparison_delivered_twice_is_there_once(plan: Plan) -> None:
    comparison = write_study(plan, [SKETCH])
    for _ in range(2):
        with StudyTracker(plan) as tracker:
            tracker.trial_started(SKETCH)
            tracker.log_comparison(comparison, [outcome_of(plan, SKETCH)], plan.study_dir)
        assert tracker.problems == ()
    reader = read(plan)
    assert len(reader.parent().outputs.model_outputs) == 1
    table = reader.table("comparison_table.json")
    assert len(table["data"]) == len(comparison.rows)


def test_the_experiment_may_have_a_name_of_its_own(plan: Plan) -> None:
    named = build_plan(plan.results, tracking={"experiment": "vision / low rank"})
    with StudyTracker(named) as tracker:
        tracker.trial_started(SKETCH)
    assert tracker.problems == ()
    assert read(named).parent().info.status == "FINISHED"


def test_what_the_store_refuses_is_a_problem_and_no_exception(plan: Plan) -> None:
    client = mlflow.MlflowClient(local_uri(plan.results))
    client.delete_experiment(client.create_experiment("tracked"))
    with StudyTracker(plan) as tracker:
        tracker.trial_started(SKETCH)
        tracker.trial_ended(outcome_of(plan, SKETCH))
    assert tracker.problems[0].endswith("could not be delivered")
    assert "restore" in tracker.problems[1]
