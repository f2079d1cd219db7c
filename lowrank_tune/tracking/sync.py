"""MLflow is made to hold what a study's files hold.

Every epoch is on disk before anybody hears of it. So the code that tells MLflow of a live run tells what it lacks, and
also heals an outage, a killed driver and a lost database.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from lowrank_tune.config.plan import Plan
from lowrank_tune.config.source import TensorSource
from lowrank_tune.errors import LowrankTuneError, TrackingError, redact
from lowrank_tune.files import read_json
from lowrank_tune.measured import Comparison, ComparisonRow
from lowrank_tune.notes import read_notes
from lowrank_tune.records import FIGURES, TrialOutcome
from lowrank_tune.tracking.experiment import open_experiment
from lowrank_tune.tracking.store import REASON_LENGTH, Store, brief
from lowrank_tune.trials.outcomes import TrialRecord

RunStatus = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]

_EPOCH_METRICS = ("train_loss", *FIGURES, "lr")
_LEARNING_RATE = "lr"
"""The one figure that every epoch has, whatever became of it: its steps are the epochs that MLflow knows."""
_GROUPS_A_BATCH = 120  # of at most eight metrics: MLflow takes 1000 metrics, parameters and tags at a time
_PARAM_LENGTH = 6000
_STOPPED_BY, _REASON, _COMPARED = "lowrank.stopped_by", "lowrank.reason", "lowrank.compared"
_TRIAL_ID, _PARENT = "lowrank.trial_id", "mlflow.parentRunId"
_DESCRIPTION, _DESCRIPTION_LENGTH = "mlflow.note.content", 8000
_INTERRUPTED = "interrupted: its study was stopped or killed before it ended"
_PASSING = {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "DEADLINE_EXCEEDED", "IO_ERROR"}
_PASSING |= {"REQUEST_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED"}  # 429, which MLflow knows by two names
_TABLE, _RATES = "comparison_table.json", "rates_table.json"
_FILES = (
    *("report.html", "study.yaml", "study.resolved.yaml"),
    *("comparison.json", "per_image.parquet", "pareto.json", "compression.json"),
    *("fidelity.json", "fidelity_notes.json"),
)


@dataclass(slots=True)
class Repairs:
    """What was told; all zero where MLflow held the truth already.

    Attributes:
        runs_made: trials that MLflow did not know.
        runs_removed: second runs of the study or of one trial, deleted as MLflow's UI does: they can be restored.
        runs_ended: runs whose status or reason was not the truth.
        epochs_added: epochs whose figures were missing.
        comparison_added: whether the post-study figures were missing.
        notes_told: whether a note was missing.
        artifacts_followed: addresses of artifacts that were the results directory's before it was moved.
    """

    runs_made: int = 0
    runs_removed: int = 0
    runs_ended: int = 0
    epochs_added: int = 0
    comparison_added: bool = False
    notes_told: bool = False
    artifacts_followed: int = 0


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
    """Tells MLflow what it lacks of a study; each method may be called again and again, after an error and `forget`."""

    def __init__(self, plan: Plan, store: Store) -> None:
        from mlflow import MlflowClient

        # Another registry than the store's is nothing to a study that registers nothing.
        self._client = MlflowClient(store.uri, None if plan.spec.tracking.register_as else store.uri)
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
        from mlflow.entities import Metric, RunTag

        self._look()
        config, outcome = record.config, record.outcome
        run = self._runs.get(config.trial_id) or self._make_trial(record)
        if run.epochs is None:
            history = self._client.get_metric_history(run.run_id, _LEARNING_RATE) if run.metrics else []
            run.epochs = {metric.step for metric in history}
        new = [epoch for epoch in _epochs(record) if epoch[0] not in run.epochs]
        metrics = [
            [Metric(key, row[key], at, step) for key in _EPOCH_METRICS if math.isfinite(row.get(key, math.nan))]
            for step, at, row in new
        ]
        best: dict[str, float] = {}
        if outcome:
            figures = {f"best_{key}": value for key, value in outcome.best.items()}
            figures |= {"best_epoch": outcome.best_epoch} if outcome.best_epoch else {}
            best = {key: it for key, it in figures.items() if math.isfinite(it) and run.metrics.get(key) != it}
            metrics.append([Metric(key, value, record.changed, outcome.epochs) for key, value in best.items()])
        names = ("family", "rank", "lr", "weight_decay", "batch_size", "seed")
        params = {name: getattr(config, name) for name in names} | config.family_params
        status, tags = _ending(outcome, running)
        missing = {key: value for key, value in tags.items() if run.tags.get(key) != value}
        said = [RunTag(key, value) for key, value in missing.items()]
        self._log(run.run_id, metrics, [] if run.params else _params(params), said)
        for key in {_STOPPED_BY, _REASON} & run.tags.keys() - tags.keys():
            self._client.delete_tag(run.run_id, key)
            del run.tags[key]
        run.params = run.params or {"family": config.family}
        # One that is over is told of once: were it told again, its epochs would be looked up.
        run.epochs = run.epochs | {step for step, _, _ in new} if running else None
        run.metrics |= best
        run.tags |= tags
        self.repairs.epochs_added += len(new)
        self._set_status(run, status, record.changed, bool(missing))

    def study(self, status: RunStatus, at: int) -> None:
        """Tell how the study is; a run that has this status already keeps the time it ended at."""
        self._set_status(self._study_run(), status, at)
        self.notes()

    def notes(self) -> None:
        """Tell what people wrote down about the study, above what else its run's description says."""
        self._look()
        run = self._parent
        said = run.tags.get(_DESCRIPTION, "") if run else ""
        told = _described(read_notes(self._plan.study_dir), said)
        if run and told != said:
            self._client.set_tag(run.run_id, _DESCRIPTION, told)
            run.tags[_DESCRIPTION] = told
            self.repairs.notes_told = True

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
        from mlflow.exceptions import MlflowException

        from lowrank_tune.tracking.models import log_models

        study, register = self._study_run(), self._plan.spec.tracking.register_as
        digest = _digest(self._plan.study_dir)
        same = study.tags.get(_COMPARED) == digest
        if not same:
            self._tell_comparison(study.run_id, comparison, outcomes)
            study.tags.pop(_DESCRIPTION, None)
        try:
            lacking = log_models(self._client, study.run_id, comparison, outcomes, self._plan.study_dir, register)
        except MlflowException as error:
            if error.error_code != "ENDPOINT_NOT_FOUND":
                raise
            raise TrackingError(
                f"tracking server {self._store.shown} is older than MLflow 3 and knows no models: those of the best "
                "trials are not there, all else is; `lowrank-tune export` gives them"
            ) from error
        if lacking or not same:
            # Last: whatever is cut off before is told again.
            self._client.set_tag(study.run_id, _COMPARED, digest)
            study.tags[_COMPARED] = digest
            self.repairs.comparison_added = True

    def _look(self) -> None:
        from mlflow.utils import get_results_from_paginated_fn

        if self._experiment:
            return
        experiment = open_experiment(self._client, self._plan.spec.experiment, self._store)
        query, order = f"tags.`lowrank.study_id` = '{self._plan.study_id}'", ["start_time ASC"]
        found = get_results_from_paginated_fn(
            lambda size, token: self._client.search_runs([experiment], query, 1, size, order, token), 1000
        )
        runs = [
            _Run(run.info.run_id, run.info.status, run.data.params, dict(run.data.tags), dict(run.data.metrics))
            for run in found
        ]
        below = Counter(run.tags.get(_PARENT) for run in runs)
        studies = [run for run in runs if _TRIAL_ID not in run.tags]
        self._parent = max(studies, key=lambda run: below[run.run_id], default=None)
        self._second = [run.run_id for run in studies if run is not self._parent]
        for run in runs:
            if _TRIAL_ID in run.tags and self._runs.setdefault(run.tags[_TRIAL_ID], run) is not run:
                self._second.append(run.run_id)
        self._experiment = experiment

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
                "objective": ", ".join(spec.objectives),
                **({"target_error": spec.target_error} if spec.target_error is not None else {}),
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
            _TRIAL_ID: config.trial_id,
            _PARENT: self._study_run().run_id,
        } | ({"lowrank.confirms": config.confirms} if config.confirms else {})
        started = record.trained - round(1000 * sum(row["seconds"] for row in record.history))
        run = self._runs[config.trial_id] = self._make(config.trial_id, started, tags)
        self.repairs.runs_made += 1
        return run

    def _make(self, name: str, at: int, tags: dict[str, str]) -> _Run:
        entity = self._client.create_run(self._experiment, start_time=at, tags=tags, run_name=name)
        return _Run(str(entity.info.run_id), tags=tags)

    def _log(
        self, run_id: str, metrics: Sequence[Sequence[Any]], params: Sequence[Any] = (), tags: Sequence[Any] = ()
    ) -> None:
        """Metrics that stand in one group arrive together or not at all; parameters come first, tags last."""
        for start in range(0, max(1, len(metrics)), _GROUPS_A_BATCH):
            end = start + _GROUPS_A_BATCH
            batch = [metric for group in metrics[start:end] for metric in group]
            said = tags if end >= len(metrics) else ()
            if batch or params or said:
                self._client.log_batch(run_id, batch, params, said)
            params = ()

    def _set_status(self, run: _Run, status: RunStatus, at: int, told: bool = False) -> None:
        if run.status != status:
            if status == "RUNNING":
                self._client.update_run(run.run_id, status=status)
            else:
                self._client.set_terminated(run.run_id, status=status, end_time=at)
        self.repairs.runs_ended += status != "RUNNING" and (told or run.status != status)
        run.status = status

    def _tell_comparison(self, run_id: str, comparison: Comparison, outcomes: Sequence[TrialOutcome]) -> None:
        import pandas as pd
        from mlflow.entities import Metric
        from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS

        client, directory, at = self._client, self._plan.study_dir, _now()
        points = [*(point for row in comparison.rows for point in _points(row)), *_flips(directory)]
        keys = {key for key, _, _ in points} & client.get_run(run_id).data.metrics.keys()
        there = {(key, point.step, point.value) for key in keys for point in client.get_metric_history(run_id, key)}
        self._log(
            run_id, [[Metric(key, value, at, rank)] for key, rank, value in points if (key, rank, value) not in there]
        )
        notes = read_notes(directory)
        if notes or comparison.remarks:
            client.set_tag(run_id, _DESCRIPTION, _described(notes, "\n\n".join(comparison.remarks)))
        for name in _FILES:
            if (directory / name).is_file():
                client.log_artifact(run_id, str(directory / name))
        if (directory / "plots").is_dir():
            client.log_artifacts(run_id, str(directory / "plots"), "plots")
        tables = {_TABLE: comparison.rows} | ({_RATES: rates} if (rates := comparison.compression.rates) else {})
        for name, rows in tables.items():
            # What MlflowClient.log_table writes, without its habit of appending to the table that is there.
            table = pd.DataFrame([asdict(row) for row in rows])
            client.log_text(run_id, table.to_json(orient="split", index=False, double_precision=15), name)
        announced = [{"path": name, "type": "table"} for name in tables]
        client.set_tag(run_id, MLFLOW_LOGGED_ARTIFACTS, json.dumps(announced))
        for outcome in outcomes:
            curves, run = Path(outcome.directory) / "loss_curves.png", self._runs.get(outcome.config.trial_id)
            if run and curves.is_file():
                client.log_artifact(run.run_id, str(curves))


def is_passing(error: Exception) -> bool:
    """Whether an error of the store may go away by itself: no answer, too busy, locked."""
    import sqlite3

    import requests
    from sqlalchemy.exc import OperationalError

    # MLflow lets some of its database's own errors through, a lock that outlasts its patience among them.
    passing = (requests.ConnectionError, requests.Timeout, OperationalError, sqlite3.OperationalError)
    return isinstance(error, passing) or getattr(error, "error_code", "") in _PASSING


def reason_of(error: Exception) -> str:
    """An error in one line, without credentials."""
    said = brief(error)
    plain = isinstance(error, LowrankTuneError) or "does not answer" in said
    return redact(said if plain else f"{type(error).__name__}: {said}")[:REASON_LENGTH]


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


def _described(notes: Sequence[str], said: str) -> str:
    """A description with the notes on top, the newest first; whatever else it says stays, as far as there is room."""
    others = [part for part in said.split("\n\n") if part and part not in notes]
    return "\n\n".join([*reversed(notes), *others])[:_DESCRIPTION_LENGTH]


def _params(values: Mapping[str, Any]) -> list[Any]:
    from mlflow.entities import Param

    return [Param(key, redact(str(value))[:_PARAM_LENGTH]) for key, value in values.items()]


def _points(row: ComparisonRow) -> Iterator[tuple[str, int, float]]:
    """A row's figures, each as metric, step and value."""
    figures = {
        "token_cosine": row.token_cosine_mean,
        "residual_ratio": row.residual_ratio,
        "residual_ratio_weighted": row.residual_ratio_weighted,
        "token_cosine_minus_svd": row.token_cosine_minus_svd,
        "residual_ratio_seed_mean": row.residual_ratio_seed_mean,
        "residual_ratio_seed_sd": row.residual_ratio_seed_sd,
    }
    for figure, value in figures.items():
        if value is not None and math.isfinite(value):
            yield f"test.{row.method}.{figure}", row.rank, value


def _flips(directory: Path) -> Iterator[tuple[str, int, float]]:
    """The answers that flip with A·B of each method and rank, with X as cached and with the pictures, at step 0."""
    path, known = directory / "fidelity.json", set[tuple[str, int]]()
    for row in read_json(path) if path.is_file() else ():
        kind = row["method"], row["rank"]
        if kind not in known and (row["form"] == "factors" or not row["rank"]):
            known.add(kind)
            yield f"fidelity.{row['method']}.flips", row["rank"], row["answer_flips"]


def _digest(directory: Path) -> str:
    """Of the post-study files, whatever their times."""
    digest = hashlib.sha256()
    for path in (*(directory / name for name in _FILES), *sorted((directory / "plots").glob("*"))):
        if path.is_file():
            digest.update(f"{path.name}:{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


def _now() -> int:
    return time.time_ns() // 1_000_000
