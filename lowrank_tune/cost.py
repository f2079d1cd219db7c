"""Looks at a study and a machine without running anything: `plan` and `doctor`."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lowrank_tune.checks import check_ranks
from lowrank_tune.cluster.study_dir import results_directory
from lowrank_tune.config.axes import combinations, smallest_value
from lowrank_tune.config.plan import (
    Plan,
    cache_bytes,
    first_params,
    make_plan,
    max_rank,
    plan_cost,
    split_images,
    trial_config,
)
from lowrank_tune.config.schema import FeaturesSpec, SchedulerSpec, StudySpec
from lowrank_tune.errors import InputError, LowrankTuneError
from lowrank_tune.features.cache import SHARD_ROWS, UnusableError, read_committed, read_sealed
from lowrank_tune.features.decoding import decode_image
from lowrank_tune.features.encoder import Encoder
from lowrank_tune.features.extract import plan_extraction
from lowrank_tune.features.sources import Quarantine, check_shape, hash_files, load_tensor, read_records
from lowrank_tune.lowrank.data import FeatureMatrix
from lowrank_tune.lowrank.svd import Optimum, measure_optimum
from lowrank_tune.lowrank.trainer import VALIDATION_BATCH, Trainer
from lowrank_tune.records import FeatureSet, Split, TrialConfig
from lowrank_tune.tracking.store import Store, probe, resolve_store

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


@dataclass(frozen=True, slots=True)
class Survey:
    """A source beside its cache.

    Attributes:
        directory: the cache, whether it is there yet or not.
        encoder: what makes the features, for people.
        weights: `random`, `pretrained` or `unknown`.
        records: the source's records.
        unreadable: records whose file is missing or cannot be read.
        images: distinct readable files among the rest.
        cached: how many of those the cache holds, sealed or left by an extraction that was cut short.
        quarantined: how many of those are known to be unusable.
        tokens: T, rows of an image's matrix.
        dim: D, its columns.
    """

    directory: str
    encoder: str
    weights: str
    records: int
    unreadable: int
    images: int
    cached: int
    quarantined: int
    tokens: int
    dim: int


@dataclass(frozen=True, slots=True)
class Sampled:
    """One image as features.

    Attributes:
        path: its file.
        shape: of its features, (T, D).
        low: their least value.
        high: their greatest value.
        seconds: what reading, decoding and encoding it took.
        error: why it cannot be used; empty when it can, and the rest is empty when it cannot.
    """

    path: str
    shape: tuple[int, ...] = ()
    low: float = 0.0
    high: float = 0.0
    seconds: float = 0.0
    error: str = ""


@dataclass(frozen=True, slots=True)
class Trial:
    """A few images as features, and what the others will take.

    Attributes:
        images: the first ones of the source.
        seconds_each: what an image takes one encoder, once it runs: on a GPU in a whole shard, on a CPU, or for ready
            tensors, as the quickest of `images` did. 0 where none was usable.
    """

    images: tuple[Sampled, ...]
    seconds_each: float


def survey_features(spec: FeaturesSpec, cache_root: Path, seed: int) -> Survey:
    """Count a source's images and those of them that are cached.

    Args:
        spec: the source and the encoder.
        cache_root: `results/features`.
        seed: which crops, for sample images.

    Raises:
        InputError: the source or the checkpoint cannot be used, or more of its files than may be are broken.
        CacheError: there is a cache, and it is damaged.
    """
    records = read_records(spec.source, cache_root, seed)
    files = hash_files(records)
    extraction = plan_extraction(spec, cache_root, records)
    directory = Path(extraction.directory)
    contents = read_sealed(directory, extraction.identity)
    if contents is None or contents.missing(files.paths):
        contents = read_committed(directory, extraction.identity)
    Quarantine(files, spec.max_quarantined).check(contents.quarantined)
    return Survey(
        directory=extraction.directory,
        encoder=extraction.encoder,
        weights=extraction.weights,
        records=len(records.paths),
        unreadable=sum(key is None for key in files.keys),
        images=len(files.paths),
        cached=sum(key in contents.rows for key in files.paths),
        quarantined=sum(key in contents.quarantined for key in files.paths),
        tokens=extraction.identity["tokens"],
        dim=extraction.identity["dim"],
    )


def try_images(spec: FeaturesSpec, cache_root: Path, seed: int, count: int, device: str) -> Trial:
    """Turn the first images of a source into features, in this process, and keep nothing.

    Args:
        spec: the source and the encoder.
        cache_root: `results/features`.
        seed: which crops, for sample images.
        count: how many images.
        device: where to encode.

    Raises:
        InputError: the source or the checkpoint cannot be used.
    """
    records = read_records(spec.source, cache_root, seed)
    extraction = plan_extraction(spec, cache_root, records)
    encoding, identity = extraction.encoding, extraction.identity
    paths = [path for path in records.paths if path is not None][:count]
    if encoding is None:

        def load(path: Path) -> torch.Tensor:
            tensor = load_tensor(path.read_bytes())
            check_shape(tensor, identity["tokens"], identity["dim"])
            return tensor

        images = tuple(_sample(path, load) for path in paths)
        return Trial(images, min((image.seconds for image in images if not image.error), default=0.0))

    size = spec.encoder.image_size
    encoder = Encoder(
        encoding.config,
        encoding.tower,
        encoding.compute_dtype,
        device,
        None if spec.batch_size == "auto" else spec.batch_size,
    )
    # A device's first pass finds kernels and memory, and is no measure of the others.
    encoder.encode(np.zeros((1, size, size, 3), np.uint8))
    images = tuple(_sample(path, lambda path: encoder.encode(_pixels(path, size))[0]) for path in paths)
    usable = [image for image in images if not image.error]
    if device == "cpu" or not usable:
        return Trial(images, min((image.seconds for image in usable), default=0.0))
    batch_NHWC = np.repeat(_pixels(Path(usable[0].path), size), SHARD_ROWS, axis=0)
    encoder.encode(batch_NHWC)
    started = time.perf_counter()
    encoder.encode(batch_NHWC)
    return Trial(images, (time.perf_counter() - started) / SHARD_ROWS)


def _pixels(path: Path, image_size: int) -> npt.NDArray[np.uint8]:
    return decode_image(path.read_bytes(), image_size)[None]


def _sample(path: Path, features_of: Callable[[Path], torch.Tensor]) -> Sampled:
    started = time.perf_counter()
    try:
        features_TD = features_of(path)
    except (UnusableError, InputError, OSError) as error:
        return Sampled(str(path), error=str(error))
    seconds = time.perf_counter() - started
    low, high = features_TD.min().item(), features_TD.max().item()
    return Sampled(str(path), tuple(features_TD.shape), low, high, seconds)


PACKAGES = ("torch", "transformers", "ray", "optuna", "mlflow")
TRIED_IMAGES = 3


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that `doctor` looked at.

    Attributes:
        name: what it is.
        passed: whether it is as a study needs it.
        finding: what was found; for a failure, with the remedy.
    """

    name: str
    passed: bool
    finding: str


def preview_study(spec: StudySpec, results: str | Path | None) -> dict[str, Any]:
    """What a study will do and need.

    Times and memory come from a short calibration in this process, on the device that the study asks for: some steps of
    the largest and the smallest training of each family on random numbers, and a few of its images encoded. `seconds`
    is about what `run` takes on this machine, `seconds_at_most` the same if nothing is stopped early.

    Args:
        spec: the study.
        results: the results directory.

    Returns:
        Facts by name, fit for JSON; sizes in bytes, times in seconds.

    Raises:
        InputError: the study's data, encoder or ranks cannot be used.
    """
    plan = make_plan(spec, results_directory(results), datetime.now(UTC))
    survey = survey_features(spec.features, plan.features_root, spec.seed)
    check_ranks(spec, survey.tokens, survey.dim)
    cost = plan_cost(plan)
    usable = survey.images - survey.quarantined
    split = split_images([str(image) for image in range(usable)], spec.split, spec.seed)
    calibration = calibrate(plan, survey.tokens, survey.dim, split)
    missing = usable - survey.cached
    extraction = _extraction_seconds(spec, plan.features_root, missing)
    return {
        "name": spec.name,
        "method": spec.search.method,
        "trials": cost.n_trials,
        "epochs_at_most": cost.max_epochs,
        "confirmations_at_most": cost.confirmations,
        "combinations": cost.combinations,
        "records": survey.records,
        "records_unreadable": survey.unreadable,
        "images": survey.images,
        "images_cached": survey.cached,
        "images_to_extract": missing,
        "images_quarantined": survey.quarantined,
        "split": {"train": len(split.train), "validation": len(split.validation), "test": len(split.test)},
        "features_shape": [survey.tokens, survey.dim],
        "encoder": survey.encoder,
        "weights": survey.weights,
        "cache": survey.directory,
        "cache_bytes": cache_bytes(usable, survey.tokens, survey.dim, spec.features.store_dtype),
        "device": calibration.device,
        "memory_bytes_per_trial": calibration.memory_per_trial,
        "trials_per_gpu": calibration.trials_per_gpu,
        "trials_at_once": calibration.trials_at_once,
        "workers_per_trial": spec.resources.workers_per_trial,
        "epochs_expected": calibration.expected_epochs,
        "extraction_seconds": round(extraction, 1),
        "trial_seconds": round(calibration.trial_seconds, 3),
        "seconds": round(calibration.seconds + extraction, 1),
        "seconds_at_most": round(calibration.seconds_at_most + extraction, 1),
        "hours": round((calibration.seconds + extraction) / 3600, 3),
    }


def diagnose(spec: StudySpec | None, results: str | Path | None) -> list[Check]:
    """Check the installation and, given a study, its data, encoder and cache.

    Args:
        spec: a study; None checks the machine alone.
        results: the results directory.
    """
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    checks = [
        Check("python", True, f"{platform.python_version()}; {versions}"),
        Check("device", True, _device()),
        _check("results", lambda: f"{results_directory(results)} is writable"),
    ]
    if not checks[-1].passed:
        return checks
    home = results_directory(results)
    store = resolve_store(spec.tracking.uri if spec else None, home)
    checks.append(_check("tracking", lambda: _describe_store(store)))
    if spec is not None:
        cache_root = home / "features"
        surveys: list[Survey] = []
        checks.append(_check("features", lambda: _describe_survey(spec, cache_root, surveys)))
        checks.append(_check("encoder", lambda: _describe_images(spec, cache_root, surveys)))
    return checks


def _extraction_seconds(spec: StudySpec, cache_root: Path, images: int) -> float:
    """What encoding so many images takes, from a few of them."""
    if not images:
        return 0.0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return try_images(spec.features, cache_root, spec.seed, TRIED_IMAGES, device).seconds_each * images


def _check(name: str, look: Callable[[], str]) -> Check:
    try:
        return Check(name, True, look())
    except (LowrankTuneError, OSError) as error:
        return Check(name, False, str(error))


def _device() -> str:
    if not torch.cuda.is_available():
        return f"no GPU; {os.cpu_count()} CPU cores"
    gpus = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        gpus.append(f"{torch.cuda.get_device_name(index)}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free")
    return "; ".join(gpus)


def _describe_store(store: Store) -> str:
    probe(store)
    return f"{store.shown} answers"


def _describe_survey(spec: StudySpec, cache_root: Path, surveys: list[Survey]) -> str:
    """What the source and its cache hold; the survey is kept for the checks after this one."""
    survey = survey_features(spec.features, cache_root, spec.seed)
    surveys.append(survey)
    check_ranks(spec, survey.tokens, survey.dim)
    size = cache_bytes(survey.images, survey.tokens, survey.dim, spec.features.store_dtype)
    return (
        f"{survey.records} records, {survey.unreadable} unreadable, {survey.images} distinct images, "
        f"{survey.cached} cached, {survey.quarantined} quarantined; {survey.encoder} ({survey.weights} weights) gives "
        f"[{survey.tokens}, {survey.dim}] each, {size / 2**20:,.1f} MiB in {spec.features.store_dtype} in all, "
        f"in {survey.directory}"
    )


def _describe_images(spec: StudySpec, cache_root: Path, surveys: Sequence[Survey]) -> str:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trial = try_images(spec.features, cache_root, spec.seed, TRIED_IMAGES, device)
    lines = [_describe_image(image) for image in trial.images]
    if any(image.error for image in trial.images):
        raise InputError("; ".join(lines))
    for survey in surveys:
        left = survey.images - survey.cached - survey.quarantined
        whole = timedelta(seconds=math.ceil(left * trial.seconds_each))
        lines.append(f"{left} images are left to extract: about {whole} with one such worker on {device}")
    return "; ".join(lines)


def _describe_image(image: Sampled) -> str:
    if image.error:
        return f"{image.path}: {image.error}"
    values = f"{list(image.shape)} in [{image.low:.3g}, {image.high:.3g}]"
    return f"{Path(image.path).name} {values}, {image.seconds:.2f} s"
