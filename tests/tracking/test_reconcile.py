"""A tracking store that lost or doubled something, repaired from the study's own files."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from tracked_study import Reader, build_plan, config_of, metrics_of, outcome_of, write_study

from lowrank_tune.config.plan import Plan
from lowrank_tune.records import Comparison, TrialConfig, TrialOutcome
from lowrank_tune.tracking.mlflow_tracker import Repairs, StudyTracker
from lowrank_tune.tracking.store import local_uri
from lowrank_tune.tracking.sync import reconcile

FINISHED, PRUNED, FAILED, UNHEARD, KILLED = (config_of(number) for number in range(5))
SILENT = config_of(5, "direct", 4)
MOMENT = 1_770_000_000


@pytest.fixture
def plan(tmp_path: Path, migrated: Path) -> Plan:
    shutil.copy(migrated, tmp_path / "mlflow.db")
    plan = build_plan(tmp_path)
    plan.study_dir.mkdir(parents=True)
    return plan


def read(plan: Plan) -> Reader:
    return Reader(local_uri(plan.results))


def rows_of(epochs: int) -> list[dict[str, float]]:
    best = {"best_val_mse": 0.3, "best_val_token_cosine": 0.9, "best_val_residual_ratio": 1.3}
    return [metrics_of(epoch, **best) for epoch in range(1, epochs + 1)]


def write_trial(plan: Plan, config: TrialConfig, epochs: int, outcome: TrialOutcome | None = None) -> None:
    """The files of a trial, as a session and the ledger write them."""
    directory = plan.study_dir / "trials" / config.trial_id
    directory.mkdir(parents=True, exist_ok=True)
    files: dict[str, Any] = {"config.json": asdict(config), "history.json": rows_of(epochs)}
    if outcome:
        files["outcome.json"] = asdict(outcome)
    for name, value in files.items():
        (directory / name).write_text(json.dumps(value))
        os.utime(directory / name, (MOMENT, MOMENT))


def write_status(plan: Plan, state: str) -> None:
    (plan.study_dir / "status.json").write_text(json.dumps({"state": state}))


def write_all(plan: Plan) -> None:
    """A study whose driver was killed: three trials had ended, one just now, one was being trained."""
    write_trial(plan, FINISHED, 3, outcome_of(plan, FINISHED))
    write_trial(plan, PRUNED, 1, outcome_of(plan, PRUNED, "asha", epochs=1, best_epoch=1))
    write_trial(plan, FAILED, 2, outcome_of(plan, FAILED, "error", epochs=2, reason="its process died"))
    write_trial(plan, UNHEARD, 3)
    write_trial(plan, KILLED, 2)
    write_status(plan, "running")


def points_of(reader: Reader, run_id: str, key: str) -> list[tuple[int, float, int]]:
    points = reader.client.get_metric_history(run_id, key)
    return sorted((point.step, point.value, point.timestamp) for point in points)


def snapshot(plan: Plan) -> list[Any]:
    reader = read(plan)
    runs = [*reader.runs("study"), *reader.runs("trial")]
    return [
        (
            run.info.run_id,
            run.info.status,
            run.info.start_time,
            run.info.end_time,
            sorted(run.data.tags.items()),
            sorted(run.data.params.items()),
            {key: points_of(reader, run.info.run_id, key) for key in run.data.metrics},
            sorted(reader.artifacts(run)),
            run.outputs.model_outputs if run.outputs else [],
        )
        for run in runs
    ]


def check_truth(plan: Plan) -> None:
    reader = read(plan)
    runs = {run.data.tags["lowrank.trial_id"]: run for run in reader.runs("trial")}
    truth = {
        FINISHED.trial_id: ("FINISHED", "budget", 3),
        PRUNED.trial_id: ("FINISHED", "asha", 1),
        FAILED.trial_id: ("FAILED", "error", 2),
        UNHEARD.trial_id: ("FINISHED", "budget", 3),
        KILLED.trial_id: ("KILLED", None, 2),
    }
    assert len(reader.runs("trial")) == len(runs) == len(truth)
    for trial_id, (status, stopped_by, epochs) in truth.items():
        run = runs[trial_id]
        assert (run.info.status, run.data.tags.get("lowrank.stopped_by")) == (status, stopped_by)
        for key in ("train_loss", "val_mse", "val_token_cosine", "val_residual_ratio", "lr"):
            assert [step for step, _ in reader.history(run, key)] == list(range(1, epochs + 1))
        assert ("best_val_mse" in run.data.metrics) == (status != "KILLED")
        assert run.data.params["family"] == "sketch"
    assert "interrupted" in runs[KILLED.trial_id].data.tags["lowrank.reason"]
    assert reader.parent().info.status == "KILLED"


def test_a_store_that_knows_nothing_is_told_everything(plan: Plan) -> None:
    write_all(plan)
    assert reconcile(plan) == Repairs(runs_made=5, runs_ended=6, epochs_added=11)
    check_truth(plan)
    reader = read(plan)
    points = reader.client.get_metric_history(reader.trial(FINISHED.trial_id).info.run_id, "val_mse")
    assert sorted(point.timestamp for point in points) == [MOMENT * 1000 - back for back in (200, 100, 0)]


def test_a_second_reconciliation_changes_nothing(plan: Plan) -> None:
    write_all(plan)
    reconcile(plan)
    before = snapshot(plan)
    assert reconcile(plan) == Repairs()
    assert snapshot(plan) == before


def test_what_a_killed_driver_had_told_is_kept_and_completed(plan: Plan) -> None:
    write_all(plan)
    tracker = StudyTracker(plan)
    for config, epochs in ((FINISHED, 3), (FAILED, 1), (UNHEARD, 2), (KILLED, 2)):
        tracker.trial_started(config)
        for epoch in range(1, epochs + 1):
            tracker.trial_epoch(config.trial_id, epoch, metrics_of(epoch))
    tracker.trial_ended(outcome_of(plan, FINISHED))
    tracker._writer.close()  # a driver that is killed ends no run
    reader = read(plan)
    assert [run.info.status for run in reader.runs("trial")].count("RUNNING") == 3
    finished = reader.trial(FINISHED.trial_id)
    # The parent, FAILED, UNHEARD and KILLED are RUNNING; PRUNED has no run.
    assert reconcile(plan) == Repairs(runs_made=1, runs_ended=5, epochs_added=3)
    check_truth(plan)
    assert read(plan).trial(FINISHED.trial_id).info.end_time == finished.info.end_time
    assert len(reader.history(finished, "best_val_mse")) == 1


def test_a_run_of_a_trial_that_left_no_file_does_not_run_for_ever(plan: Plan) -> None:
    tracker = StudyTracker(plan)
    tracker.trial_started(SILENT)
    tracker._writer.close()
    write_status(plan, "stopped")
    assert reconcile(plan) == Repairs(runs_ended=2)
    assert read(plan).trial(SILENT.trial_id).info.status == "KILLED"


def test_a_second_run_of_one_trial_is_deleted(plan: Plan) -> None:
    write_all(plan)
    reconcile(plan)
    reader = read(plan)
    tags = dict(reader.trial(FINISHED.trial_id).data.tags)
    reader.client.create_run(reader.experiment.experiment_id, tags=tags, run_name=FINISHED.trial_id)
    assert reconcile(plan) == Repairs(runs_removed=1)
    check_truth(plan)


def test_a_trial_that_goes_on_keeps_its_run_and_its_figures(plan: Plan) -> None:
    write_all(plan)
    reconcile(plan)
    with StudyTracker(plan) as tracker:
        tracker.trial_started(KILLED)
        for epoch in (2, 3):
            tracker.trial_epoch(KILLED.trial_id, epoch, metrics_of(epoch))
        tracker.trial_ended(outcome_of(plan, KILLED))
    assert tracker.problems == ()
    reader = read(plan)
    run = reader.trial(KILLED.trial_id)
    assert [step for step, _ in reader.history(run, "val_mse")] == [1, 2, 3]
    assert (run.info.status, run.data.tags["lowrank.stopped_by"]) == ("FINISHED", "budget")
    assert "lowrank.reason" not in run.data.tags
    assert reader.parent().info.status == "FINISHED"


def test_a_finished_studys_comparison_is_told_once(plan: Plan) -> None:
    plan.study_dir.rmdir()
    comparison: Comparison = write_study(plan, [FINISHED])
    write_trial(plan, FINISHED, 3, outcome_of(plan, FINISHED))
    write_status(plan, "finished")
    assert reconcile(plan, comparison) == Repairs(runs_made=1, runs_ended=2, epochs_added=3, comparison_added=True)
    reader = read(plan)
    parent = reader.parent()
    assert parent.info.status == "FINISHED"
    assert reader.history(parent, "test.svd.residual_ratio") == [(2, 1.0), (4, 1.0)]
    assert len(parent.outputs.model_outputs) == 1
    before = snapshot(plan)
    assert reconcile(plan, comparison) == Repairs()
    assert snapshot(plan) == before
