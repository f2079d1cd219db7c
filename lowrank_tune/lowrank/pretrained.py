"""A trained decomposer outside its study: a folder with `config.json` and `model.safetensors`, as the hub has models.

Needs neither Ray nor MLflow.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lowrank_tune.errors import InputError
from lowrank_tune.files import file_sha256, read_json, write_json
from lowrank_tune.lowrank.decomposers import Decomposer
from lowrank_tune.lowrank.decomposers import load_decomposer as load_weights
from lowrank_tune.records import FeatureSet, TrialConfig

MODEL_TYPE = "lowrank_decomposer"
FORMAT = 1
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
_FEATURES = ("fingerprint", "encoder", "weights", "dtype")
_TRAINING = ("trial_id", "lr", "weight_decay", "batch_size", "epochs", "patience", "seed")
_REMEDY = "export it again with `lowrank-tune export`"


@dataclass(frozen=True, slots=True)
class ExportedModel:
    """What an exported folder's config.json says, beside `model_type` and the layout's version, `format`."""

    directory: Path  # the folder, the one field that is not in the file
    family: str
    family_params: dict[str, Any]  # what its family alone has
    tokens: int  # T and D of the features that it takes
    dim: int
    rank: int  # R that it gives when not asked for another
    ranks: tuple[int, ...]  # those that it was trained for, rising
    max_rank: int  # the one that its weights were made for
    dtype: str  # the weights'
    weights_sha256: str  # of model.safetensors
    features: dict[str, Any]  # what it was trained on
    training: dict[str, Any]  # and how

    @property
    def fingerprint(self) -> str:
        """16 hex digits of the weights' digest, which covers family, sizes and parameters."""
        return self.weights_sha256[:16]

    def check_rank(self, rank: int | None) -> int:
        """Return the rank to compute, the model's own when None; an InputError where it was not trained for it."""
        if rank is None:
            return self.rank
        if rank not in self.ranks:
            raise InputError(
                f"rank {rank}: {self.directory} was trained for {', '.join(map(str, self.ranks))}; choose among them"
            )
        return rank


def write_exported(
    directory: Path, weights: Path, rank: int, study_id: str, trained: TrialConfig, features: FeatureSet | None
) -> ExportedModel:
    """Write a model's folder, which is made.

    Args:
        directory: the folder.
        weights: a trial's `best_model.safetensors`, taken as it is; an InputError where it is no decomposer's.
        rank: what the model gives when not asked for another.
        study_id: the study that it comes from.
        trained: the trial's configuration.
        features: what it was trained on, where that is still known.
    """
    decomposer = load_weights(weights)
    directory.mkdir()
    shutil.copyfile(weights, directory / WEIGHTS)
    training = {name: getattr(trained, name) for name in _TRAINING}
    model = ExportedModel(
        directory,
        family=decomposer.family,
        family_params=dict(decomposer.family_params),
        tokens=decomposer.tokens,
        dim=decomposer.dim,
        rank=rank,
        ranks=tuple(sorted(trained.ranks)),
        max_rank=decomposer.rank,
        dtype=str(next(iter(decomposer.state_dict().values())).dtype).removeprefix("torch."),
        weights_sha256=file_sha256(directory / WEIGHTS),
        features={name: getattr(features, name) for name in _FEATURES} if features else {},
        training={"study_id": study_id, **training, **trained.family_params},
    )
    config = {"model_type": MODEL_TYPE, "format": FORMAT, **asdict(model)}
    del config["directory"]
    write_json(directory / CONFIG, config, indent=2)
    return model


def read_exported(directory: str | Path) -> ExportedModel:
    """Read what an exported folder says of itself, without its weights; an InputError where it is none of ours."""
    path = Path(os.path.expanduser(directory)).absolute() / CONFIG
    try:
        about = read_json(path)
    except FileNotFoundError:
        raise InputError(
            f"{path.parent}: no exported model, it has no {CONFIG}; `lowrank-tune export` writes one"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); {_REMEDY}") from error
    found = about.get("model_type") if isinstance(about, dict) else None
    if found != MODEL_TYPE:
        raise InputError(f"{path}: model_type is {found!r}, not {MODEL_TYPE!r}; name a folder that `export` wrote")
    if about.get("format") != FORMAT:
        raise InputError(f"{path}: has format {about.get('format')!r}, this program reads {FORMAT}; {_REMEDY}")
    try:
        said = {each.name: about[each.name] for each in fields(ExportedModel) if each.name != "directory"}
        said |= {name: int(about[name]) for name in ("tokens", "dim", "rank", "max_rank")}
        return ExportedModel(path.parent, **said | {"ranks": tuple(sorted(map(int, about["ranks"])))})
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: is damaged ({error!r}); {_REMEDY}") from error


def load_decomposer(directory: str | Path) -> Decomposer:
    """Load what `lowrank-tune export` wrote, on the CPU, in evaluation mode.

        model = load_decomposer(DIR)
        a, b = model(x)  # float32 [N, T, D] to [N, T, R] and [N, R, D], X ≈ a @ b

    `model(x, rank=16)` asks for another rank where it was trained for several.

    Raises:
        InputError: the folder is no exported model, or its weights are damaged or another model's.
    """
    model = read_exported(directory)
    weights = model.directory / WEIGHTS
    try:
        digest = file_sha256(weights)
    except OSError as error:
        raise InputError(f"{weights}: cannot be read ({error.strerror}); {_REMEDY}") from error
    if digest != model.weights_sha256:
        raise InputError(f"{weights}: is damaged or another model's, its digest is not {CONFIG}'s; {_REMEDY}")
    decomposer = load_weights(weights)
    found = (decomposer.family, decomposer.tokens, decomposer.dim, decomposer.rank)
    if found != (model.family, model.tokens, model.dim, model.max_rank):
        raise InputError(f"{model.directory / CONFIG}: does not describe the weights beside it; {_REMEDY}")
    decomposer.default_rank = decomposer.check_rank(model.rank)
    return decomposer.eval()


class PyfuncDecomposer:
    """An exported model behind MLflow's `predict`."""

    def __init__(self, data_path: str) -> None:
        self._decomposer = load_decomposer(data_path)

    @torch.no_grad()
    def predict(self, x_NTD: NDArray[np.float32], params: dict[str, Any] | None = None) -> dict[str, NDArray[Any]]:
        """Decompose images [N, T, D] into `a` [N, T, R] and `b` [N, R, D], all float32; there are no `params`."""
        factors = self._decomposer(torch.from_numpy(np.ascontiguousarray(x_NTD, dtype=np.float32)))
        return {"a": factors.a_NTR.numpy(), "b": factors.b_NRD.numpy()}


_load_pyfunc = PyfuncDecomposer  # the name that MLflow calls in a `loader_module`
