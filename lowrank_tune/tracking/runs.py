"""A study's runs in MLflow: one parent, one child a trial or repetition, each found again before it is made.

Only the tracker's thread comes here: importing MLflow takes seconds, and sqlite wants one writer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import requests
from mlflow.entities import Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking.client import MlflowClient

from lowrank_tune.errors import TrackingError
from lowrank_tune.records import TrialConfig, TrialOutcome
from lowrank_tune.spec.features import TensorSource
from lowrank_tune.spec.plan import Plan
from lowrank_tune.tracking.events import Compared, EpochsEnded, Event, RunStatus, StudyEnded, TrialEnded, TrialStarted
from lowrank_tune.tracking.points import log_points
from lowrank_tune.tracking.store import Store

_EPOCH_METRICS = ("train_loss", "val_mse", "val_token_cosine", "val_residual_ratio", "lr")
# The 3.17 UI opens an experiment without this as "GenAI", without metric columns.
_KIND_TAG, _KIND = "mlflow.experimentKind", "custom_model_development"
_PARAM_LENGTH = 6000
_PASSING = {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED", "IO_ERROR"}


def is_passing(error: Exception) -> bool:
    """Whether an error of the store may go away by itself: no answer, too busy, locked."""
    if isinstance(error, MlflowException):
        return error.error_code in _PASSING
    return isinstance(error, requests.ConnectionError | requests.Timeout)


class StudyRuns:
    """Delivers a study's events to MLflow.

    Args:
        plan: the study.
        store: where it is tracked.

    Raises:
        MlflowException: the store refuses, or the experiment was deleted.
    """

    def __init__(self, plan: Plan, store: Store) -> None:
        self._plan = plan
        self._client = MlflowClient(store.uri)
        self._experiment = _open_experiment(self._client, plan.spec.tracking.experiment or plan.spec.name, store)
        self._children: dict[str, str] = {}
        self._open: set[str] = set()
        self._parent = self._find("lowrank.kind = 'study'") or self._create_parent()
        self._client.update_run(self._parent, status="RUNNING")

    def deliver(self, event: Event) -> None:
        """Tell MLflow one event; telling it twice does no harm."""
        match event:
            case TrialStarted(config, at):
                self._start_trial(config, at)
            case EpochsEnded(trial_id, epochs):
                log_points(
                    self._client,
                    self._children[trial_id],
                    (
                        (key, epoch.metrics[key], epoch.epoch, epoch.at)
                        for epoch in epochs
                        for key in _EPOCH_METRICS
                        if key in epoch.metrics
                    ),
                )
            case TrialEnded(outcome, at):
                self._end_trial(outcome, at)
            case Compared():
                # MLflow's model side takes another second to import, and is needed by the last event only.
                from lowrank_tune.tracking.comparison import log_comparison

                log_comparison(self._client, self._parent, self._children, event)
            case StudyEnded(status, at):
                self._end_study(status, at)

    def _find(self, condition: str) -> str | None:
        """The run of this study whose tags satisfy `condition`, `name = 'value'`."""
        name, _, value = condition.partition(" = ")
        query = f"tags.`lowrank.study_id` = '{self._plan.study_id}' AND tags.`{name}` = {value}"
        found = self._client.search_runs([self._experiment], query, max_results=1)
        return str(found[0].info.run_id) if found else None

    def _create_parent(self) -> str:
        plan, spec = self._plan, self._plan.spec
        tags = {
            "lowrank.kind": "study",
            "lowrank.study_id": plan.study_id,
            "lowrank.spec_hash": plan.spec_hash,
        }
        # MLflow may be reached only now, when trials have begun.
        started = int(plan.started.timestamp() * 1000)
        run = self._client.create_run(self._experiment, start_time=started, tags=tags, run_name=plan.study_id)
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
        self._log_params(run.info.run_id, params)
        return str(run.info.run_id)

    def _start_trial(self, config: TrialConfig, at: int) -> None:
        run_id = self._children.get(config.trial_id) or self._find(f"lowrank.trial_id = '{config.trial_id}'")
        if run_id is None:
            tags = {
                "lowrank.kind": "confirmation" if config.confirms else "trial",
                "lowrank.study_id": self._plan.study_id,
                "lowrank.trial_id": config.trial_id,
                "mlflow.parentRunId": self._parent,
            }
            if config.confirms:
                tags["lowrank.confirms"] = config.confirms
            run = self._client.create_run(self._experiment, start_time=at, tags=tags, run_name=config.trial_id)
            run_id = str(run.info.run_id)
        else:
            self._client.update_run(run_id, status="RUNNING")
        self._children[config.trial_id] = run_id
        self._open.add(run_id)
        params = {
            "family": config.family,
            "rank": config.rank,
            "lr": config.lr,
            "weight_decay": config.weight_decay,
            "batch_size": config.batch_size,
            "seed": config.seed,
            **config.family_params,
        }
        self._log_params(run_id, params)

    def _end_trial(self, outcome: TrialOutcome, at: int) -> None:
        if outcome.config.trial_id not in self._children:
            self._start_trial(outcome.config, at)
        run_id = self._children[outcome.config.trial_id]
        best = {f"best_{key}": value for key, value in outcome.best.items()}
        if outcome.best_epoch:
            best["best_epoch"] = outcome.best_epoch
        log_points(self._client, run_id, ((key, value, outcome.epochs, at) for key, value in best.items()))
        tags: dict[str, str] = {"lowrank.stopped_by": outcome.stopped_by}
        if outcome.reason:
            tags["lowrank.reason"] = outcome.reason
        self._client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        status = "FAILED" if outcome.status == "failed" else "FINISHED"
        self._client.set_terminated(run_id, status=status, end_time=at)
        self._open.discard(run_id)

    def _end_study(self, status: RunStatus, at: int) -> None:
        for run_id in sorted(self._open):
            self._client.set_terminated(run_id, status="KILLED", end_time=at)
        self._open.clear()
        self._client.set_terminated(self._parent, status=status, end_time=at)

    def _log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        entries = [Param(key, str(value)[:_PARAM_LENGTH]) for key, value in params.items()]
        self._client.log_batch(run_id, params=entries)


def _open_experiment(client: MlflowClient, name: str, store: Store) -> str:
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        location = (store.artifacts / quote(name, safe="")).as_uri() if store.artifacts else None
        return str(client.create_experiment(name, location, tags={_KIND_TAG: _KIND}))
    if experiment.lifecycle_stage != "active":
        raise TrackingError(
            f"MLflow experiment {name} was deleted from {store.shown}; name another in tracking.experiment, or "
            f"restore it with `mlflow experiments restore --experiment-id {experiment.experiment_id}`"
        )
    if experiment.tags.get(_KIND_TAG) != _KIND:
        client.set_experiment_tag(experiment.experiment_id, _KIND_TAG, _KIND)
    return str(experiment.experiment_id)
