"""Figures on their way into MLflow."""

from __future__ import annotations

import math
from collections.abc import Iterable

from mlflow.entities import Metric
from mlflow.tracking.client import MlflowClient

_METRICS_A_BATCH = 1000


def log_points(client: MlflowClient, run_id: str, points: Iterable[tuple[str, float, int, int]]) -> None:
    """Log (key, value, step, milliseconds) points, leaving out values that are no numbers."""
    metrics = [Metric(key, value, at, step) for key, value, step, at in points if math.isfinite(value)]
    for start in range(0, len(metrics), _METRICS_A_BATCH):
        client.log_batch(run_id, metrics=metrics[start : start + _METRICS_A_BATCH])
