"""What a study would take, from a few measured steps, and what a machine has at hand; nothing is run."""

from __future__ import annotations

import importlib.metadata
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch

from lowrank_tune.checks import check_fidelity, check_sampler, check_space, with_first_points
from lowrank_tune.cluster.study_dir import results_directory
from lowrank_tune.config.axes import combinations, whole_values
from lowrank_tune.config.plan import (
    Plan,
    cache_bytes,
    make_plan,
    max_rank,
    plan_cost,
    search_bounds,
    split_images,
    trial_config,
)
from lowrank_tune.config.points import first_params
from lowrank_tune.config.schema import FeaturesSpec, SchedulerSpec, StudySpec
from lowrank_tune.config.source import TensorSource
from lowrank_tune.errors import InputError, LowrankTuneError, TrackingError, machine_fault, printable
from lowrank_tune.features.cache import read_committed, read_sealed
from lowrank_tune.features.commits import SHARD_ROWS, UnusableError
from lowrank_tune.features.decoding import decode_image
from lowrank_tune.features.encoder import Encoder
from lowrank_tune.features.extract import EncodeImages, plan_extraction
from lowrank_tune.features.groups import listed_groups
from lowrank_tune.features.images import hash_files, read_bytes
from lowrank_tune.features.sources import read_records
from lowrank_tune.features.tensors import load_tensor
from lowrank_tune.fidelity.reckon import fidelity_cost
from lowrank_tune.lowrank.calibration import Noise, measure_training
from lowrank_tune.lowrank.device import device_for
from lowrank_tune.records import Split
from lowrank_tune.tracking.database import database_fault
from lowrank_tune.tracking.reach import reach_store

USABLE = 0.9
"""The part of a GPU's memory that trials may fill: allocators leave gaps."""
START_S, FINISH_S, ROW_S = 15.0, 8.0, 0.6
"""Rough shares of the quickstart's time on two cores: libraries and Ray until the first trial; plots, report and
MLflow; and a row of the comparison. They matter to short studies only."""
PICTURES_S = 6.0
"""Likewise, of encoding test images again; a slow encoder takes up to a minute longer."""
TRIAL_S = 0.15
"""What starting a trial costs (scripts/bench_trials.py)."""
METHODS_WITHOUT_TRAINING = 6
TRIED_IMAGES, MOST_BROKEN = 3, 8
PACKAGES = ("torch", "transformers", "ray", "optuna", "mlflow")


def preview_study(spec: StudySpec, results: str | Path | None) -> dict[str, Any]:
    """What a study will do and need, fit for JSON: bytes, and seconds, `seconds_at_most` if nothing is stopped early.

    Raises:
        InputError: the study's data, encoder or ranks cannot be used.
    """
    check_sampler(spec)
    check_fidelity(spec)
    plan = with_first_points(make_plan(spec, results_directory(results), datetime.now(UTC)))
    survey = survey_features(spec.features, plan.features_root, spec.seed)
    tokens, dim = survey["features_shape"]
    check_space(spec, tokens, dim)
    cost = plan_cost(plan)
    usable = survey["images"] - survey["images_quarantined"]
    split = split_images(listed_groups(spec.features.source, spec.split.group_by)[:usable], spec.split, spec.seed)
    missing = survey["images_to_extract"]
    each = try_images(spec.features, plan.features_root, spec.seed)[0] if missing else 0.0
    asked = fidelity_cost(plan, tokens, len(split.test))
    return {
        "name": spec.name,
        "method": spec.search.method,
        "trials": plan.n_trials,
        "epochs_at_most": cost["max_epochs"],
        "search_ends": search_bounds(plan),
        "confirmations_at_most": cost["confirmations"],
        "combinations": cost["combinations"],
        "split": {"train": len(split.train), "validation": len(split.validation), "test": len(split.test)},
        **survey,
        **calibrate(plan, tokens, dim, split, each * missing, asked["seconds"] if asked else 0.0),
        "fidelity": asked,
    }


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that `doctor` looked at, and what was found, or the remedy."""

    name: str
    passed: bool
    finding: str


def diagnose(spec: StudySpec | None, results: str | Path | None) -> list[Check]:
    """Check the installation and, given a study, its data, encoder and cache."""
    checks: list[Check] = []

    def check(name: str, look: Callable[[], str]) -> None:
        try:
            checks.append(Check(name, True, look()))
        except LowrankTuneError as error:
            checks.append(Check(name, False, str(error)))
        except Exception as error:  # a driver that is half installed raises anything
            checks.append(Check(name, False, machine_fault(error) or f"{type(error).__name__}: {error}"))

    def device() -> str:
        gpus = []
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            gpus.append(f"{torch.cuda.get_device_name(index)}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free")
        return "; ".join(gpus) or f"no GPU; {joblib.cpu_count()} CPU cores"

    def tracking() -> str:
        store = reach_store(spec, results_directory(results))
        if store.is_own and store.database and (fault := database_fault(store.database)):
            raise TrackingError(f"tracking store {store.shown}: {fault}")
        if store.database and not store.database.exists():
            return f"the first study makes {store.shown}"
        return f"{store.shown} answers" + (f"; experiment {spec.experiment}" if spec else "")

    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    check("python", lambda: f"{platform.python_version()}; {versions}")
    check("device", device)
    check("results", lambda: f"{results_directory(results)} is writable")
    if checks[-1].passed:
        check("tracking", tracking)
        if spec is not None:
            cache_root, surveys = results_directory(results) / "features", list[dict[str, Any]]()
            check("features", lambda: _describe_survey(spec, cache_root, surveys))
            check("encoder", lambda: _describe_images(spec, cache_root, surveys))
    return checks


def survey_features(spec: FeaturesSpec, cache_root: Path, seed: int) -> dict[str, Any]:
    """Count a source's images and those of them that are cached, sealed or left by an extraction that was cut short."""
    records = read_records(spec.source, cache_root, seed)
    files = hash_files(records)
    extraction = plan_extraction(spec, cache_root, records)
    tokens, dim = extraction.identity["tokens"], extraction.identity["dim"]
    of_encoder = extraction.config.notes if isinstance(extraction, EncodeImages) else ()
    contents = read_sealed(Path(extraction.directory), extraction.identity)
    if contents is None or contents.missing(files.images):
        contents = read_committed(Path(extraction.directory), extraction.identity)
    contents = contents.standing(extraction.holds)
    files.check(contents.quarantined, spec.max_quarantined, "features.source", "features.max_quarantined")
    cached = sum(key in contents.rows for key in files.images)
    usable = sum(key not in contents.quarantined for key in files.images)
    return {
        "notes": (*records.notes, *of_encoder),
        "records": len(records.images),
        "records_unreadable": sum(key is None for key in files.keys),
        "images": len(files.images),
        "images_cached": cached,
        "images_to_extract": usable - cached,
        "images_quarantined": len(files.images) - usable,
        "features_shape": [tokens, dim],
        "encoder": extraction.encoder,
        "weights": extraction.weights,
        "cache": extraction.directory,
        "cache_bytes": cache_bytes(usable, tokens, dim, spec.store_dtype),
    }


def try_images(spec: FeaturesSpec, cache_root: Path, seed: int) -> tuple[float, list[str], list[str]]:
    """Turn the first images of a source into features, in this process, and keep nothing.

    Returns what an image takes one encoder (on a GPU in a whole shard, else as the quickest one did; 0 where none was
    usable), and a sentence on each of the usable images and of the broken ones.
    """
    records = read_records(spec.source, cache_root, seed)
    extraction = plan_extraction(spec, cache_root, records)
    size, tokens, dim = spec.encoder.image_size, extraction.identity["tokens"], extraction.identity["dim"]
    device = device_for(1)
    encoder = None
    if isinstance(extraction, EncodeImages):
        batch = None if spec.batch_size == "auto" else spec.batch_size
        encoder = Encoder(extraction.config, extraction.tower, spec.encoder.compute_dtype, device, batch)
        # A device's first pass finds kernels and memory, and is no measure of the others.
        encoder.encode(np.zeros((1, size, size, 3), np.uint8))
    seconds, findings, broken = list[float](), list[str](), list[str]()
    sound = np.zeros((0, size, size, 3), np.uint8)
    for image in filter(None, records.images):
        if len(seconds) == TRIED_IMAGES or len(broken) == MOST_BROKEN:
            break
        started = time.perf_counter()
        try:
            if encoder:
                pixels_NHWC = decode_image(read_bytes(image), size, spec.max_pixels)[None]
                features_TD, sound = encoder.encode(pixels_NHWC)[0], pixels_NHWC
            else:
                features_TD = load_tensor(read_bytes(image), (tokens, dim))
        except (UnusableError, InputError, OSError) as error:
            broken.append(printable(f"{image}: {error}"))
            continue
        seconds.append(time.perf_counter() - started)
        low, high = features_TD.min().item(), features_TD.max().item()
        findings.append(
            f"{printable(Path(image).name)} {list(features_TD.shape)} in [{low:.3g}, {high:.3g}], {seconds[-1]:.2f} s"
        )
    each = min(seconds, default=0.0)
    if encoder and device == "cuda" and seconds:
        shard_NHWC = np.repeat(sound, SHARD_ROWS, axis=0)
        for _ in range(2):
            started = time.perf_counter()
            encoder.encode(shard_NHWC)
            each = (time.perf_counter() - started) / SHARD_ROWS
    return each, findings, broken


def calibrate(
    plan: Plan, tokens: int, dim: int, split: Split, extraction_seconds: float, asking_seconds: float = 0.0
) -> dict[str, Any]:
    """Time a few steps of a study's largest and smallest trainings, and reckon the whole from them.

    Of a training by several workers one's share is timed, without what they exchange. The memory is that of the largest
    training, or of each of its workers: on a GPU what it allocated, else weights, gradients, moments and a batch.
    """
    resources, epochs = plan.spec.resources, plan.spec.training.epochs
    torch.set_num_threads(max(1, int(resources.cpus_per_trial)))
    device = device_for(resources.gpus_per_trial)
    workers = resources.workers_per_trial
    own = Split(*(images[: math.ceil(len(images) / workers)] for images in (split.train, split.validation, split.test)))
    data = Noise(
        tokens, dim, sum(map(len, (split.train, split.validation, split.test))), plan.spec.features.store_dtype
    )
    space, high = plan.spec.search.space, max_rank(plan.spec)
    families = space.families.chosen()
    measured = []
    for family in families:
        for rank in dict.fromkeys((high, high if space.nested_ranks else min(whole_values(space.rank)))):
            config = trial_config(plan, 0, {**first_params(plan.spec.search.space, family), "rank": rank})
            one = replace(config, batch_size=math.ceil(config.batch_size / workers))
            measured.append(measure_training(one, data, own, device))
    trial_seconds = sum(seconds for seconds, _ in measured) / len(measured)
    memory = max(size for _, size in measured)

    at_once = math.floor(joblib.cpu_count() / resources.cpus_per_trial + 1e-9)
    if resources.gpus_per_trial:
        gpus = torch.cuda.device_count() or 1
        at_once = min(at_once, math.floor(gpus / resources.gpus_per_trial + 1e-9))
    at_once = max(1, min(at_once // workers, resources.max_concurrent or at_once))
    per_gpu = None
    if torch.cuda.is_available():
        per_gpu = int(USABLE * torch.cuda.get_device_properties(0).total_memory / memory)

    confirmations = plan_cost(plan)["confirmations"]
    trainings = plan.n_trials + confirmations
    share = expected_share(plan.spec.scheduler, epochs)
    expected = plan.n_trials * share + confirmations
    ranks = len(space.nested_ranks) or combinations([space.axes(next(iter(families)))["rank"]]) or plan.n_trials
    fixed = START_S + FINISH_S + ROW_S * ranks * (len(families) + METHODS_WITHOUT_TRAINING) + TRIAL_S * trainings
    fixed += 0 if isinstance(plan.spec.features.source, TensorSource) else PICTURES_S
    fixed, whole = fixed + extraction_seconds + asking_seconds, trial_seconds / min(at_once, trainings)
    hours = plan.spec.search.stop.hours
    longest = math.inf if hours is None else 3600 * hours
    seconds, most = (
        fixed + min(plan.n_trials * part * whole, longest) + confirmations * whole for part in (share, 1.0)
    )
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "memory_bytes_per_trial": memory,
        "trials_per_gpu": per_gpu,
        "trials_at_once": at_once,
        "workers_per_trial": workers,
        "epochs_expected": round(expected * epochs),
        "extraction_seconds": round(extraction_seconds, 1),
        "trial_seconds": round(trial_seconds, 3),
        "seconds": round(seconds, 1),
        "seconds_at_most": round(most, 1),
        "hours": round(seconds / 3600, 3),
    }


def expected_share(scheduler: SchedulerSpec, epochs: int) -> float:
    """The part of all epochs that a scheduler is expected to leave to train.

    Halfway between synchronous halving, where one in `reduction_factor` passes each rung, and no stopping: the
    asynchronous kind lets every early trial pass.
    """
    if scheduler.kind == "none":
        return 1.0
    left, before, rung, trained = 1.0, 0, scheduler.grace_epochs, 0.0
    while before < epochs:
        trained += left * (min(rung, epochs) - before)
        before, rung, left = min(rung, epochs), rung * scheduler.reduction_factor, left / scheduler.reduction_factor
    return (trained / epochs + 1) / 2


def _describe_survey(spec: StudySpec, cache_root: Path, surveys: list[dict[str, Any]]) -> str:
    """What the source and its cache hold, which is kept for the next check."""
    survey = survey_features(spec.features, cache_root, spec.seed)
    surveys.append(survey)
    check_space(spec, *survey["features_shape"])
    facts = (
        f"{survey['records']} records, {survey['records_unreadable']} unreadable, {survey['images']} distinct images, "
        f"{survey['images_cached']} cached, {survey['images_quarantined']} quarantined; {survey['encoder']} "
        f"({survey['weights']} weights) gives {survey['features_shape']} each, "
        f"{survey['cache_bytes'] / 2**20:,.1f} MiB in {spec.features.store_dtype} in all, in {survey['cache']}"
    )
    return "; ".join((facts, *survey["notes"]))


def _describe_images(spec: StudySpec, cache_root: Path, surveys: Sequence[Mapping[str, Any]]) -> str:
    """What the first images become, and how long those left to extract take; an error if too many are broken."""
    each, lines, broken = try_images(spec.features, cache_root, spec.seed)
    most = spec.features.max_quarantined
    if broken:
        unusable = f"unusable: {'; '.join(broken)}"
        count = max((survey["images"] for survey in surveys), default=len(broken))
        if not lines or len(broken) > most * count:
            others = f"; the others are sound: {'; '.join(lines)}" if lines else ""
            raise InputError(
                f"{unusable}; an extraction stops above features.max_quarantined, {most:g} of {count} images: mend or "
                f"remove what is broken, or raise it{others}"
            )
        lines.append(f"{unusable}; an extraction leaves such images out, up to features.max_quarantined, {most:g}")
    device = device_for(1)
    for survey in surveys:
        images = survey["images_to_extract"]
        whole = timedelta(seconds=math.ceil(images * each))
        lines.append(f"{images} images are left to extract: about {whole} with one such worker on {device}")
    return "; ".join(lines)
