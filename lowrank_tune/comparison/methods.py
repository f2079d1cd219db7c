"""The methods that a comparison measures: controls without training, and the best trained model of each kind.

N images, T tokens, D dim, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lowrank_tune.errors import InputError
from lowrank_tune.lowrank import controls
from lowrank_tune.lowrank.decomposers import Decomposer, Factors, load_decomposer
from lowrank_tune.lowrank.seeds import stream
from lowrank_tune.records import FeatureSet, TrialOutcome

CONTROLS = ("random_sketch", "pca_basis", "power_1", "randomized_svd")
"""The methods without training that a trained family is held against, beside the SVD."""


@dataclass(frozen=True, slots=True)
class Method:
    """One way to decompose, at one rank.

    Attributes:
        name: as in `comparison.json`.
        rank: R.
        decompose: features [N, T, D] to factors.
        trial_id: the trial behind it; empty for methods without training.
        confirms: the trial whose configuration this one repeats; empty for all else.
        model: what was trained; None for methods without training.
    """

    name: str
    rank: int
    decompose: Callable[[Tensor], Factors]
    trial_id: str = ""
    confirms: str = ""
    model: Decomposer | None = None


def untrained(rank: int, axes_DR: Tensor, seed: int) -> list[Method]:
    """List the methods without training at a rank, `svd_rows` among them; the SVD's own figures come from the oracle.

    Args:
        rank: R.
        axes_DR: the training split's principal axes, at least R columns.
        seed: the study's; it draws each random start, the same one for every batch.
    """

    def random_start(name: str, control: Callable[[Tensor, int, torch.Generator], Factors]) -> Method:
        return Method(name, rank, lambda x_NTD: control(x_NTD, rank, stream(seed, f"control {name} {rank}")))

    return [
        Method("svd_rows", rank, partial(controls.svd_rows, rank=rank)),
        random_start("random_sketch", controls.random_sketch),
        Method("pca_basis", rank, partial(controls.pca_basis, rank=rank, axes_DR=axes_DR)),
        random_start("power_1", controls.power_1),
        random_start("randomized_svd", controls.randomized_svd),
    ]


def trained(
    outcomes: Sequence[TrialOutcome], features: FeatureSet, objective: str, device: str
) -> tuple[list[Method], list[str]]:
    """Load the best model of each family and rank.

    Args:
        outcomes: the study's trials; pruned ones count, failed ones do not.
        features: whose shape the models must have.
        objective: what picks the best, a key of `TrialOutcome.best`.
        device: where the models go.

    Returns:
        The methods by family and rank, and a sentence for each model that could not be used; the next best of its kind
        stands in for it.
    """
    methods: list[Method] = []
    remarks: list[str] = []
    for family, rank in sorted({(trial.config.family, rank) for trial in outcomes for rank in trial.config.ranks}):
        kind = [trial for trial in outcomes if trial.config.family == family and rank in trial.config.ranks]
        for outcome in ranked(kind, objective):
            try:
                model = _load(outcome, features).to(device).eval()
            except InputError as error:
                remarks.append(f"The model of trial {outcome.config.trial_id} is left out: {error}.")
                continue
            trial_id = outcome.config.trial_id
            methods.append(Method(family, rank, partial(model, rank=rank), trial_id, model=model))
            break
    return methods, remarks


def repeated(
    confirmations: Sequence[TrialOutcome], features: FeatureSet, device: str
) -> tuple[list[Method], list[str]]:
    """Load the models that repeat a trial's configuration, each as a method with its own trial's id for a name.

    Args:
        confirmations: the repetitions; failed ones have no model.
        features: whose shape the models must have.
        device: where the models go.

    Returns:
        The methods, and a sentence for each model that could not be used.
    """
    methods: list[Method] = []
    remarks: list[str] = []
    for outcome in confirmations:
        if outcome.status == "failed" or not outcome.best_epoch:
            continue
        config = outcome.config
        try:
            model = _load(outcome, features).to(device).eval()
        except InputError as error:
            remarks.append(f"The model of repetition {config.trial_id} is left out: {error}.")
            continue
        methods += [
            Method(config.trial_id, rank, partial(model, rank=rank), config.trial_id, config.confirms)
            for rank in config.ranks
        ]
    return methods, remarks


def winners(outcomes: Sequence[TrialOutcome], objective: str) -> list[TrialOutcome]:
    """Choose the best trial of each rank, over all families; of nested ranks, the best of those that serve the same.

    Args:
        outcomes: the study's trials.
        objective: what picks the best, a key of `TrialOutcome.best`.

    Returns:
        By rising rank; a rank without a usable trial has none.
    """
    best: dict[tuple[int, ...], TrialOutcome] = {}
    for outcome in ranked(outcomes, objective):
        best.setdefault(outcome.config.ranks, outcome)
    return [best[ranks] for ranks in sorted(best)]


def ranked(outcomes: Sequence[TrialOutcome], objective: str) -> list[TrialOutcome]:
    """Sort the trials that have a model, the best by the objective first; equals in the search's order."""
    sign = -1.0 if objective == "val_token_cosine" else 1.0
    with_model = [outcome for outcome in outcomes if outcome.status != "failed" and outcome.best_epoch > 0]
    usable = [outcome for outcome in with_model if math.isfinite(outcome.best.get(objective, math.nan))]
    return sorted(usable, key=lambda outcome: (sign * outcome.best[objective], outcome.config.number))


def _load(outcome: TrialOutcome, features: FeatureSet) -> Decomposer:
    path = Path(outcome.directory) / "best_model.safetensors"
    model = load_decomposer(path)
    found = (model.family, model.rank, model.tokens, model.dim)
    wanted = (outcome.config.family, outcome.config.rank, features.tokens, features.dim)
    if found != wanted:
        raise InputError(
            f"{path}: a {found[0]} model of rank {found[1]} for [{found[2]}, {found[3]}], "
            f"not {wanted[0]} of rank {wanted[1]} for [{wanted[2]}, {wanted[3]}]"
        )
    return model
