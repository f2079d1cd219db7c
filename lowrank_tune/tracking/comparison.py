"""The post-study figures, pictures and models of a study, laid into its parent run."""

from __future__ import annotations

import importlib.metadata
import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

import numpy as np
from mlflow.entities import LoggedModelOutput, LoggedModelStatus, Run
from mlflow.models import Model
from mlflow.models.signature import ModelSignature
from mlflow.pyfunc import save_model
from mlflow.tracking.client import MlflowClient
from mlflow.types import Schema, TensorSpec
from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS

from lowrank_tune.lowrank.decomposers import load_decomposer
from lowrank_tune.records import Comparison, ComparisonRow, TrialOutcome
from lowrank_tune.tracking.events import Compared
from lowrank_tune.tracking.points import known_points, log_points

_FILES = ("report.html", "study.yaml", "study.resolved.yaml", "comparison.json", "per_image.parquet", "pareto.json")
_TABLE = "comparison_table.json"
_MODEL_FILE = "best_model.safetensors"


def log_comparison(client: MlflowClient, parent: str, children: Mapping[str, str], event: Compared) -> None:
    """Log the rank curves, the table, the files and the best model of each rank; again, where some are there already.

    Args:
        client: the store's.
        parent: the study's run.
        children: the trials' and repetitions' runs by trial id; each gets its loss curves.
        event: what was compared, and the study's directory.
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
    _log_models(client, parent, comparison, event.outcomes)


def has_comparison(client: MlflowClient, run: Run, comparison: Comparison) -> bool:
    """Whether a study's run has all of a comparison already."""
    known = _known(client, run)
    if any((key, rank, value) not in known for key, value, rank in _points(comparison)):
        return False
    # The models come last.
    models = run.outputs.model_outputs if run.outputs else []
    return {model.step for model in models} >= {row.rank for row in comparison.best_of_each_rank()}


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


def _log_models(client: MlflowClient, parent: str, comparison: Comparison, outcomes: tuple[TrialOutcome, ...]) -> None:
    by_id = {outcome.config.trial_id: outcome for outcome in outcomes}
    run = client.get_run(parent)
    logged = {output.model_id for output in run.outputs.model_outputs} if run.outputs else set()
    models = [client.get_logged_model(model_id) for model_id in logged]
    names = {(model.name, model.tags.get("lowrank.trial_id")) for model in models}
    for row in comparison.best_of_each_rank():
        name = f"rank-{row.rank:03d}-{row.method}"
        if row.trial_id in by_id and (name, row.trial_id) not in names:
            _log_model(client, parent, run.info.experiment_id, name, row, by_id[row.trial_id])


def _log_model(
    client: MlflowClient, parent: str, experiment: str, name: str, row: ComparisonRow, outcome: TrialOutcome
) -> None:
    weights = Path(outcome.directory) / _MODEL_FILE
    config = outcome.config
    decomposer = load_decomposer(weights)
    tokens, dim = decomposer.tokens, decomposer.dim
    params = {"family": config.family, "rank": config.rank, "lr": config.lr, **config.family_params}
    entry = client.create_logged_model(
        experiment,
        name=name,
        source_run_id=parent,
        tags={"lowrank.trial_id": config.trial_id},
        params={key: str(value) for key, value in params.items()},
        model_type="lowrank-decomposer",
    )
    model = Model(
        artifact_path=entry.artifact_location,
        model_uuid=entry.model_id,
        model_id=entry.model_id,
        run_id=parent,
        signature=_signature(tokens, dim),
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        save_model(
            path,
            loader_module="lowrank_tune.tracking.pyfunc_model",
            data_path=str(weights),
            mlflow_model=model,
            pip_requirements=_requirements(),
        )
        client.log_model_artifacts(entry.model_id, str(path))
    client.finalize_logged_model(entry.model_id, LoggedModelStatus.READY)
    client.log_outputs(parent, [LoggedModelOutput(entry.model_id, step=row.rank)])


def _signature(tokens: int, dim: int) -> ModelSignature:
    single = np.dtype("float32")
    # A model of nested ranks gives its highest, whichever rank it is logged for.
    return ModelSignature(
        inputs=Schema([TensorSpec(single, (-1, tokens, dim))]),
        outputs=Schema([TensorSpec(single, (-1, tokens, -1), "a"), TensorSpec(single, (-1, -1, dim), "b")]),
    )


def _requirements() -> list[str]:
    packages = ("lowrank-tune", "torch", "safetensors", "numpy")
    return [f"{package}=={importlib.metadata.version(package).partition('+')[0]}" for package in packages]
