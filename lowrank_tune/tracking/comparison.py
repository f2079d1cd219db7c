"""The post-study figures, pictures and models of a study, laid into its parent run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

from mlflow.entities import Run
from mlflow.tracking.client import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS

from lowrank_tune.records import Comparison, ComparisonRow
from lowrank_tune.tracking.events import Compared
from lowrank_tune.tracking.models import has_models, log_models
from lowrank_tune.tracking.points import known_points, log_points

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
