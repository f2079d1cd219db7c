"""The MLflow experiment that a study belongs to: made, and opened as model training, on a view for comparing trials."""

from __future__ import annotations

import time
from typing import Any
from urllib.parse import quote

from lowrank_tune.tracking.reach import deleted
from lowrank_tune.tracking.store import Store
from lowrank_tune.tracking.view import TAG, prepared_view

# The 3.17 UI opens an experiment without this as "GenAI", without metric columns.
_KIND_TAG, _KIND = "mlflow.experimentKind", "custom_model_development"


def open_experiment(client: Any, name: str, store: Store) -> str:
    """Return the experiment's id; it is made where there is none of this name.

    Raises:
        InputError: it was deleted.
    """
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        # No `%20` in it: MLflow loads no model from a path with one.
        folder = quote(name, safe="").replace("%", "=")
        location = (store.artifacts / folder).as_uri() if store.artifacts else None
        try:
            tags = {_KIND_TAG: _KIND, TAG: prepared_view(time.time_ns() // 1_000_000)}
            return str(client.create_experiment(name, location, tags=tags))
        except MlflowException as error:
            # Another study of this name began at the same moment, or the answer to an earlier attempt was lost.
            experiment = client.get_experiment_by_name(name)
            if experiment is None or error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
    if experiment.lifecycle_stage != "active":
        raise deleted(store, name, experiment.experiment_id)
    if experiment.tags.get(_KIND_TAG) != _KIND:
        client.set_experiment_tag(experiment.experiment_id, _KIND_TAG, _KIND)
    if TAG not in experiment.tags:  # one that a person has changed stays
        client.set_experiment_tag(experiment.experiment_id, TAG, prepared_view(experiment.creation_time or 0))
    return str(experiment.experiment_id)
