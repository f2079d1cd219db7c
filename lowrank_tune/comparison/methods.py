"""The methods that a comparison measures: controls without training, and the best trained model of each kind.

N images, T tokens, D dim, R rank.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from lowrank_tune.comparison.choice import Kind, ranked
from lowrank_tune.errors import InputError
from lowrank_tune.lowrank import baselines
from lowrank_tune.lowrank.data import NUMBERS_AT_ONCE, FeatureMatrix, batches_on, evenly
from lowrank_tune.lowrank.decomposers import Decomposer, Factors, load_decomposer, make_decomposer
from lowrank_tune.lowrank.linalg import principal_axes, stream
from lowrank_tune.lowrank.metrics import Figures, measure, residual_ratio
from lowrank_tune.lowrank.svd import Optimum
from lowrank_tune.lowrank.trainer import initialise
from lowrank_tune.lowrank.weighted import WeightedOptimum, weighted_residual
from lowrank_tune.records import BEST_MODEL, FeatureSet, Split, TrialOutcome

PCA_IMAGES = 512
"""Training images that `pca_basis` is fitted on, at most, spread evenly over the split."""
PCA_BATCH = 16


@dataclass(frozen=True, slots=True)
class Method:
    """One way to decompose features [N, T, D] at one rank, by the name that it has in `comparison.json`."""

    name: str
    rank: int
    decompose: Callable[[Tensor], Factors]
    trial_id: str = ""  # the trial behind it; empty for methods without training
    confirms: str = ""  # the trial whose configuration this one repeats
    model: Decomposer | None = None

    @property
    def kind(self) -> Kind:
        """Its name and rank."""
        return self.name, self.rank


def training_axes(data: FeatureMatrix, split: Split, count: int, seed: int) -> Tensor:
    """The principal axes of the training split's tokens, [D, count]."""
    images = [split.train[place] for place in evenly(len(split.train), PCA_IMAGES)]
    return principal_axes(data.batches(images, PCA_BATCH), count, stream(seed, "control pca_basis"))


@dataclass(frozen=True, slots=True)
class Metric:
    """The metric W by which the language model's answers move, and the least error in it of some images."""

    factor_DD: Tensor  # F with F Fᵀ = W
    optimum: WeightedOptimum


def untrained(rank: int, axes_DR: Tensor, seed: int) -> list[Method]:
    """List the SVD of normalised rows and the controls at a rank; the SVD's own figures come from the optimum.

    `axes_DR` are the training split's principal axes, at least `rank` of them; the seed draws each random start, the
    same one for every batch.
    """

    def random_start(name: str) -> Method:
        control = getattr(baselines, name)
        return Method(name, rank, lambda x_NTD: control(x_NTD, rank, stream(seed, f"control {name} {rank}")))

    return [
        Method("svd_rows", rank, partial(baselines.svd_rows, rank=rank)),
        random_start("random_sketch"),
        Method("pca_basis", rank, partial(baselines.pca_basis, rank=rank, axes_DR=axes_DR)),
        random_start("power_1"),
        random_start("randomized_svd"),
        random_start("gram_eigh"),
    ]


def before_training(
    methods: Iterable[Method],
    outcomes: Iterable[TrialOutcome],
    data: FeatureMatrix,
    split: Split,
    device: str,
    factor_DD: Tensor | None = None,
) -> dict[Kind, Method]:
    """Make the model that each trained one was before its first epoch, each by a name of its own.

    `factor_DD` is the metric of the answers, which those that were trained in it need.
    """
    configs = {outcome.config.trial_id: outcome.config for outcome in outcomes}
    models: dict[str, Decomposer] = {}
    starts: dict[Kind, Method] = {}
    for method in methods:
        config, name = configs[method.trial_id], f"{method.trial_id} before training"
        if name not in models:
            model = make_decomposer(config, data.tokens, data.dim, factor_DD).to(device).eval()
            initialise(model, config, batches_on(data, device).load, split.train, config.batch_size)
            models[name] = model
        model = models[name]
        starts[method.kind] = Method(name, method.rank, partial(model, rank=method.rank), model=model)
    return starts


def trained(
    outcomes: Sequence[TrialOutcome],
    confirmations: Iterable[TrialOutcome],
    features: FeatureSet,
    objective: str,
    device: str,
) -> tuple[list[Method], list[Method], list[str]]:
    """Load the best model of each family, metric and rank, and those that repeat a trial's configuration.

    Returns:
        The methods; the repetitions, each named by its own trial's id; and a sentence for each model that could not be
        used: the next best of its kind stands in for it.
    """
    remarks: list[str] = []

    def load(outcome: TrialOutcome, what: str) -> Decomposer | None:
        config, path = outcome.config, Path(outcome.directory) / BEST_MODEL
        wanted = (config.family, config.rank, features.tokens, features.dim)
        try:
            model = load_decomposer(path)
            found = (model.family, model.rank, model.tokens, model.dim)
            if found != wanted:
                raise InputError(
                    f"{path}: a {found[0]} model of rank {found[1]} for [{found[2]}, {found[3]}], "
                    f"not {wanted[0]} of rank {wanted[1]} for [{wanted[2]}, {wanted[3]}]"
                )
        except InputError as error:
            remarks.append(f"The model of {what} {config.trial_id} is left out: {error}.")
            return None
        return model.to(device).eval()

    methods: list[Method] = []
    for name, rank in sorted({(trial.config.method, rank) for trial in outcomes for rank in trial.config.ranks}):
        kind = [trial for trial in outcomes if trial.config.method == name and rank in trial.config.ranks]
        for outcome in ranked(kind, objective):
            if model := load(outcome, "trial"):
                decompose = partial(model, rank=rank)
                methods.append(Method(name, rank, decompose, outcome.config.trial_id, model=model))
                break
    repeats: list[Method] = []
    for outcome in confirmations:
        config = outcome.config
        if outcome.status != "failed" and outcome.best_epoch and (model := load(outcome, "repetition")):
            name = config.trial_id
            repeats += [Method(name, rank, partial(model, rank=rank), name, config.confirms) for rank in config.ranks]
    return methods, repeats, remarks


def batches(data: FeatureMatrix, images: Sequence[int], optimum: Optimum) -> Iterator[tuple[list[int], Tensor]]:
    """Yield the positions and features of the images that are not all zeros."""
    seen = np.flatnonzero(optimum.energy_N.numpy() > 0).tolist()
    size = max(1, NUMBERS_AT_ONCE // (data.tokens * data.dim))
    for start in range(0, len(seen), size):
        places = seen[start : start + size]
        yield places, data.load([images[place] for place in places])


def score(
    data: FeatureMatrix,
    images: Sequence[int],
    optimum: Optimum,
    ranks: Sequence[int],
    methods: Sequence[Method],
    device: str,
    metric: Metric | None = None,
) -> tuple[pd.DataFrame, list[str]]:
    """Measure every method on `images`, in float64, beside the SVD, whose figures `optimum` has, at each of the ranks.

    At other ranks, above the images' own, methods have no ρ. With a metric the SVD that is optimal in it stands there,
    too, as `svd_weighted`.

    Returns:
        A row a (method, rank, image): `method`, `rank`, `key`, `index` (the position in `images`), `token_cosine`,
        `flat_cosine`, `mse`, `residual`, `residual_ratio` and, with a metric, `residual_ratio_weighted`, every number
        finite but a ρ that there is not, NaN; and a sentence for each method that broke on an image, none of whose rows
        are there, and for images of zeros.

    Raises:
        CacheError: features cannot be read.
    """
    parts: list[pd.DataFrame] = []
    broken: dict[Kind, str] = {}
    for places, x_NTD in batches(data, images, optimum):
        x_NTD = x_NTD.to(device)
        exact_NTD = x_NTD.double()
        which = pd.DataFrame({"key": [data.features.rows[images[place]].key for place in places], "index": places})
        best = {rank: Figures(*(figure_N[places] for figure_N in optimum.at(rank))) for rank in ranks}
        energy_N = optimum.energy_N[places]
        weigh = _weigher(metric, exact_NTD, places)
        if metric is None:
            parts += [_table("svd", rank, which, best[rank], best[rank], energy_N) for rank in ranks]
        elif ranks:
            svd = baselines.svd(exact_NTD, max(ranks))
            for rank in ranks:
                leading = Factors(svd.a_NTR[..., :rank], svd.b_NRD[:, :rank])
                parts.append(_table("svd", rank, which, best[rank], best[rank], energy_N, weigh(leading)))
                own = Figures(*(figure_N[places] for figure_N in metric.optimum.own.at(rank)))
                ones_N = torch.ones_like(energy_N)
                parts.append(_table("svd_weighted", rank, which, own, best[rank], energy_N, ones_N))
        for method in methods:
            if method.kind in broken:
                continue
            try:
                with torch.inference_mode():
                    factors = method.decompose(x_NTD)
                    figures = Figures(*(part_N.cpu() for part_N in measure(exact_NTD, *factors)))
                    ratio_N = weigh(factors) if method.rank in best else None
                if not all(bool(part_N.isfinite().all()) for part_N in figures):
                    raise RuntimeError("its factors are not finite on every test image")
                parts.append(_table(*method.kind, which, figures, best.get(method.rank), energy_N, ratio_N))
            except RuntimeError as error:  # torch raises its linear algebra's and its memory's errors as this
                broken[method.kind] = reason_of(error)
    remarks = [f"{name} at rank {rank} is left out: {reason}" for (name, rank), reason in broken.items()]
    zeros = int((optimum.energy_N == 0).sum())
    if zeros:
        remarks.append(f"{zeros} of {len(images)} test images hold nothing but zeros and are left out")
    if not parts:
        return pd.DataFrame(), remarks
    table = pd.concat(parts, ignore_index=True)
    left_out = pd.MultiIndex.from_frame(table[["method", "rank"]]).isin(list(broken))
    return table[~left_out].reset_index(drop=True), remarks


def reason_of(error: Exception) -> str:
    """Return the first line of what an error says, or its name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _weigher(metric: Metric | None, exact_NTD: Tensor, places: Sequence[int]) -> Callable[[Factors], Tensor | None]:
    """Return what tells ρ_W [N] of factors of these images; without a metric, nothing."""
    if metric is None:
        return lambda _: None
    factor_DD = metric.factor_DD.to(exact_NTD.device)
    weighted_NTD, optimum = exact_NTD @ factor_DD, metric.optimum

    def ratio(factors: Factors) -> Tensor:
        residual_N = weighted_residual(weighted_NTD, *factors, factor_DD).cpu()
        least_N = optimum.residual_NR[places, factors.a_NTR.shape[-1] - 1]
        return residual_ratio(residual_N, least_N, optimum.energy_N[places])

    return ratio


def _table(
    name: str,
    rank: int,
    which: pd.DataFrame,
    own: Figures,
    best: Figures | None,
    energy_N: Tensor,
    weighted_N: Tensor | None = None,
) -> pd.DataFrame:
    none_N = torch.full_like(energy_N, math.nan)
    ratio_N = residual_ratio(own.residual_N, best.residual_N, energy_N) if best else none_N
    numbers = dict(zip(FIGURES, (figure_N.numpy() for figure_N in (*own, ratio_N)), strict=True))
    if weighted_N is not None:
        numbers[WEIGHTED_RATIO] = weighted_N.numpy()
    return which.assign(method=name, rank=rank, **numbers)[["method", "rank", "key", "index", *numbers]]


FIGURES = ("token_cosine", "flat_cosine", "mse", "residual", "residual_ratio")
"""What `score` tells of an image."""
WEIGHTED_RATIO = "residual_ratio_weighted"
"""And of it in the metric of the answers, ρ_W: ‖X − AB‖_W² over the least that there is at the rank."""
BATCH = {"cpu": 8, "cuda": 64}
"""Images in the batch that is timed; a GPU needs many to be busy."""
SECONDS = 0.3
"""What a method's timing takes at most, unless two runs of the batch take longer."""
REPEATS = 9
"""Runs of the batch at most; the quickest counts, for others use the machine."""


def images_per_second(routes: Mapping[Kind, Callable[[Tensor], object]], x_NTD: Tensor) -> dict[Kind, float]:
    """Time routes on one batch [N, T, D] on its device, in turns, each warmed by a run; on the CPU, of one thread."""
    # What else runs would count in the time on the wall.
    clock = time.perf_counter if x_NTD.is_cuda else time.thread_time

    def run(decompose: Callable[[Tensor], object]) -> float:
        start = clock()
        decompose(x_NTD)
        if x_NTD.is_cuda:
            torch.cuda.synchronize(x_NTD.device)
        return clock() - start

    with one_thread(), torch.inference_mode():
        spent = {kind: run(decompose) for kind, decompose in routes.items()}
        quickest = dict.fromkeys(routes, math.inf)
        for turn in range(REPEATS):
            for kind, decompose in routes.items():
                if turn == 0 or spent[kind] + quickest[kind] <= SECONDS:
                    seconds = run(decompose)
                    spent[kind] += seconds
                    quickest[kind] = min(quickest[kind], seconds)
    return {kind: len(x_NTD) / seconds for kind, seconds in quickest.items()}


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch and numpy compute on the calling thread alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # numpy has a BLAS, and threads, of its own.
        with threadpool_limits(1, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(threads)


def device_name(device: str) -> str:
    """Name what speeds are measured on: `one CPU thread (AMD EPYC 7763), batches of 8 images`."""
    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name(device)}, batches of {BATCH['cuda']} images"
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    model = models[0] if models else platform.processor() or platform.machine()
    return f"one CPU thread ({model}), batches of {BATCH['cpu']} images"
