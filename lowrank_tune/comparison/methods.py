"""The methods that a comparison measures: controls without training, and the best trained model of each kind.

N images, T tokens, D dim, R rank.
"""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from lowrank_tune.errors import InputError
from lowrank_tune.lowrank import baselines
from lowrank_tune.lowrank.data import FeatureMatrix
from lowrank_tune.lowrank.decomposers import Decomposer, Factors, load_decomposer
from lowrank_tune.lowrank.linalg import stream
from lowrank_tune.lowrank.metrics import Figures, measure, residual_ratio
from lowrank_tune.lowrank.svd import Optimum, measure_optimum
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
        Method("svd_rows", rank, partial(baselines.svd_rows, rank=rank)),
        random_start("random_sketch", baselines.random_sketch),
        Method("pca_basis", rank, partial(baselines.pca_basis, rank=rank, axes_DR=axes_DR)),
        random_start("power_1", baselines.power_1),
        random_start("randomized_svd", baselines.randomized_svd),
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


BATCH_NUMBERS = 2**23
"""Numbers of features in memory at a time: 16 images of [256, 2048]."""

Kind = tuple[str, int]
"""A method's name and rank."""


def score(
    data: FeatureMatrix, test: Sequence[int], ranks: Sequence[int], methods: Sequence[Method], device: str
) -> tuple[pd.DataFrame, list[str]]:
    """Measure the SVD at every rank, from one eigendecomposition an image, and every method, in float64.

    Args:
        data: the features.
        test: indices of the images that judge.
        ranks: at which ranks.
        methods: beside the SVD, each at one of the ranks; one a (name, rank).
        device: where the methods run.

    Returns:
        A row a (method, rank, image): `method`, `rank`, `key`, `index` (the position in `test`), `token_cosine`,
        `flat_cosine`, `mse`, `residual` and `residual_ratio`, every number finite; and a sentence for each method that
        broke on an image, none of whose rows are there, and for images of zeros, on which no ratio means anything.

    Raises:
        CacheError: features cannot be read.
    """
    frames: list[pd.DataFrame] = []
    broken: dict[Kind, str] = {}
    measured = 0
    for places, x_NTD, optimum in _batches(data, test):
        keys = [data.features.rows[test[place]].key for place in places]
        images = pd.DataFrame({"key": keys, "index": places})
        measured += len(images)
        x_NTD = x_NTD.to(device)
        exact_NTD = x_NTD.double()
        best = {rank: optimum.at(rank) for rank in ranks}
        figures: dict[Kind, Figures] = {("svd", rank): best[rank] for rank in ranks}
        for method in methods:
            kind = (method.name, method.rank)
            if kind not in broken:
                result = _figures(method, x_NTD, exact_NTD)
                if isinstance(result, str):
                    broken[kind] = result
                else:
                    figures[kind] = result
        for kind, of_kind in figures.items():
            ratio_N = residual_ratio(of_kind.residual_N, best[kind[1]].residual_N, optimum.energy_N)
            frames.append(_frame(kind, images, of_kind, ratio_N))
    remarks = [f"{name} at rank {rank} is left out: {reason}" for (name, rank), reason in broken.items()]
    if measured < len(test):
        remarks.append(f"{len(test) - measured} of {len(test)} test images hold nothing but zeros and are left out")
    if not frames:
        return pd.DataFrame(), remarks
    table = pd.concat(frames, ignore_index=True)
    whole = [kind not in broken for kind in zip(table["method"], table["rank"], strict=True)]
    return table[whole].reset_index(drop=True), remarks


def _batches(data: FeatureMatrix, test: Sequence[int]) -> Iterator[tuple[list[int], Tensor, Optimum]]:
    """Yield the positions, features and optimum of the test images that are not all zeros."""
    size = max(1, BATCH_NUMBERS // (data.tokens * data.dim))
    for start in range(0, len(test), size):
        x_NTD = data.load(test[start : start + size])
        seen_N = x_NTD.flatten(1).any(dim=1)
        if seen_N.any():
            x_NTD = x_NTD[seen_N]
            yield (start + np.flatnonzero(seen_N.numpy())).tolist(), x_NTD, measure_optimum([x_NTD])


def _figures(method: Method, x_NTD: Tensor, exact_NTD: Tensor) -> Figures | str:
    """Measure a method on a batch, given in float32 and in float64; return why not, when it breaks on it."""
    try:
        with torch.inference_mode():
            figures = Figures(*(figure_N.cpu() for figure_N in measure(exact_NTD, *method.decompose(x_NTD))))
    except RuntimeError as error:  # torch raises its linear algebra's and its memory's errors as this
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    finite = all(bool(figure_N.isfinite().all()) for figure_N in figures)
    return figures if finite else "its factors are not finite on every test image"


def _frame(kind: Kind, images: pd.DataFrame, figures: Figures, ratio_N: Tensor) -> pd.DataFrame:
    columns = {
        "token_cosine": figures.token_cosine_N,
        "flat_cosine": figures.flat_cosine_N,
        "mse": figures.mse_N,
        "residual": figures.residual_N,
        "residual_ratio": ratio_N,
    }
    numbers = {name: values_N.numpy() for name, values_N in columns.items()}
    return images.assign(method=kind[0], rank=kind[1], **numbers)[["method", "rank", "key", "index", *numbers]]


BATCH = {"cpu": 8, "cuda": 64}
"""Images in the batch that is timed; a GPU needs many to be busy."""
SECONDS = 0.3
"""What a method's timing takes at most, unless a single run of the batch takes longer."""
REPEATS = 9
"""Runs of the batch at most; their median counts."""


def images_per_second(decompose: Callable[[Tensor], object], x_NTD: Tensor) -> float:
    """Time a method on a batch, on the batch's device; on the CPU, with one thread.

    Args:
        decompose: what is timed.
        x_NTD: features [N, T, D].

    Returns:
        N over the median run's seconds, after a warm-up on one image.
    """
    with _one_thread(), torch.inference_mode():
        decompose(x_NTD[:1])
        runs: list[float] = []
        while not runs or (len(runs) < REPEATS and sum(runs) + runs[-1] <= SECONDS):
            _synchronise(x_NTD)
            start = time.perf_counter()
            decompose(x_NTD)
            _synchronise(x_NTD)
            runs.append(time.perf_counter() - start)
    return len(x_NTD) / statistics.median(runs)


def device_words(device: str) -> str:
    """Name what speeds are measured on, for people: `one CPU thread (AMD EPYC 7763)`, `NVIDIA H200`."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"one CPU thread ({_processor()})"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _synchronise(x_NTD: Tensor) -> None:
    if x_NTD.is_cuda:
        torch.cuda.synchronize(x_NTD.device)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # numpy has a BLAS, and threads, of its own.
        with threadpool_limits(1, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(threads)
