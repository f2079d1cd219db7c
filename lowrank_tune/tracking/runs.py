"""A study's runs in MLflow: one parent, one child a trial or repetition, each found again before it is made.

Only the tracker's thread comes here: importing MLflow takes seconds, and sqlite wants one writer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any
from urllib.parse import quote

import requests
from mlflow.entities import Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking.client import MlflowClient
from sqlalchemy.exc import OperationalError

from lowrank_tune.errors import TrackingError, redact
from lowrank_tune.records import TrialConfig, TrialOutcome
from lowrank_tune.spec.features import TensorSource
from lowrank_tune.spec.plan import Plan
from lowrank_tune.tracking.events import (
    Compared,
    Epoch,
    EpochsEnded,
    Event,
    RunStatus,
    StudyEnded,
    TrialEnded,
    TrialStarted,
)
from lowrank_tune.tracking.points import known_points, log_points
from lowrank_tune.tracking.store import Store

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
                from lowrank_tune.tracking.comparison import log_comparison

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
