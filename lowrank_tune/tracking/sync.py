"""A study's runs in MLflow: one parent, one child a trial or repetition, each found again before it is made.

Only the tracker's thread comes here: importing MLflow takes seconds, and sqlite wants one writer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import quote

import requests
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking.client import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS
from sqlalchemy.exc import OperationalError

from lowrank_tune.config.plan import Plan
from lowrank_tune.config.schema import TensorSource
from lowrank_tune.errors import TrackingError, redact
from lowrank_tune.records import Comparison, ComparisonRow, TrialConfig, TrialOutcome
from lowrank_tune.tracking.mlflow_tracker import (
    Compared,
    Epoch,
    EpochsEnded,
    Event,
    Repairs,
    RunStatus,
    StudyEnded,
    TrialEnded,
    TrialStarted,
)
from lowrank_tune.tracking.models import has_models, log_models
from lowrank_tune.tracking.store import Store, probe, resolve_store, set_mlflow_defaults

_METRICS_A_BATCH = 1000


def log_points(client: MlflowClient, run_id: str, points: Iterable[tuple[str, float, int, int]]) -> None:
    """Log (key, value, step, milliseconds) points, leaving out values that are no numbers.

    What stands together of one step arrives together or not at all.
    """
    batch: list[Metric] = []
    for _, group in groupby(points, key=lambda point: point[2]):
        metrics = [Metric(key, value, at, step) for key, value, step, at in group if math.isfinite(value)]
        if len(batch) + len(metrics) > _METRICS_A_BATCH:
            client.log_batch(run_id, metrics=batch)
            batch = []
        batch += metrics
    if batch:
        client.log_batch(run_id, metrics=batch)


def known_points(client: MlflowClient, run_id: str, key: str) -> set[tuple[int, float]]:
    """The steps and values that MLflow has of a run's metric."""
    try:
        return {(metric.step, metric.value) for metric in client.get_metric_history(run_id, key)}
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return set()
        raise


_EPOCH_METRICS = ("train_loss", "val_mse", "val_token_cosine", "val_residual_ratio", "lr")
# The 3.17 UI opens an experiment without this as "GenAI", without metric columns.
_KIND_TAG, _KIND = "mlflow.experimentKind", "custom_model_development"
_REASON_TAG = "lowrank.reason"
_LEARNING_RATE = "lr"
"""The one figure that every epoch has, whatever became of it: its steps are the epochs that MLflow knows."""
_PARAM_LENGTH = 6000
_PASSING = {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED", "IO_ERROR"}


def is_passing(error: Exception) -> bool:
    """Whether an error of the store may go away by itself: no answer, too busy, locked."""
    if isinstance(error, MlflowException):
        return error.error_code in _PASSING
    # MLflow lets some of its database's own errors through, a lock that outlasts its patience among them.
    return isinstance(error, requests.ConnectionError | requests.Timeout | OperationalError)


class StudyRuns:
    """Delivers a study's events to MLflow.

    Args:
        plan: the study.
        store: where it is tracked.

    Attributes:
        client: the store's.
        children: the runs of trials and repetitions, by trial id.

    Raises:
        MlflowException: the store refuses.
        TrackingError: the experiment was deleted.
    """

    def __init__(self, plan: Plan, store: Store) -> None:
        self.client = MlflowClient(store.uri)
        self.children: dict[str, str] = {}
        self._plan = plan
        self._experiment = _open_experiment(self.client, plan.spec.tracking.experiment or plan.spec.name, store)
        self._parent: str | None = None
        self._unsure = False
        # Of runs that an earlier process or attempt had begun: what MLflow knows of them already.
        self._known: dict[str, set[int]] = {}
        self._open: set[str] = set()
        self._look()

    @property
    def parent(self) -> str:
        """The study's own run, made when missing."""
        if self._parent is None:
            if self._unsure:
                self._look()
            self._parent = self._parent or self._create_parent()
        return self._parent

    def begin(self) -> None:
        """The study begins, or goes on."""
        self.client.update_run(self.parent, status="RUNNING")

    def runs(self) -> Iterator[Run]:
        """All runs of this study, the oldest first."""
        query = f"tags.`lowrank.study_id` = '{self._plan.study_id}'"
        token: str | None = None
        while True:
            page = self.client.search_runs(
                [self._experiment], query, max_results=1000, order_by=["start_time ASC"], page_token=token
            )
            yield from page
            token = page.token
            if not token:
                return

    def deliver(self, event: Event) -> None:
        """Tell MLflow one event; telling it twice does no harm."""
        match event:
            case TrialStarted(config, at):
                self.start_trial(config, at)
            case EpochsEnded(trial_id, epochs):
                self.log_epochs(self.children[trial_id], epochs)
            case TrialEnded(outcome, at):
                if outcome.config.trial_id not in self.children:
                    self.start_trial(outcome.config, at)
                run_id = self.children[outcome.config.trial_id]
                self.end_trial(run_id, outcome, at)
                self._open.discard(run_id)
                self._known.pop(run_id, None)
            case Compared():
                # MLflow's model side takes another second to import, and is needed by the last event only.

                log_comparison(self.client, self.parent, self.children, event, self._plan.spec.tracking.register_as)
            case StudyEnded(status, at):
                self._end_study(status, at)

    def start_trial(self, config: TrialConfig, at: int) -> str:
        """Begin a trial's run, or go on with the one that it has.

        Returns:
            The run's id.
        """
        if self._unsure and config.trial_id not in self.children:
            self._look()
        run_id = self.children.get(config.trial_id)
        if run_id is None:
            run_id = self._create(config.trial_id, at, self._tags(config))
            self.children[config.trial_id] = run_id
            self._log_params(run_id, _trial_params(config))
        elif run_id not in self._open:
            self._go_on(run_id)
            self._log_params(run_id, _trial_params(config))
        self._open.add(run_id)
        return run_id

    def log_epochs(self, run_id: str, epochs: Collection[Epoch]) -> int:
        """Log the epochs that a run has not got yet.

        Returns:
            How many those were.
        """
        known = self._known.get(run_id, set())
        new = [epoch for epoch in epochs if epoch.epoch not in known]
        log_points(
            self.client,
            run_id,
            (
                (key, epoch.metrics[key], epoch.epoch, epoch.at)
                for epoch in new
                for key in _EPOCH_METRICS
                if key in epoch.metrics
            ),
        )
        return len(new)

    def know(self, run_id: str) -> None:
        """Find out which epochs MLflow has of a run."""
        self._known[run_id] = {step for step, _ in known_points(self.client, run_id, _LEARNING_RATE)}

    def end_trial(self, run_id: str, outcome: TrialOutcome, at: int) -> None:
        """End a trial's run as the trial ended."""
        best = {f"best_{key}": value for key, value in outcome.best.items()}
        if outcome.best_epoch:
            best["best_epoch"] = outcome.best_epoch
        if run_id in self._known:
            known = {key: {value for _, value in known_points(self.client, run_id, key)} for key in best}
            best = {key: value for key, value in best.items() if value not in known[key]}
        log_points(self.client, run_id, ((key, value, outcome.epochs, at) for key, value in best.items()))
        tags: dict[str, str] = {"lowrank.stopped_by": outcome.stopped_by}
        if outcome.reason:
            tags[_REASON_TAG] = redact(outcome.reason)
        self.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        status = "FAILED" if outcome.status == "failed" else "FINISHED"
        self.client.set_terminated(run_id, status=status, end_time=at)

    def kill(self, run_id: str, reason: str, at: int) -> None:
        """End a run whose training ended before the trial did."""
        self.client.set_tag(run_id, _REASON_TAG, reason)
        self.client.set_terminated(run_id, status="KILLED", end_time=at)

    def _look(self) -> None:
        """Find the runs that the study has."""
        for run in self.runs():
            tags = run.data.tags
            if tags.get("lowrank.kind") == "study":
                self._parent = self._parent or str(run.info.run_id)
            elif "lowrank.trial_id" in tags:
                self.children.setdefault(tags["lowrank.trial_id"], str(run.info.run_id))
        self._unsure = False

    def _create(self, name: str, at: int, tags: Mapping[str, str]) -> str:
        # An answer that is lost leaves a run that this process knows nothing of: look before the next attempt.
        self._unsure = True
        run = self.client.create_run(self._experiment, start_time=at, tags=dict(tags), run_name=name)
        self._unsure = False
        return str(run.info.run_id)

    def _create_parent(self) -> str:
        plan, spec = self._plan, self._plan.spec
        tags = {
            "lowrank.kind": "study",
            "lowrank.study_id": plan.study_id,
            "lowrank.spec_hash": plan.spec_hash,
        }
        # MLflow may be reached only now, when trials have begun.
        run_id = self._create(plan.study_id, int(plan.started.timestamp() * 1000), tags)
        params = {
            "method": spec.search.method,
            "trials": plan.n_trials,
            "objective": spec.objective,
            "scheduler": spec.scheduler.kind,
            "epochs": spec.training.epochs,
            "patience": spec.training.patience,
            "seed": spec.seed,
            "confirm_seeds": spec.report.confirm_seeds,
            "encoder": "none" if isinstance(spec.features.source, TensorSource) else spec.features.encoder.checkpoint,
        }
        self._log_params(run_id, params)
        return run_id

    def _tags(self, config: TrialConfig) -> dict[str, str]:
        tags = {
            "lowrank.kind": "confirmation" if config.confirms else "trial",
            "lowrank.study_id": self._plan.study_id,
            "lowrank.trial_id": config.trial_id,
            "mlflow.parentRunId": self.parent,
        }
        return tags | ({"lowrank.confirms": config.confirms} if config.confirms else {})

    def _go_on(self, run_id: str) -> None:
        if _REASON_TAG in self.client.get_run(run_id).data.tags:
            self.client.delete_tag(run_id, _REASON_TAG)
        self.client.update_run(run_id, status="RUNNING")
        self.know(run_id)

    def _end_study(self, status: RunStatus, at: int) -> None:
        for run_id in sorted(self._open):
            self.client.set_terminated(run_id, status="KILLED", end_time=at)
        self._open.clear()
        # A report made later must not move the end of a run that has ended.
        if self.client.get_run(self.parent).info.status != status:
            self.client.set_terminated(self.parent, status=status, end_time=at)

    def _log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        entries = [Param(key, redact(str(value))[:_PARAM_LENGTH]) for key, value in params.items()]
        self.client.log_batch(run_id, params=entries)


def _trial_params(config: TrialConfig) -> dict[str, Any]:
    return {
        "family": config.family,
        "rank": config.rank,
        "lr": config.lr,
        "weight_decay": config.weight_decay,
        "batch_size": config.batch_size,
        "seed": config.seed,
        **config.family_params,
    }


def _open_experiment(client: MlflowClient, name: str, store: Store) -> str:
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


_FILES = (
    *("report.html", "study.yaml", "study.resolved.yaml"),
    *("comparison.json", "per_image.parquet", "pareto.json", "compression.json"),
)
_TABLE = "comparison_table.json"


def log_comparison(
    client: MlflowClient, parent: str, children: Mapping[str, str], event: Compared, register: str | None = None
) -> None:
    """Log the rank curves, the table, the files and the best model of each rank; again, where some are there already.

    Args:
        client: the store's.
        parent: the study's run.
        children: the trials' and repetitions' runs by trial id; each gets its loss curves.
        event: what was compared, and the study's directory.
        register: the registered model of which the best models become versions; None registers nothing.
    """
    comparison, directory = event.comparison, event.directory
    known = _known(client, client.get_run(parent))
    points = [point for point in _points(comparison) if (point[0], point[2], point[1]) not in known]
    log_points(client, parent, ((key, value, rank, event.at) for key, value, rank in points))
    if comparison.remarks:
        client.set_tag(parent, "mlflow.note.content", "\n\n".join(comparison.remarks))
    for name in _FILES:
        if (directory / name).is_file():
            client.log_artifact(parent, str(directory / name))
    if (directory / "plots").is_dir():
        client.log_artifacts(parent, str(directory / "plots"), "plots")
    _log_table(client, parent, comparison)
    for outcome in event.outcomes:
        curves = Path(outcome.directory) / "loss_curves.png"
        if curves.is_file() and outcome.config.trial_id in children:
            client.log_artifact(children[outcome.config.trial_id], str(curves))
    log_models(client, parent, event, register)


def has_comparison(client: MlflowClient, run: Run, comparison: Comparison, register: str | None = None) -> bool:
    """Whether a study's run has all of a comparison already, and the registry what was to be registered."""
    known = _known(client, run)
    if any((key, rank, value) not in known for key, value, rank in _points(comparison)):
        return False
    # The models come last.
    return has_models(client, run, comparison.best_of_each_rank(), register)


def _known(client: MlflowClient, run: Run) -> set[tuple[str, int, float]]:
    keys = [key for key in run.data.metrics if key.startswith("test.")]
    return {(key, *point) for key in keys for point in known_points(client, run.info.run_id, key)}


def _points(comparison: Comparison) -> list[tuple[str, float, int]]:
    return [
        (f"test.{row.method}.{figure}", value, row.rank)
        for row in comparison.rows
        for figure, value in _figures(row).items()
        if value is not None and math.isfinite(value)
    ]


def _figures(row: ComparisonRow) -> dict[str, float | None]:
    return {
        "token_cosine": row.token_cosine_mean,
        "residual_ratio": row.residual_ratio_mean,
        "token_cosine_minus_svd": row.token_cosine_minus_svd,
        "residual_ratio_seed_mean": row.residual_ratio_seed_mean,
        "residual_ratio_seed_sd": row.residual_ratio_seed_sd,
    }


def _log_table(client: MlflowClient, parent: str, comparison: Comparison) -> None:
    # What MlflowClient.log_table writes, without its habit of appending to the table that is there.
    columns = [field.name for field in fields(ComparisonRow)]
    data = [[_json_value(value) for value in astuple(row)] for row in comparison.rows]
    client.log_dict(parent, {"columns": columns, "data": data}, _TABLE)
    client.set_tag(parent, MLFLOW_LOGGED_ARTIFACTS, json.dumps([{"path": _TABLE, "type": "table"}]))


def _json_value(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


_ENDED = {"FINISHED", "FAILED", "KILLED"}
_STATES: dict[str, RunStatus] = {"finished": "FINISHED", "failed": "FAILED"}
_INTERRUPTED = "interrupted: its study was stopped or killed before it ended"
_STOPPED_BY = "lowrank.stopped_by"


@dataclass(frozen=True, slots=True)
class _OnFile:
    """A trial as its own folder tells of it."""

    config: TrialConfig
    epochs: tuple[Epoch, ...]
    outcome: TrialOutcome | None
    at: int


def reconcile(plan: Plan, comparison: Comparison | None = None) -> Repairs:
    """Make MLflow hold what a study's files hold: a run a trial, every epoch once, and no run that runs for ever.

    Nothing is told twice, and a second reconciliation changes nothing. A trial without an outcome on file is KILLED: no
    process trains it any more. So no other process may be at work on the study: the caller claims it.

    Args:
        plan: the study.
        comparison: its post-study figures, when it has any.

    Raises:
        TrackingError: the store does not answer.
    """
    set_mlflow_defaults()
    store = resolve_store(plan.spec.tracking.uri, plan.results)
    probe(store)
    runs = StudyRuns(plan, store)
    repairs = Repairs()
    found = _first_of_each(runs, repairs)
    on_file = {trial.config.trial_id: trial for trial in _read_trials(plan.study_dir / "trials")}
    for trial in on_file.values():
        _repair_trial(runs, trial, found.get(trial.config.trial_id), repairs)
    for trial_id, run in found.items():
        if trial_id not in on_file and run.info.status not in _ENDED:
            runs.kill(run.info.run_id, _INTERRUPTED, run.info.start_time)
            repairs.runs_ended += 1
    _repair_parent(runs, plan, comparison, repairs)
    return repairs


def _first_of_each(runs: StudyRuns, repairs: Repairs) -> dict[str, Run]:
    """The run of each trial; of several the first, for the others are deleted."""
    found: dict[str, Run] = {}
    for run in runs.runs():
        trial_id = run.data.tags.get("lowrank.trial_id")
        if trial_id is None:
            continue
        if trial_id in found:
            runs.client.delete_run(run.info.run_id)
            repairs.runs_removed += 1
        else:
            found[trial_id] = run
    return found


def _repair_trial(runs: StudyRuns, trial: _OnFile, run: Run | None, repairs: Repairs) -> None:
    if run is None:
        run_id = runs.start_trial(trial.config, trial.epochs[0].at if trial.epochs else trial.at)
        repairs.runs_made += 1
    else:
        run_id = run.info.run_id
        runs.know(run_id)
    repairs.epochs_added += runs.log_epochs(run_id, trial.epochs)
    status, tags = (run.info.status, run.data.tags) if run else ("RUNNING", {})
    if trial.outcome is not None:
        expected = "FAILED" if trial.outcome.status == "failed" else "FINISHED"
        if status != expected or tags.get(_STOPPED_BY) != trial.outcome.stopped_by:
            runs.end_trial(run_id, trial.outcome, trial.at)
            repairs.runs_ended += 1
    elif status not in _ENDED:
        runs.kill(run_id, _INTERRUPTED, trial.at)
        repairs.runs_ended += 1


def _repair_parent(runs: StudyRuns, plan: Plan, comparison: Comparison | None, repairs: Repairs) -> None:
    parent = runs.client.get_run(runs.parent)
    if comparison is not None:
        repairs.comparison_added = _repair_comparison(runs, plan, parent, comparison)
    expected, at = _study_status(plan.study_dir)
    if parent.info.status != expected:
        runs.client.set_terminated(runs.parent, status=expected, end_time=at)
        repairs.runs_ended += 1


def _repair_comparison(runs: StudyRuns, plan: Plan, parent: Run, comparison: Comparison) -> bool:
    # MLflow's model side takes another second to import.

    register = plan.spec.tracking.register_as
    if has_comparison(runs.client, parent, comparison, register):
        return False
    outcomes = tuple(trial.outcome for trial in _read_trials(plan.study_dir / "trials") if trial.outcome)
    event = Compared(comparison, outcomes, plan.study_dir, _moment(Path(comparison.per_image_path)))
    log_comparison(runs.client, runs.parent, runs.children, event, register)
    return True


def _study_status(study_dir: Path) -> tuple[RunStatus, int]:
    """How the study ended; one that still calls itself running, while nobody runs it, was killed."""
    path = study_dir / "status.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))["state"]
    except FileNotFoundError:
        return "KILLED", _moment(study_dir)
    return _STATES.get(state, "KILLED"), _moment(path)


def _read_trials(trials_dir: Path) -> Iterator[_OnFile]:
    for path in sorted(trials_dir.glob("*/config.json")):
        config = TrialConfig(**_read(path))
        history_path, outcome_path = path.with_name("history.json"), path.with_name("outcome.json")
        rows: list[dict[str, float]] = _read(history_path) if history_path.is_file() else []
        outcome = TrialOutcome.read(outcome_path) if outcome_path.is_file() else _ended(config, rows, path.parent)
        at = _moment(outcome_path if outcome_path.is_file() else path)
        yield _OnFile(config, tuple(_epochs(rows, _moment(path))), outcome, at)


def _epochs(rows: list[dict[str, float]], ended_at: int) -> Iterator[Epoch]:
    """The epochs with the moments they ended at, counted back from the last one's."""
    left = sum(row["seconds"] for row in rows)
    for row in rows:
        left -= row["seconds"]
        yield Epoch(int(row["epoch"]), row, ended_at - round(1000 * left))


def _ended(config: TrialConfig, rows: list[dict[str, float]], directory: Path) -> TrialOutcome | None:
    """The outcome of a training that ended by itself just before its driver died; None for one that had not ended."""
    if not rows:
        return None
    last = rows[-1]
    ended = config.ends_at(int(last["epoch"]), int(last["best_epoch"]))
    if ended is None:
        return None
    best = {name: last[f"best_{name}"] for name in ("val_mse", "val_token_cosine", "val_residual_ratio")}
    seconds = sum(row["seconds"] for row in rows)
    return TrialOutcome(
        config, "finished", ended, int(last["epoch"]), int(last["best_epoch"]), best, str(directory), seconds
    )


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _moment(path: Path) -> int:
    return path.stat().st_mtime_ns // 1_000_000
