"""Artifacts open again where their results directory was moved to, and a study goes on there."""

import shutil
from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow.tracking._tracking_service import utils
from tracked_once import assert_tracked_once
from tracked_study import (
    DIM,
    TOKENS,
    Reader,
    build_plan,
    config_of,
    outcome_of,
    track_trial,
    write_status,
    write_study,
)

from lowrank_tune.config.plan import Plan
from lowrank_tune.measured import Comparison
from lowrank_tune.tracking.moved import follow_artifacts
from lowrank_tune.tracking.reconcile import reconcile
from lowrank_tune.tracking.store import Store, local_uri, resolve_store
from lowrank_tune.tracking.sync import Repairs
from lowrank_tune.tracking.tracker import Tracker

NAMED = {"tracking": {"experiment": "a b / 100%", "register_as": "decomposer"}}


def track(results: Path, database: Path, **sections: object) -> tuple[Plan, Comparison]:
    """A finished study of one trial."""
    results.mkdir()
    shutil.copy(database, results / "mlflow.db")
    plan = build_plan(results, **sections)
    with Tracker(plan) as tracker:
        track_trial(tracker, plan, config_of(0))
        comparison = write_study(plan, [config_of(0)])
        tracker.compared(comparison, [outcome_of(plan, config_of(0))])
    write_status(plan, "finished")
    assert tracker.problems == ()
    return plan, comparison


def test_artifacts_and_models_of_results_that_were_copied_or_moved_open_where_these_are_now(
    tmp_path: Path, migrated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, comparison = track(tmp_path / "first #1", migrated, **NAMED)
    theirs = (tmp_path / "theirs" / "mlartifacts" / "others").as_uri()
    client = mlflow.MlflowClient(local_uri(before.results))
    client.log_text(client.create_run(client.create_experiment("others", theirs)).info.run_id, "note", "note.txt")
    copied, moved = tmp_path / "copied", tmp_path / "it's 100% ?"
    shutil.copytree(before.results, copied)
    assert reconcile(build_plan(copied, **NAMED), comparison).artifacts_followed == 6
    copied.rename(moved)
    plan = build_plan(moved, **NAMED)
    assert reconcile(plan, comparison) == Repairs(artifacts_followed=6)
    assert reconcile(plan, comparison) == Repairs()
    uri = local_uri(moved)
    reader = Reader(uri, "a b / 100%")
    addresses = [run.info.artifact_uri for run in (reader.parent(), reader.trial(config_of(0).trial_id))]
    assert all(address.startswith(moved.as_uri()) for address in (*addresses, reader.experiment.artifact_location))
    assert mlflow.artifacts.load_text(f"{addresses[0]}/report.html") == "report.html"
    images = np.zeros((1, TOKENS, DIM), np.float32)
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", uri)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    shutil.rmtree(before.results)
    (output,) = reader.parent().outputs.model_outputs
    for name in (output.model_id, "decomposer@best"):
        assert mlflow.pyfunc.load_model(f"models:/{name}").predict(images)["a"].shape == (1, TOKENS, 2)
    others = reader.client.get_experiment_by_name("others")
    assert others is not None
    assert others.artifact_location == theirs
    utils._artifact_repos_cache.clear()  # what a process of its own does not have
    with Tracker(plan) as tracker:  # as `resume` and `extend` do
        track_trial(tracker, plan, config_of(1))
        outcomes = [outcome_of(plan, config_of(number)) for number in range(2)]
        tracker.compared(write_study(plan, [config_of(0), config_of(1)]), outcomes)
    assert tracker.problems == ()
    assert reader.artifacts(reader.trial(config_of(1).trial_id)) == {"loss_curves.png"}
    assert not before.results.exists()
    assert not copied.exists()


def test_a_database_that_is_shared_follows_what_was_moved_and_no_copy(tmp_path: Path, migrated: Path) -> None:
    before, _ = track(tmp_path / "results", migrated)
    shared = (before.results / "mlflow.db").rename(tmp_path / "shared.db")
    address = f"sqlite:///{shared}"
    assert follow_artifacts(resolve_store(address, before.results)) == 0
    shutil.copytree(before.results, tmp_path / "copied")
    assert follow_artifacts(resolve_store(address, tmp_path / "copied")) == 0
    before.results.rename(tmp_path / "moved")
    assert follow_artifacts(Store(address, tmp_path / "nowhere" / "mlartifacts")) == 0
    assert follow_artifacts(resolve_store(address, tmp_path / "moved")) == 4
    assert_tracked_once(address, tmp_path / "moved" / "studies" / before.study_id)
