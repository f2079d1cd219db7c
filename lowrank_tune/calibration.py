"""What a study will take, judged by a few steps of its largest and smallest trainings on the device that it asks for.

N images, T tokens, D dim.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowrank_tune.lowrank.dataset import FeatureMatrix
from lowrank_tune.lowrank.oracle import Optimum, measure_optimum
from lowrank_tune.lowrank.trainer import VALIDATION_BATCH, Trainer
from lowrank_tune.records import FeatureSet, Split, TrialConfig
from lowrank_tune.spec.axes import combinations, smallest_value
from lowrank_tune.spec.plan import Plan, first_params, max_rank, plan_cost, trial_config
from lowrank_tune.spec.schema import SchedulerSpec

_STEPS = 3
"""Steps of an epoch that is timed, at most; the rest is reckoned."""
_USABLE = 0.9
"""The part of a GPU's memory that trials may fill: allocators leave gaps."""
_START_S, _FINISH_S, _ROW_S = 15.0, 8.0, 0.6
"""Rough shares of the quickstart's time on two cores: libraries and Ray until the first trial; plots, report and
MLflow; and a row of the comparison. They matter to short studies only."""
_TRIAL_S = 0.15
"""What starting a trial costs (scripts/bench_trials.py)."""
_METHODS_WITHOUT_TRAINING = 6


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was measured, and what follows from it.

    Attributes:
        device: where it was measured.
        trial_seconds: a whole training, over families and ranks, if nothing stops it early.
        expected_epochs: epochs that are trained if the scheduler stops as many as it may be expected to.
        trials_at_once: on this machine.
        memory_per_trial: bytes of the largest training, or of each of its workers: on a GPU what it allocated at most,
            else weights, gradients, moments and a batch.
        trials_per_gpu: how many of the largest fit on this machine's first GPU; None without one.
        seconds: the study's wall time without the extraction.
        seconds_at_most: the same if nothing is stopped early.
    """

    device: str
    trial_seconds: float
    expected_epochs: int
    trials_at_once: int
    memory_per_trial: int
    trials_per_gpu: int | None
    seconds: float
    seconds_at_most: float


class _Noise(FeatureMatrix):
    """Random features, as many as a calibration needs, that stand for any number of images."""

    def __init__(self, tokens: int, dim: int) -> None:
        super().__init__(FeatureSet("", "", "noise", "random", "float32", tokens, dim, (), ""))
        generator = torch.Generator().manual_seed(0)
        self._x_NTD = torch.randn(VALIDATION_BATCH, tokens, dim, generator=generator)

    def load(self, indices: Sequence[int], dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
        x_NTD = self._x_NTD[[index % len(self._x_NTD) for index in indices]].to(dtype)
        return x_NTD if out is None else out.copy_(x_NTD)


def calibrate(plan: Plan, tokens: int, dim: int, split: Split) -> Calibration:
    """Time a study's largest and smallest trainings, a few steps each, and reckon the whole from them.

    Of a training by several workers one's share is timed; what they exchange is not.

    Args:
        plan: the study.
        tokens: T, rows of an image's matrix.
        dim: D, its columns.
        split: its images; only their numbers count.
    """
    resources = plan.spec.resources
    torch.set_num_threads(max(1, int(resources.cpus_per_trial)))
    device = "cuda" if resources.gpus_per_trial and torch.cuda.is_available() else "cpu"
    data = _Noise(tokens, dim)
    workers = resources.workers_per_trial
    own = Split(*(images[: math.ceil(len(images) / workers)] for images in (split.train, split.validation, split.test)))
    shares = [replace(config, batch_size=math.ceil(config.batch_size / workers)) for config in _extremes(plan)]
    measured = [_measure(share, data, own, device) for share in shares]
    trial_seconds = sum(seconds for seconds, _ in measured) / len(measured)
    memory = max(size for _, size in measured)
    cost, epochs = plan_cost(plan), plan.spec.training.epochs
    share = expected_share(plan.spec.scheduler, epochs)
    at_once = _at_once(plan)
    fixed = _START_S + _FINISH_S + _ROW_S * _rows(plan)
    trainings = cost.n_trials + cost.confirmations

    def wall(trials: float) -> float:
        beside = min(at_once, trainings)
        return fixed + (trials + cost.confirmations) * trial_seconds / beside + trainings * _TRIAL_S

    return Calibration(
        device=torch.cuda.get_device_name() if device == "cuda" else "cpu",
        trial_seconds=trial_seconds,
        expected_epochs=round((cost.n_trials * share + cost.confirmations) * epochs),
        trials_at_once=at_once,
        memory_per_trial=memory,
        trials_per_gpu=_per_gpu(memory),
        seconds=wall(cost.n_trials * share),
        seconds_at_most=wall(cost.n_trials),
    )


def expected_share(scheduler: SchedulerSpec, epochs: int) -> float:
    """The part of all epochs that a scheduler may be expected to leave to train.

    Halfway between halving that waits for everybody, where one in `reduction_factor` passes each rung, and no stopping:
    the asynchronous kind lets every early trial pass.
    """
    if scheduler.kind == "none":
        return 1.0
    left, rung, trained = 1.0, scheduler.grace_epochs, 0.0
    before = 0
    while before < epochs:
        trained += left * (min(rung, epochs) - before)
        before, rung, left = min(rung, epochs), rung * scheduler.reduction_factor, left / scheduler.reduction_factor
    return (trained / epochs + 1) / 2


def _extremes(plan: Plan) -> list[TrialConfig]:
    """The largest and the smallest training of each family."""
    space = plan.spec.search.space
    low = max_rank(plan.spec) if space.nested_ranks else smallest_value(space.rank)
    return [
        trial_config(plan, 0, {**first_params(plan.spec, family), "rank": rank})
        for family in space.families.chosen()
        for rank in dict.fromkeys((max_rank(plan.spec), low))
    ]


def _measure(config: TrialConfig, data: FeatureMatrix, split: Split, device: str) -> tuple[float, int]:
    """Seconds of a whole training and bytes that it holds, from its first epochs on a few images."""
    train = min(len(split.train), _STEPS * config.batch_size)
    validation = min(len(split.validation), VALIDATION_BATCH)
    few = Split(tuple(range(train)), tuple(range(validation)), ())
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer = Trainer(replace(config, epochs=4, patience=4), data, few, _optimum(data, validation), device)
    seconds = []
    for _ in range(3):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        trainer.step()
        seconds.append(time.perf_counter() - started)
    # The first epoch also makes what later ones keep.
    scale, later = len(split.train) / train, min(seconds[1:])
    whole = scale * (max(seconds[0], later) + (config.epochs - 1) * later)
    if device == "cuda":
        return whole, int(torch.cuda.max_memory_allocated())
    weights = sum(weight.nbytes for weight in trainer.model.parameters())
    return whole, 5 * weights + 4 * 4 * config.batch_size * data.tokens * data.dim


def _optimum(data: FeatureMatrix, images: int) -> Optimum:
    return measure_optimum([data.load(range(images))])


def _at_once(plan: Plan) -> int:
    resources = plan.spec.resources
    fit = math.floor((os.cpu_count() or 1) / resources.cpus_per_trial + 1e-9)
    if resources.gpus_per_trial:
        gpus = torch.cuda.device_count() or 1
        fit = min(fit, math.floor(gpus / resources.gpus_per_trial + 1e-9))
    fit //= resources.workers_per_trial
    return max(1, min(fit, resources.max_concurrent or fit))


def _per_gpu(memory: int) -> int | None:
    if not torch.cuda.is_available():
        return None
    return int(_USABLE * torch.cuda.get_device_properties(0).total_memory / memory)


def _rows(plan: Plan) -> int:
    space = plan.spec.search.space
    families = space.families.chosen()
    ranks = len(space.nested_ranks) or combinations([space.axes(next(iter(families)))["rank"]]) or plan.n_trials
    return ranks * (len(families) + _METHODS_WITHOUT_TRAINING)
