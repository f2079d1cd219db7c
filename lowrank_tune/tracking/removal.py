"""A study's runs in MLflow are deleted as its own pages delete them, and what they kept beside the results goes."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from lowrank_tune.config.plan import Plan
from lowrank_tune.errors import TrackingError
from lowrank_tune.files import bytes_below
from lowrank_tune.tracking.database import open_database
from lowrank_tune.tracking.moved import follow_artifacts
from lowrank_tune.tracking.reach import reach_store
from lowrank_tune.tracking.store import Store
from lowrank_tune.tracking.sync import reason_of


@dataclass(frozen=True, slots=True)
class Untracked:
    """What MLflow lost.

    Attributes:
        runs: how many runs are deleted now; they can be restored, but not their files.
        bytes: what their files took, and those of models that no registry names.
        registered: versions of registered models that the study made, `NAME 3`; they stay and can be loaded.
        left: addresses of files that stay, for they lie neither beside the results nor with a server that removes them.
    """

    runs: int = 0
    bytes: int = 0
    registered: tuple[str, ...] = ()
    left: tuple[str, ...] = ()


def reach_for_removal(plan: Plan) -> Store:
    """The study's store, whose experiment may have been deleted there; errors as `reach_store`."""
    anywhere = plan.spec.tracking.model_copy(update={"experiment": "Default"})
    return reach_store(plan.spec.model_copy(update={"tracking": anywhere}), plan.results)


def remove_tracked(plan: Plan) -> Untracked:
    """Delete what MLflow holds of a study; it may be cut off at any moment, and done again.

    Raises:
        InputError: the store cannot be used.
        TrackingError: it does not answer, or refuses.
    """
    store = reach_for_removal(plan)
    if store.database and not store.database.exists():
        return Untracked()
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    open_database(store)
    follow_artifacts(store)
    client = MlflowClient(store.uri, None if plan.spec.tracking.register_as else store.uri)
    experiment = client.get_experiment_by_name(plan.spec.experiment)
    if experiment is None:
        return Untracked()
    try:
        return _remove(client, experiment.experiment_id, plan.study_id, store)
    except (MlflowException, RequestException, SQLAlchemyError) as error:
        raise TrackingError(f"tracking store {store.shown}: {reason_of(error)}") from error


def _remove(client: Any, experiment: str, study_id: str, store: Store) -> Untracked:
    from mlflow.entities import ViewType
    from mlflow.utils import get_results_from_paginated_fn

    query, all_runs = f"tags.`lowrank.study_id` = '{study_id}'", ViewType.ALL
    runs = get_results_from_paginated_fn(
        lambda size, token: client.search_runs([experiment], query, all_runs, size, None, token), 1000
    )
    trials, parents = ([run for run in runs if ("lowrank.trial_id" in run.data.tags) is told] for told in (True, False))
    freed, registered, left = 0, list[str](), list[str]()
    for run in parents:
        more, versions = _remove_models(client, experiment, run.info.run_id, store, left)
        freed, registered = freed + more, registered + versions
    # A study of which a part is left still shows what it is.
    for run in (*trials, *parents):
        freed += _remove_files(run.info.artifact_uri, store, left)
        if run.info.lifecycle_stage == "active":
            client.delete_run(run.info.run_id)
    return Untracked(len(runs), freed, tuple(registered), tuple(left))


def _remove_models(client: Any, experiment: str, run_id: str, store: Store, left: list[str]) -> tuple[int, list[str]]:
    """Delete the models of a run, but for those that are versions in a registry, which are returned."""
    from mlflow.exceptions import MlflowException
    from mlflow.utils import get_results_from_paginated_fn

    query = f"source_run_id = '{run_id}'"
    versions = client.search_model_versions(f"run_id = '{run_id}'")
    used = {version.source for version in versions} | {f"models:/{version.model_id}" for version in versions}
    try:
        models: Sequence[Any] = get_results_from_paginated_fn(
            lambda size, token: client.search_logged_models([experiment], query, None, size, None, token), 100
        )
    except MlflowException as error:
        if error.error_code != "ENDPOINT_NOT_FOUND":
            raise
        models = ()  # a server older than MLflow 3 has none
    freed = 0
    for model in models:
        if not used & {model.artifact_location, f"models:/{model.model_id}"}:
            freed += _remove_files(model.artifact_location, store, left)
            client.delete_logged_model(model.model_id)
    return freed, [f"{version.name} {version.version}" for version in versions]


def _remove_files(address: str, store: Store, left: list[str]) -> int:
    """Remove a run's or model's artifacts beside the results, or have the server that keeps them do so.

    Returns the bytes that are free here; the address of what stays is added to `left`.
    """
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
    from requests import HTTPError

    folder = Path(unquote(urlsplit(address).path)).parent  # `<experiment>/<run>/artifacts`
    if store.artifacts is not None and address.startswith("file:") and store.artifacts in folder.parents:
        freed = bytes_below(folder)
        shutil.rmtree(folder, ignore_errors=True)
        return freed
    if address.startswith("mlflow-artifacts:"):
        with suppress(HTTPError):  # the server answers, and does not remove them
            get_artifact_repository(address, store.uri).delete_artifacts()
            return 0
    left.append(address)
    return 0
