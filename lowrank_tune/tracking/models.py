"""The best model of each rank as an MLflow model of two flavours, and as versions in MLflow's model registry.

`python_function` reads `config.json` and safetensors with this package. `pytorch` is the graph that `torch.export`
traces, which needs neither this package nor unpickling: MLflow makes sure of that where it is told not to unpickle.

N images, T tokens, D dim, R rank.
"""

from __future__ import annotations

import importlib.metadata
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus, Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.models.signature import ModelSignature
from mlflow.pyfunc import save_model
from mlflow.tracking.client import MlflowClient
from mlflow.types import Schema, TensorSpec
from numpy.typing import NDArray

from lowrank_tune.lowrank.graph import write_graph
from lowrank_tune.lowrank.pretrained import ExportedModel, exported_files, load_decomposer, read_exported
from lowrank_tune.records import Comparison, ComparisonRow, FeatureSet, TrialOutcome

BEST = "best"
"""The registry's alias of the version that validation chose of all ranks."""
_TRIAL, _RANK = "lowrank.trial_id", "lowrank.rank"
# The database forgets the model_id that a version is made with.
_MODEL = "lowrank.model_id"
_ALIASED = "lowrank.aliased"
_GRAPH = "model.pt2"
"""What MLflow's pytorch flavour looks for in its folder."""


@dataclass(frozen=True, slots=True)
class _Logged:
    """A model that MLflow has, and the row that it is of."""

    row: ComparisonRow
    model: LoggedModel


def log_models(
    client: MlflowClient,
    parent: str,
    comparison: Comparison,
    trained: Sequence[TrialOutcome],
    study_dir: Path,
    register: str | None,
) -> None:
    """Log the best model of each rank, and register it; what is there already stays as it is.

    Args:
        client: the store's.
        parent: the study's run.
        comparison: what was compared.
        trained: the trials' outcomes.
        study_dir: `results/studies/<study_id>`.
        register: the registered model's name; None registers nothing.
    """
    outcomes = {outcome.config.trial_id: outcome for outcome in trained}
    run = client.get_run(parent)
    there = {(model.name, model.tags.get(_TRIAL)): model for model in _logged_models(client, run)}
    logged = []
    for row in comparison.best_of_each_rank():
        name = f"rank-{row.rank:03d}-{row.method}"
        model = there.get((name, row.trial_id))
        if model is None and row.trial_id in outcomes:
            model = _log_model(client, run, name, row, outcomes[row.trial_id], study_dir)
        if model is not None:
            logged.append(_Logged(row, model))
    if register and logged:
        _register(client, register, parent, study_dir.name, logged)


def has_models(client: MlflowClient, run: Run, best: tuple[ComparisonRow, ...], register: str | None) -> bool:
    """Whether a study's run has the best model of each rank, and the registry its versions."""
    steps = {output.step for output in run.outputs.model_outputs} if run.outputs else set()
    if not steps >= {row.rank for row in best}:
        return False
    if not register:
        return True
    wanted = {(row.trial_id, str(row.rank)) for row in best}
    models = {
        model.model_id
        for model in _logged_models(client, run)
        if (model.tags.get(_TRIAL), model.tags.get(_RANK)) in wanted
    }
    versions = _registered(client, register)
    return models <= {model_id for model_id, version in versions.items() if _ALIASED in version.tags}


def _logged_models(client: MlflowClient, run: Run) -> list[LoggedModel]:
    outputs = {output.model_id for output in run.outputs.model_outputs} if run.outputs else set()
    return [client.get_logged_model(model_id) for model_id in outputs]


def _log_model(
    client: MlflowClient, run: Run, name: str, row: ComparisonRow, outcome: TrialOutcome, study_dir: Path
) -> LoggedModel:
    config, parent = outcome.config, str(run.info.run_id)
    params = {"family": config.family, "rank": row.rank, "lr": config.lr, **config.family_params}
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / "exported"
        exported.mkdir()
        weights = Path(outcome.directory) / "best_model.safetensors"
        files = exported_files(weights, row.rank, study_dir.name, config, _features(study_dir))
        for file, data in files.items():
            (exported / file).write_bytes(data)
        # Before MLflow hears of it: a trace that fails leaves no half of a model there.
        graph = Path(folder) / _GRAPH
        write_graph(load_decomposer(exported), graph)
        entry = client.create_logged_model(
            run.info.experiment_id,
            name=name,
            source_run_id=parent,
            tags={_TRIAL: config.trial_id, _RANK: str(row.rank)},
            params={key: str(value) for key, value in params.items()},
            model_type="lowrank-decomposer",
        )
        path = Path(folder) / "model"
        _save(path, entry, parent, exported, graph)
        client.log_model_artifacts(entry.model_id, str(path))
    client.finalize_logged_model(entry.model_id, LoggedModelStatus.READY)
    client.log_outputs(parent, [LoggedModelOutput(entry.model_id, step=row.rank)])
    return entry


def _save(path: Path, entry: LoggedModel, parent: str, exported: Path, graph: Path) -> None:
    model = Model(
        artifact_path=entry.artifact_location,
        model_uuid=entry.model_id,
        model_id=entry.model_id,
        run_id=parent,
        signature=_signature(read_exported(exported)),
    )
    model.add_flavor("pytorch", model_data="pytorch", pytorch_version=str(torch.__version__), code=None)
    save_model(
        path,
        loader_module="lowrank_tune.tracking.models",
        data_path=str(exported),
        mlflow_model=model,
        pip_requirements=_requirements(),
    )
    (path / "pytorch").mkdir()
    graph.rename(path / "pytorch" / _GRAPH)


def _register(client: MlflowClient, name: str, parent: str, study_id: str, logged: list[_Logged]) -> None:
    """Make each model a version once; the aliases name the study that was registered last."""
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    there = _registered(client, name)
    best = min(logged, key=lambda entry: entry.row.chosen)
    for entry in logged:
        version = there.get(entry.model.model_id)
        if version is not None and _ALIASED in version.tags:
            continue
        tags = {"lowrank.study_id": study_id, _TRIAL: entry.row.trial_id, _RANK: str(entry.row.rank)}
        tags[_MODEL] = entry.model.model_id
        version = version or client.create_model_version(
            name,
            source=entry.model.artifact_location,
            run_id=parent,
            model_id=entry.model.model_id,
            tags=tags,
            description=f"{entry.row.method} at rank {entry.row.rank}: ρ {entry.row.residual_ratio_mean:.4g}",
        )
        for alias in [f"rank-{entry.row.rank:03d}", *([BEST] if entry is best else [])]:
            client.set_registered_model_alias(name, alias, version.version)
        # Last: a version without it is one that an interruption left before it had its aliases.
        client.set_model_version_tag(name, version.version, _ALIASED, "true")


def _registered(client: MlflowClient, name: str) -> dict[str, ModelVersion]:
    """By the model's id, the versions that a registered model has already."""
    found: dict[str, ModelVersion] = {}
    token: str | None = None
    while True:
        page = client.search_model_versions(f"name = '{name}'", max_results=1000, page_token=token)
        found |= {version.tags[_MODEL]: version for version in page if _MODEL in version.tags}
        token = page.token
        if not token:
            return found


def _features(study_dir: Path) -> FeatureSet | None:
    path = study_dir / "tune" / "features.json"
    return FeatureSet.read(path) if path.is_file() else None


def _signature(model: ExportedModel) -> ModelSignature:
    single = np.dtype("float32")
    return ModelSignature(
        inputs=Schema([TensorSpec(single, (-1, model.tokens, model.dim))]),
        outputs=Schema(
            [
                TensorSpec(single, (-1, model.tokens, model.rank), "a"),
                TensorSpec(single, (-1, model.rank, model.dim), "b"),
            ]
        ),
    )


def _requirements() -> list[str]:
    packages = ("lowrank-tune", "torch", "safetensors", "numpy")
    return [f"{package}=={importlib.metadata.version(package).partition('+')[0]}" for package in packages]


class PyfuncDecomposer:
    """A trained decomposer behind MLflow's `predict`.

    Args:
        directory: an exported model, `config.json` and `model.safetensors`.
    """

    def __init__(self, directory: Path) -> None:
        self._decomposer = load_decomposer(directory)

    @torch.no_grad()
    def predict(self, x_NTD: NDArray[np.float32], params: dict[str, Any] | None = None) -> dict[str, NDArray[Any]]:
        """Decompose images.

        Args:
            x_NTD: their features, float32 [N, T, D].
            params: taken because MLflow passes it; there are none.

        Returns:
            `a` [N, T, R] and `b` [N, R, D], float32.
        """
        factors = self._decomposer(torch.from_numpy(np.ascontiguousarray(x_NTD, dtype=np.float32)))
        return {"a": factors.a_NTR.numpy(), "b": factors.b_NRD.numpy()}


def _load_pyfunc(data_path: str) -> PyfuncDecomposer:
    return PyfuncDecomposer(Path(data_path))
