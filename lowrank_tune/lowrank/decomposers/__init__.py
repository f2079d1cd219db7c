"""Trained decomposers, one file a family."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lowrank_tune.errors import InputError
from lowrank_tune.files import write_whole
from lowrank_tune.lowrank.decomposers.base import Decomposer, Factors
from lowrank_tune.lowrank.decomposers.direct import Direct
from lowrank_tune.lowrank.decomposers.refined import Refined
from lowrank_tune.lowrank.decomposers.shared import Shared
from lowrank_tune.lowrank.decomposers.sketch import Sketch
from lowrank_tune.lowrank.linalg import stream
from lowrank_tune.records import TrialConfig

FAMILIES: Mapping[str, type[Decomposer]] = {cls.family: cls for cls in (Direct, Sketch, Refined, Shared)}


def make_decomposer(config: TrialConfig, tokens: int, dim: int, factor_DD: Tensor | None = None) -> Decomposer:
    """Make a trial's decomposer for features [tokens, dim], its weights drawn from the trial's seed.

    `factor_DD` is the answers' metric as its factor, which a trial with `metric: answers` needs.

    Raises:
        InputError: There is no such family, it takes other parameters, it has no such rank, or the metric is missing.
    """
    generator = stream(config.seed, "weights")
    model = _make(config.family, tokens, dim, config.rank, config.family_params, generator)
    if model.weight_DD is not None:
        if factor_DD is None:
            raise InputError(f"trial {config.trial_id}: there is no metric of the answers; make `metric` none")
        model.weight_DD.copy_(factor_DD)
    return model


def save_decomposer(model: Decomposer, path: Path) -> None:
    """Write a decomposer as a safetensors file; family, sizes and parameters are its metadata."""
    metadata = {
        "family": model.family,
        "tokens": str(model.tokens),
        "dim": str(model.dim),
        "rank": str(model.rank),
        "params": json.dumps(model.family_params),
    }
    weights = {name: weight.detach().cpu().contiguous() for name, weight in model.state_dict().items()}
    write_whole(path, lambda temporary: temporary.write_bytes(save(weights, metadata)))


def load_decomposer(path: Path) -> Decomposer:
    """Read what `save_decomposer` wrote, onto the CPU; an InputError where it is missing or no decomposer's."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        family, params = metadata["family"], json.loads(metadata["params"])
        tokens, dim, rank = (int(metadata[name]) for name in ("tokens", "dim", "rank"))
        model = _make(family, tokens, dim, rank, params, torch.Generator())
        model.load_state_dict(weights)
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: not a saved decomposer ({error}); name a trial's best_model.safetensors") from error
    return model


def _make(
    family: str, tokens: int, dim: int, rank: int, params: Mapping[str, Any], generator: torch.Generator
) -> Decomposer:
    if family not in FAMILIES:
        raise InputError(f"family {family}: there is none of this name; choose of {', '.join(FAMILIES)}")
    return FAMILIES[family](tokens, dim, rank, params, generator)


__all__ = ["FAMILIES", "Decomposer", "Factors", "load_decomposer", "make_decomposer", "save_decomposer"]
