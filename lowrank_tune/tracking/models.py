"""The best model of each rank as an MLflow model, and as versions in MLflow's model registry.

Its one flavour, `python_function`, carries the mathematics along: it loads where this package is not installed, from
`config.json` and safetensors, and nothing in it is unpickled.
"""

from __future__ import annotations

import importlib.metadata
import logging
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus, Run
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.models.signature import ModelSignature
from mlflow.pyfunc import save_model
from mlflow.tracking.client import MlflowClient
from mlflow.types import Schema, TensorSpec
from mlflow.utils import get_results_from_paginated_fn

from lowrank_tune.errors import InputError
from lowrank_tune.lowrank.pretrained import write_exported
from lowrank_tune.measured import Comparison, ComparisonRow
from lowrank_tune.records import BEST_MODEL, FeatureSet, TrialOutcome

logger = logging.getLogger(__name__)

BEST = "best"
"""The registry's alias of the version that validation holds for the best of all ranks, of the study registered last."""
_TRIAL, _RANK = "lowrank.trial_id", "lowrank.rank"
_ALIASED = "lowrank.aliased"
_MODEL = "lowrank.model_id"  # the database forgets the model_id that a version is made with
_CARRIED = ("__init__.py", "errors.py", "files.py", "records.py", "lowrank")
"""Of this package, what a decomposer needs to be loaded and to compute."""
_REQUIRED = ("torch", "safetensors", "numpy")


def log_models(
    client: MlflowClient,
    parent: str,
    comparison: Comparison,
    trained: Sequence[TrialOutcome],
    study_dir: Path,
    register: str | None,
) -> bool:
    """Log the best model of each rank, and register it under a name, if there is one; what is there already stays.

    Returns:
        Whether anything was lacking.
    """
    outcomes = {outcome.config.trial_id: outcome for outcome in trained}
    run = client.get_run(parent)
    outputs = {output.model_id for output in run.outputs.model_outputs} if run.outputs else set()
    models = [client.get_logged_model(model_id) for model_id in outputs]
    there = {(model.name, model.tags.get(_TRIAL)): model for model in models}
    logged: list[tuple[ComparisonRow, LoggedModel]] = []
    lacking = False
    for row in comparison.best_of_each_rank():
        name = f"rank-{row.rank:03d}-{row.method}"
        model = there.get((name, row.trial_id))
        if model is None and row.trial_id in outcomes:
            try:
                model, lacking = _log_model(client, run, name, row, outcomes[row.trial_id], study_dir), True
            except InputError as error:  # its file is gone: what else MLflow lacks is told all the same
                logger.warning("%s is not in MLflow: %s", name, error)
        if model is not None:
            logged.append((row, model))
    if register and logged:
        # The best last: its alias is set when its version is there.
        logged.sort(key=lambda entry: entry[0].chosen, reverse=True)
        lacking |= _register(client, register, parent, study_dir.name, logged)
    return lacking


def _log_model(
    client: MlflowClient, run: Run, name: str, row: ComparisonRow, outcome: TrialOutcome, study_dir: Path
) -> LoggedModel:
    # Not by mlflow.pyfunc.log_model: it works on one global store and run, and ties the model to the run before its
    # files are there, so that one which is cut off would look whole.
    config, parent = outcome.config, str(run.info.run_id)
    params = {"family": config.family, "rank": row.rank, "lr": config.lr, **config.family_params}
    features = study_dir / "tune" / "features.json"
    with tempfile.TemporaryDirectory() as folder:
        exported, path = Path(folder) / "exported", Path(folder) / "model"
        weights = Path(outcome.directory) / BEST_MODEL
        trained_on = FeatureSet.read(features) if features.is_file() else None
        model = write_exported(exported, weights, row.rank, study_dir.name, config, trained_on)
        entry = client.create_logged_model(
            run.info.experiment_id,
            name=name,
            source_run_id=parent,
            tags={_TRIAL: config.trial_id, _RANK: str(row.rank)},
            params={key: str(value) for key, value in params.items()},
            model_type="lowrank-decomposer",
        )
        save_model(
            path,
            loader_module="lowrank_tune.lowrank.pretrained",
            data_path=str(exported),
            code_paths=[str(_carried(Path(folder)))],
            mlflow_model=Model(
                artifact_path=entry.artifact_location,
                model_uuid=entry.model_id,
                model_id=entry.model_id,
                run_id=parent,
                signature=ModelSignature(
                    inputs=Schema([_images(model.tokens, model.dim)]),
                    outputs=Schema([_images(model.tokens, row.rank, name="a"), _images(row.rank, model.dim, name="b")]),
                ),
            ),
            pip_requirements=[f"{each}=={importlib.metadata.version(each).partition('+')[0]}" for each in _REQUIRED],
        )
        client.log_model_artifacts(entry.model_id, str(path))
    client.finalize_logged_model(entry.model_id, LoggedModelStatus.READY)
    client.log_outputs(parent, [LoggedModelOutput(entry.model_id, step=row.rank)])
    return entry


def _images(*shape: int, name: str | None = None) -> Any:
    return TensorSpec(np.dtype("float32"), (-1, *shape), name)


def _carried(folder: Path) -> Path:
    """The part of this package that goes with a model, copied under the package's own name."""
    here, package = Path(__file__).parents[1], folder / "lowrank_tune"
    package.mkdir()
    for name in _CARRIED:
        if (here / name).is_dir():
            shutil.copytree(here / name, package / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(here / name, package)
    with (package / "__init__.py").open("a", encoding="utf-8") as file:
        # Where the package is installed, and the model is loaded first, the rest of it is still found.
        file.write('\n__path__ = __import__("pkgutil").extend_path(__path__, __name__)\n')
    return package


def _register(
    client: MlflowClient, name: str, parent: str, study_id: str, logged: Sequence[tuple[ComparisonRow, LoggedModel]]
) -> bool:
    """Make each model a version once; the alias goes to the last one, when it is new or nobody has it."""
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    found = get_results_from_paginated_fn(
        lambda size, token: client.search_model_versions(f"name = '{name}'", size, page_token=token), 1000
    )
    there = {version.tags[_MODEL]: version for version in found if _MODEL in version.tags}
    new = {model.model_id for _, model in logged} - there.keys()
    for row, model in logged:
        if model.model_id in new:
            ratio = row.residual_ratio
            told = f"token cosine {row.token_cosine_mean:.4f}" if ratio is None else f"ρ {ratio:.4g}"
            tags = {"lowrank.study_id": study_id, _TRIAL: row.trial_id, _RANK: str(row.rank), _MODEL: model.model_id}
            there[model.model_id] = client.create_model_version(
                name,
                source=model.artifact_location,
                run_id=parent,
                model_id=model.model_id,
                tags=tags,
                description=f"{row.method} at rank {row.rank}: test {told}",
            )
    best = there[logged[-1][1].model_id]
    aliased = client.get_registered_model(name).aliases.get(BEST, 0)
    if aliased and _ALIASED in best.tags:
        return bool(new)
    if int(aliased) < int(best.version):
        client.set_registered_model_alias(name, BEST, best.version)
    # Last: an alias is moved once, and stays where a person moves it to.
    client.set_model_version_tag(name, best.version, _ALIASED, "true")
    return True
