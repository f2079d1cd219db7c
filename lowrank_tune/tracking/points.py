"""Figures on their way into MLflow."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import groupby

from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.tracking.client import MlflowClient

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
