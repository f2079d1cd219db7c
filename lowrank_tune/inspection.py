"""Looks at a study and a machine without running anything: `plan` and `doctor`."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch

from lowrank_tune.calibration import calibrate
from lowrank_tune.cluster.directory import results_directory
from lowrank_tune.errors import InputError, LowrankTuneError
from lowrank_tune.features.survey import Sampled, Survey, survey_features, try_images
from lowrank_tune.spec.plan import (
    cache_bytes,
    make_plan,
    plan_cost,
    split_images,
)
from lowrank_tune.spec.schema import StudySpec
from lowrank_tune.study import check_ranks
from lowrank_tune.tracking.store import Store, probe, resolve_store

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
