"""What must hold of a study in MLflow, whatever it went through: nothing is missing, doubled or left open."""

import json
from collections import Counter
from pathlib import Path

from mlflow import MlflowClient

EPOCH_METRICS = ("train_loss", "val_mse", "val_token_cosine", "val_residual_ratio", "lr")


def assert_tracked_once(uri: str, study_dir: Path) -> str:
    """Check that a finished study has one run a trial, each ended as its trial did, and every figure once.

    Args:
        uri: the tracking store's.
        study_dir: `results/studies/<study_id>`; its `outcome.json` files say which trials there were.

    Returns:
        The id of the study's own run.
    """
    outcomes = {path.parent.name: json.loads(path.read_text()) for path in study_dir.glob("trials/*/outcome.json")}
    client = MlflowClient(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, f"tags.`lowrank.study_id` = '{study_dir.name}'", max_results=1000)
    (parent,) = (run for run in runs if run.data.tags["lowrank.kind"] == "study")
    children = [run for run in runs if run is not parent]
    assert Counter(run.data.tags["lowrank.trial_id"] for run in children) == Counter(outcomes.keys())
    assert parent.info.status == "FINISHED"
    for run in children:
        outcome = outcomes[run.data.tags["lowrank.trial_id"]]
        assert run.info.run_name == run.data.tags["lowrank.trial_id"]
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.info.status == ("FAILED" if outcome["status"] == "failed" else "FINISHED")
        assert run.data.tags["lowrank.stopped_by"] == outcome["stopped_by"]
        assert run.data.tags.get("lowrank.reason", "") == outcome["reason"]
        for key in EPOCH_METRICS:
            steps = sorted(point.step for point in client.get_metric_history(run.info.run_id, key))
            assert steps == list(range(1, outcome["epochs"] + 1)), (outcome["config"]["trial_id"], key)
        for key, value in outcome["best"].items():
            assert [point.value for point in client.get_metric_history(run.info.run_id, f"best_{key}")] == [value]
    return str(parent.info.run_id)
