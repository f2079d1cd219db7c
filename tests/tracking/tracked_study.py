"""A study without a search: plans, outcomes and a comparison to track, and MLflow read back."""

import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Run

from lowrank_tune.config.plan import Plan, make_plan
from lowrank_tune.config.schema import StudySpec
from lowrank_tune.files import write_json
from lowrank_tune.lowrank.decomposers import make_decomposer, save_decomposer
from lowrank_tune.measured import Comparison, ComparisonRow
from lowrank_tune.records import TrialConfig, TrialOutcome
from lowrank_tune.tracking.tracker import Tracker

TOKENS, DIM = 6, 10


def build_plan(results: Path, **sections: Any) -> Plan:
    study = {
        "name": "tracked",
        "features": {"source": {"samples": 16}},
        "search": {"method": "grid", "space": {"families": {"sketch": {}, "direct": {}}, "rank": [2, 4]}},
    }
    return make_plan(StudySpec.model_validate(study | sections), results, datetime(2026, 1, 1, tzinfo=UTC))


def config_of(number: int, family: str = "sketch", rank: int = 2) -> TrialConfig:
    params = {"lambda_b": 1e-4, "lambda_ortho": 1e-3} if family == "direct" else {}
    name = f"r{rank:03d}-{family}-{number:04d}"
    return TrialConfig(name, number, 7 + number, family, rank, 0.001, 1e-5, 8, 3, 3, params)


def metrics_of(epoch: int, **changed: float) -> dict[str, float]:
    metrics = {"epoch": epoch, "train_loss": 2.0 / epoch, "val_mse": 1.0 / epoch, "val_token_cosine": 0.9}
    metrics |= {"val_residual_ratio": 1 + 1.0 / epoch, "lr": 0.001, "seconds": 0.1, "best_epoch": epoch}
    return metrics | changed


def outcome_of(plan: Plan, config: TrialConfig, stopped_by: str = "budget", **changed: Any) -> TrialOutcome:
    status = {"budget": "finished", "patience": "finished", "asha": "pruned", "error": "failed"}[stopped_by]
    best = {"val_mse": 0.3, "val_token_cosine": 0.9, "val_residual_ratio": 1.3}
    fields: dict[str, Any] = {"epochs": 3, "best_epoch": 3, "best": best, "seconds": 0.3}
    fields |= {"directory": str(plan.study_dir / "trials" / config.trial_id)} | changed
    return TrialOutcome(config=config, status=status, stopped_by=stopped_by, **fields)  # type: ignore[arg-type]


def write_trial(plan: Plan, config: TrialConfig, epochs: int, outcome: TrialOutcome | None = None) -> None:
    """A trial's files as its training and the driver write them; each epoch took 0.1 s, up to now."""
    directory = plan.study_dir / "trials" / config.trial_id
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", config)
    best = {"best_val_mse": 0.3, "best_val_token_cosine": 0.9, "best_val_residual_ratio": 1.3}
    if epochs:
        write_json(directory / "history.json", [metrics_of(epoch, **best) for epoch in range(1, epochs + 1)])
    if outcome:
        write_json(directory / "outcome.json", outcome)


def track_trial(tracker: Tracker, plan: Plan, config: TrialConfig, stopped_by: str = "budget", **changed: Any) -> None:
    """A trial that begins, trains and ends."""
    write_trial(plan, config, 0)
    tracker.trial_started(config)
    outcome = outcome_of(plan, config, stopped_by, **changed)
    for epoch in range(1, outcome.epochs + 1):
        write_trial(plan, config, epoch)
        tracker.trial_epoch(config.trial_id, epoch, metrics_of(epoch))
    write_trial(plan, config, outcome.epochs, outcome)
    tracker.trial_ended(outcome)


def write_status(plan: Plan, state: str) -> None:
    (plan.study_dir / "status.json").write_text(json.dumps({"state": state}))


def write_study(plan: Plan, configs: list[TrialConfig]) -> Comparison:
    """The files that a finished study has, and its comparison: `svd` and each trial's family."""
    plots = plan.study_dir / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    files = ("report.html", "study.yaml", "study.resolved.yaml", "pareto.json", "compression.json")
    for name in (*files, "plots/rank_curve.png"):
        (plan.study_dir / name).write_text(name)
    (plan.study_dir / "per_image.parquet").write_bytes(b"parquet")
    rows = [row_of("svd", rank, 1.0) for rank in (2, 4)]
    for config in configs:
        directory = plan.study_dir / "trials" / config.trial_id
        directory.mkdir(parents=True, exist_ok=True)
        save_decomposer(make_decomposer(config, TOKENS, DIM), directory / "best_model.safetensors")
        (directory / "loss_curves.png").write_bytes(b"png")
        chosen = 0 if any(row.chosen and row.rank == config.rank for row in rows) else config.number + 1
        rows.append(row_of(config.family, config.rank, 1.1 + 0.1 * config.number, config.trial_id, chosen))
    (plan.study_dir / "comparison.json").write_text(json.dumps([asdict(row) for row in rows]))
    return Comparison(tuple(rows), str(plan.study_dir / "per_image.parquet"), "one CPU thread", ("random weights",))


def row_of(method: str, rank: int, residual_ratio: float, trial_id: str = "", chosen: int = 0) -> ComparisonRow:
    return ComparisonRow(
        method, rank, 4, 0.9, 0.01, 0.95, 0.1, residual_ratio, 1.5, 640, 100.0, trial_id, chosen=chosen,
        residual_ratio=residual_ratio,
    )  # fmt: skip


class Reader:
    """What a person finds in the MLflow UI."""

    def __init__(self, uri: str, experiment: str = "tracked") -> None:
        self.client = MlflowClient(uri)
        found = self.client.get_experiment_by_name(experiment)
        assert found is not None
        self.experiment = found

    def runs(self, kind: str) -> list[Run]:
        query = f"tags.`lowrank.kind` = '{kind}'"
        return list(self.client.search_runs([self.experiment.experiment_id], query, order_by=["start_time ASC"]))

    def parent(self) -> Run:
        (run,) = self.runs("study")
        return run

    def trial(self, trial_id: str) -> Run:
        (run,) = (run for run in self.runs("trial") if run.data.tags["lowrank.trial_id"] == trial_id)
        return run

    def history(self, run: Run, key: str) -> list[tuple[int, float]]:
        metrics = self.client.get_metric_history(run.info.run_id, key)
        return sorted((metric.step, metric.value) for metric in metrics)

    def artifacts(self, run: Run, path: str | None = None) -> set[str]:
        return {file.path for file in self.client.list_artifacts(run.info.run_id, path)}

    def table(self, path: str) -> dict[str, Any]:
        """A table that the parent's tag announces to the UI."""
        parent = self.parent()
        assert {"path": path, "type": "table"} in json.loads(parent.data.tags["mlflow.loggedArtifacts"])
        table: dict[str, Any] = mlflow.artifacts.load_dict(f"{parent.info.artifact_uri}/{path}")
        return table
