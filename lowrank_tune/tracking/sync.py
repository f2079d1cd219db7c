"""MLflow is made to hold what a study's files hold.

Every epoch is on disk before anybody hears of it. So the code that tells MLflow of a live run tells what it lacks, and
also heals an outage, a killed driver and a lost database.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from lowrank_tune.config.plan import Plan
from lowrank_tune.config.schema import TensorSource
from lowrank_tune.errors import TrackingError, redact
from lowrank_tune.records import Comparison, ComparisonRow, TrialConfig, TrialOutcome
from lowrank_tune.tracking.store import Store
from lowrank_tune.trials.outcomes import OBJECTIVES, TrialRecord

RunStatus = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]

_EPOCH_METRICS = ("train_loss", *OBJECTIVES, "lr")
_LEARNING_RATE = "lr"
"""The one figure that every epoch has, whatever became of it: its steps are the epochs that MLflow knows."""
_EPOCHS_A_BATCH, _POINTS_A_BATCH = 150, 900  # MLflow takes 1000 metrics, parameters and tags at a time
_PARAM_LENGTH = 6000
# The 3.17 UI opens an experiment without this as "GenAI", without metric columns.
_KIND_TAG, _KIND = "mlflow.experimentKind", "custom_model_development"
_STOPPED_BY, _REASON, _COMPARED = "lowrank.stopped_by", "lowrank.reason", "lowrank.compared"
_INTERRUPTED = "interrupted: its study was stopped or killed before it ended"
_PASSING = {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "DEADLINE_EXCEEDED", "IO_ERROR"}
_PASSING |= {"REQUEST_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED"}  # 429, which MLflow knows by two names
_REASON_LENGTH = 300
_TABLE = "comparison_table.json"
_FILES = (
    *("report.html", "study.yaml", "study.resolved.yaml"),
    *("comparison.json", "per_image.parquet", "pareto.json", "compression.json"),
)


@dataclass(slots=True)
class Repairs:
    """What was told; all zero where MLflow held the truth already.

    Attributes:
        runs_made: trials that MLflow did not know.
        runs_removed: second runs of one trial, which are deleted as MLflow's UI does and can be restored.
        runs_ended: runs whose status or reason was not the truth.
        epochs_added: epochs whose figures were missing.
        comparison_added: whether the post-study figures were missing.
    """

    runs_made: int = 0
    runs_removed: int = 0
    runs_ended: int = 0
    epochs_added: int = 0
    comparison_added: bool = False


@dataclass(slots=True)
class _Run:
    """What MLflow knows of a run: the last value of each metric, and of a trial the epochs, looked up when needed."""

    run_id: str
    status: str = "RUNNING"
    params: Mapping[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    epochs: set[int] | None = None


class StudySync:
    """Tells MLflow what it lacks of a study; each method may be called again and again, and after an error must be."""

    def __init__(self, plan: Plan, store: Store) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient(store.uri)
        self._plan, self._store = plan, store
        self.repairs = Repairs()
        self.forget()

    def forget(self) -> None:
        """Look up anew what MLflow has: an answer may have been lost, or the store have been replaced."""
        self._experiment = ""
        self._parent: _Run | None = None
        self._runs: dict[str, _Run] = {}
        self._second: list[str] = []

    def trial(self, record: TrialRecord, running: bool) -> None:
        """Tell of a trial or a repetition; one without an outcome is KILLED unless a process trains it."""
        self._look()
        config, outcome = record.config, record.outcome
        run = self._runs.get(config.trial_id) or self._make_trial(record)
        status, tags = _ending(outcome, running)
        missing = {key: value for key, value in tags.items() if run.tags.get(key) != value}
        self._tell_figures(run, record, missing)
        for key in {_STOPPED_BY, _REASON} & run.tags.keys() - tags.keys():
            self._client.delete_tag(run.run_id, key)
            del run.tags[key]
        run.tags |= tags
        self._set_status(run, status, record.changed, bool(missing))

    def study(self, status: RunStatus, at: int) -> None:
        """Tell how the study is; a run that has this status already keeps the time it ended at."""
        self._set_status(self._study_run(), status, at)

    def without_files(self, trial_ids: Iterable[str]) -> None:
        """End the runs of trials that have no files, which are others than these; only one run of a trial is left."""
        self._look()
        for run_id in self._second:
            self._client.delete_run(run_id)
            self.repairs.runs_removed += 1
        self._second = []
        for trial_id in self._runs.keys() - set(trial_ids):
            run = self._runs[trial_id]
            if run.status == "RUNNING":
                self._client.set_tag(run.run_id, _REASON, _INTERRUPTED)
                self._set_status(run, "KILLED", _now())

    def comparison(self, comparison: Comparison, outcomes: Sequence[TrialOutcome]) -> None:
        """Tell the rank curves, the table, the files, each run's loss curves and the best model of each rank."""
        from lowrank_tune.tracking.models import log_models

        study, register = self._study_run(), self._plan.spec.tracking.register_as
        digest = _digest(self._plan.study_dir)
        entity = self._client.get_run(study.run_id)
        same = entity.data.tags.get(_COMPARED) == digest
        if not same:
            self._tell_comparison(study.run_id, list(entity.data.metrics), comparison, outcomes)
        lacking = log_models(self._client, study.run_id, comparison, outcomes, self._plan.study_dir, register)
        if lacking or not same:
            # Last: whatever is cut off before is told again.
            self._client.set_tag(study.run_id, _COMPARED, digest)
            self.repairs.comparison_added = True

    def _look(self) -> None:
        if self._experiment:
            return
        experiment = _open_experiment(
            self._client, self._plan.spec.tracking.experiment or self._plan.spec.name, self._store
        )
        query, token = f"tags.`lowrank.study_id` = '{self._plan.study_id}'", None
        while True:
            page = self._client.search_runs(
                [experiment], query, max_results=1000, order_by=["start_time ASC"], page_token=token
            )
            for entity in page:
                self._take(entity)
            token = page.token
            if not token:
                break
        self._experiment = experiment

    def _take(self, entity: Any) -> None:
        data = entity.data
        run = _Run(entity.info.run_id, entity.info.status, data.params, dict(data.tags), dict(data.metrics))
        trial_id = run.tags.get("lowrank.trial_id")
        if trial_id is None:
            self._parent = self._parent or run
        elif self._runs.setdefault(trial_id, run) is not run:
            self._second.append(run.run_id)

    def _study_run(self) -> _Run:
        self._look()
        if self._parent is None:
            plan, spec = self._plan, self._plan.spec
            tags = {"lowrank.kind": "study", "lowrank.study_id": plan.study_id, "lowrank.spec_hash": plan.spec_hash}
            self._parent = self._make(plan.study_id, int(plan.started.timestamp() * 1000), tags)
        if not self._parent.params:
            tensors = isinstance(spec.features.source, TensorSource)
            params = {
                "method": spec.search.method,
                "trials": plan.n_trials,
                "objective": spec.objective,
                "scheduler": spec.scheduler.kind,
                "epochs": spec.training.epochs,
                "patience": spec.training.patience,
                "seed": spec.seed,
                "confirm_seeds": spec.report.confirm_seeds,
                "encoder": "none" if tensors else spec.features.encoder.checkpoint,
            }
            self._client.log_batch(self._parent.run_id, params=_params(params))
            self._parent.params = {"method": spec.search.method}
        return self._parent

    def _make_trial(self, record: TrialRecord) -> _Run:
        config = record.config
        tags = {
            "lowrank.kind": "confirmation" if config.confirms else "trial",
            "lowrank.study_id": self._plan.study_id,
            "lowrank.trial_id": config.trial_id,
            "mlflow.parentRunId": self._study_run().run_id,
        } | ({"lowrank.confirms": config.confirms} if config.confirms else {})
        started = record.trained - round(1000 * sum(row["seconds"] for row in record.history))
        run = self._runs[config.trial_id] = self._make(config.trial_id, started, tags)
        self.repairs.runs_made += 1
        return run

    def _make(self, name: str, at: int, tags: dict[str, str]) -> _Run:
        entity = self._client.create_run(self._experiment, start_time=at, tags=tags, run_name=name)
        return _Run(str(entity.info.run_id), tags=tags)

    def _tell_figures(self, run: _Run, record: TrialRecord, tags: Mapping[str, str]) -> None:
        from mlflow.entities import Metric, RunTag

        if run.epochs is None:
            history = self._client.get_metric_history(run.run_id, _LEARNING_RATE) if run.metrics else []
            run.epochs = {metric.step for metric in history}
        outcome = record.outcome
        best = {f"best_{key}": value for key, value in outcome.best.items()} if outcome else {}
        if outcome and outcome.best_epoch:
            best["best_epoch"] = outcome.best_epoch
        best = {key: value for key, value in best.items() if math.isfinite(value) and run.metrics.get(key) != value}
        new = [epoch for epoch in _epochs(record) if epoch[0] not in run.epochs]
        for start in range(0, max(1, len(new)), _EPOCHS_A_BATCH):
            # What stands together of one epoch arrives together or not at all.
            epochs = new[start : start + _EPOCHS_A_BATCH]
            metrics = [
                Metric(key, row[key], at, step)
                for step, at, row in epochs
                for key in _EPOCH_METRICS
                if math.isfinite(row.get(key, math.nan))
            ]
            last = start + _EPOCHS_A_BATCH >= len(new)
            if last and outcome:
                metrics += [Metric(key, value, record.changed, outcome.epochs) for key, value in best.items()]
            params = [] if run.params else _params(_trial_params(record.config))
            said = [RunTag(key, value) for key, value in tags.items()] if last else []
            if metrics or params or said:
                self._client.log_batch(run.run_id, metrics, params, said)
            run.params = run.params or {"family": record.config.family}
            run.epochs |= {step for step, _, _ in epochs}
            self.repairs.epochs_added += len(epochs)
        run.metrics |= best

    def _set_status(self, run: _Run, status: RunStatus, at: int, told: bool = False) -> None:
        if run.status != status:
            if status == "RUNNING":
                self._client.update_run(run.run_id, status=status)
            else:
                self._client.set_terminated(run.run_id, status=status, end_time=at)
        self.repairs.runs_ended += status != "RUNNING" and (told or run.status != status)
        run.status = status

    def _tell_comparison(
        self, run_id: str, known: Sequence[str], comparison: Comparison, outcomes: Sequence[TrialOutcome]
    ) -> None:
        from mlflow.entities import Metric
        from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS

        client, directory, at = self._client, self._plan.study_dir, _now()
        keys = {key for key, _, _ in _points(comparison)} & set(known)
        there = {(key, point.step, point.value) for key in keys for point in client.get_metric_history(run_id, key)}
        metrics = [Metric(key, value, at, rank) for key, rank, value in _points(comparison)]
        metrics = [metric for metric in metrics if (metric.key, metric.step, metric.value) not in there]
        for start in range(0, len(metrics), _POINTS_A_BATCH):
            client.log_batch(run_id, metrics[start : start + _POINTS_A_BATCH])
        if comparison.remarks:
            client.set_tag(run_id, "mlflow.note.content", "\n\n".join(comparison.remarks))
        for name in _FILES:
            if (directory / name).is_file():
                client.log_artifact(run_id, str(directory / name))
        if (directory / "plots").is_dir():
            client.log_artifacts(run_id, str(directory / "plots"), "plots")
        # What MlflowClient.log_table writes, without its habit of appending to the table that is there.
        columns = [each.name for each in fields(ComparisonRow)]
        data = [[_json_value(value) for value in astuple(row)] for row in comparison.rows]
        client.log_dict(run_id, {"columns": columns, "data": data}, _TABLE)
        client.set_tag(run_id, MLFLOW_LOGGED_ARTIFACTS, json.dumps([{"path": _TABLE, "type": "table"}]))
        for outcome in outcomes:
            curves, run = Path(outcome.directory) / "loss_curves.png", self._runs.get(outcome.config.trial_id)
            if run and curves.is_file():
                client.log_artifact(run.run_id, str(curves))


def is_passing(error: Exception) -> bool:
    """Whether an error of the store may go away by itself: no answer, too busy, locked."""
    import sqlite3

    import requests
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import OperationalError

    if isinstance(error, MlflowException):
        return error.error_code in _PASSING
    # MLflow lets some of its database's own errors through, a lock that outlasts its patience among them.
    passing = (requests.ConnectionError, requests.Timeout, OperationalError, sqlite3.OperationalError)
    return isinstance(error, passing)


def reason_of(error: Exception) -> str:
    """An error in one line, without credentials."""
    said = str(error) if isinstance(error, TrackingError) else f"{type(error).__name__}: {error}"
    return redact(said.splitlines()[0])[:_REASON_LENGTH]


def _open_experiment(client: Any, name: str, store: Store) -> str:
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        location = (store.artifacts / quote(name, safe="")).as_uri() if store.artifacts else None
        try:
            return str(client.create_experiment(name, location, tags={_KIND_TAG: _KIND}))
        except MlflowException as error:
            # Another study of this name began at the same moment, or the answer to an earlier attempt was lost.
            experiment = client.get_experiment_by_name(name)
            if experiment is None or error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
    if experiment.lifecycle_stage != "active":
        raise TrackingError(
            f"MLflow experiment {name} was deleted from {store.shown}; name another in tracking.experiment, or "
            f"restore it with `mlflow experiments restore --experiment-id {experiment.experiment_id}`"
        )
    if experiment.tags.get(_KIND_TAG) != _KIND:
        client.set_experiment_tag(experiment.experiment_id, _KIND_TAG, _KIND)
    return str(experiment.experiment_id)


def _ending(outcome: TrialOutcome | None, running: bool) -> tuple[RunStatus, dict[str, str]]:
    if outcome is None:
        return ("RUNNING", {}) if running else ("KILLED", {_REASON: _INTERRUPTED})
    reason = {_REASON: redact(outcome.reason)} if outcome.reason else {}
    return "FAILED" if outcome.status == "failed" else "FINISHED", {_STOPPED_BY: outcome.stopped_by} | reason


def _epochs(record: TrialRecord) -> Iterator[tuple[int, int, Mapping[str, float]]]:
    """The epochs with the moments they ended at, counted back from the last one's."""
    left = sum(row["seconds"] for row in record.history)
    for row in record.history:
        left -= row["seconds"]
        yield int(row["epoch"]), record.trained - round(1000 * left), row


def _trial_params(config: TrialConfig) -> dict[str, Any]:
    names = ("family", "rank", "lr", "weight_decay", "batch_size", "seed")
    return {name: getattr(config, name) for name in names} | config.family_params


def _params(values: Mapping[str, Any]) -> list[Any]:
    from mlflow.entities import Param

    return [Param(key, redact(str(value))[:_PARAM_LENGTH]) for key, value in values.items()]


def _points(comparison: Comparison) -> Iterator[tuple[str, int, float]]:
    for row in comparison.rows:
        figures = {
            "token_cosine": row.token_cosine_mean,
            "residual_ratio": row.residual_ratio_mean,
            "token_cosine_minus_svd": row.token_cosine_minus_svd,
            "residual_ratio_seed_mean": row.residual_ratio_seed_mean,
            "residual_ratio_seed_sd": row.residual_ratio_seed_sd,
        }
        for figure, value in figures.items():
            if value is not None and math.isfinite(value):
                yield f"test.{row.method}.{figure}", row.rank, value


def _json_value(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _digest(directory: Path) -> str:
    """Of the post-study files, whatever their times."""
    digest = hashlib.sha256()
    for path in (*(directory / name for name in _FILES), *sorted((directory / "plots").glob("*"))):
        if path.is_file():
            digest.update(f"{path.name}:{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


def _now() -> int:
    return time.time_ns() // 1_000_000
