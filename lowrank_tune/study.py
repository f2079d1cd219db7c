"""The story of a study, from its file to its report, and the ways into it from a program."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import torch

from lowrank_tune.caches.places import results_place
from lowrank_tune.caches.staging import local_copy, open_local
from lowrank_tune.comparison.compare import compare
from lowrank_tune.comparison.methods import winners
from lowrank_tune.errors import InputError
from lowrank_tune.features.pipeline import extract_features, probe_shape
from lowrank_tune.lowrank.dataset import FeatureMatrix
from lowrank_tune.lowrank.oracle import Optimum, measure_optimum
from lowrank_tune.records import Comparison, FeatureSet, Split, TrialOutcome
from lowrank_tune.report.spatial import check_images
from lowrank_tune.report.write import write_report
from lowrank_tune.session import ray_session
from lowrank_tune.spec.loading import load_study
from lowrank_tune.spec.plan import (
    Plan,
    first_params,
    make_plan,
    max_rank,
    plan_summary,
    split_images,
    trial_config,
)
from lowrank_tune.spec.rendering import render_study
from lowrank_tune.spec.schema import StudySpec
from lowrank_tune.tracking.mlflow_tracker import StudyTracker
from lowrank_tune.tracking.store import local_uri
from lowrank_tune.trials.confirm import confirm_trials
from lowrank_tune.trials.local import run_one_trial
from lowrank_tune.trials.run import run_trials

StudyState = Literal["running", "finished", "failed", "stopped"]


class StudyProgress:
    """What a study tells while it runs; each method may be overridden, and none needs to be."""

    def stage(self, text: str) -> None:
        """A new part of the story begins."""

    def images(self, done: int, total: int) -> None:
        """So many of the images that the cache lacked are in it now."""

    def trials(self, total: int) -> None:
        """So many trainings begin: the search's trials, then the repetitions of its best."""

    def trial_epoch(self, metrics: dict[str, Any]) -> None:
        """A trial finished an epoch: its `trial_id`, `epoch` and figures."""

    def trial_ended(self, outcome: TrialOutcome) -> None:
        """A trial is over."""


@dataclass(frozen=True, slots=True)
class StudyResult:
    """What a finished study leaves behind.

    Attributes:
        study_id: its name in lists.
        directory: `results/studies/<study_id>`.
        features: the images' features.
        split: which of them trained, validated and tested.
        outcomes: every trial, in the order of their numbers.
        comparison: the figures on the test split.
        untracked: what MLflow was not told, and why; empty when it knows everything.
        tracked_by: the MLflow server's address; empty for the results directory's own database.
        confirmations: the best configuration of each rank, trained again with fresh seeds.
    """

    study_id: str
    directory: Path
    features: FeatureSet
    split: Split
    outcomes: tuple[TrialOutcome, ...]
    comparison: Comparison
    untracked: tuple[str, ...]
    confirmations: tuple[TrialOutcome, ...] = ()
    tracked_by: str = ""


def run_study(
    study: str | Path | StudySpec,
    *,
    results: str | Path | None = None,
    overrides: Sequence[str] = (),
    address: str | None = None,
    progress: StudyProgress | None = None,
) -> StudyResult:
    """Run a whole study: features, trials, confirmation, comparison, report, MLflow.

    Args:
        study: a study file, or a spec that `load_study` gave.
        results: the results directory; `LOWRANK_TUNE_RESULTS`, else `./results`, by default.
        overrides: `key.path=value` texts laid over the file; for a file only.
        address: a Ray cluster; by default RAY_ADDRESS, else a Ray of this process's own.
        progress: told what happens.

    Raises:
        InputError: something in the study file, the data or the results directory must be changed.
        StudyFailedError: no trial gave a model.
        TrackingError: the MLflow server does not answer.
    """
    progress = progress or StudyProgress()
    plan = _plan(study, results, overrides)
    with ExitStack() as stack:
        tracker = stack.enter_context(StudyTracker(plan))
        directory = stack.enter_context(_study_directory(plan, study, overrides))
        stack.enter_context(ray_session(address))
        features = local_copy(_extract(plan, progress))
        split = split_images([row.key for row in features.rows], plan.spec.split, plan.spec.seed)
        check_images(plan.spec.report.images, len(split.test))
        optimum_path = _save_optimum(features, split, directory, progress)
        _announce(progress, f"training {plan.n_trials} trials on {len(split.train)} images", plan.n_trials)
        outcomes = run_trials(plan, features, split, optimum_path, tracker, progress)
        confirmations = _confirm(plan, outcomes, features, split, optimum_path, tracker, progress)
        progress.stage(f"comparing with the SVD and the controls on {len(split.test)} test images")
        comparison = compare(
            features,
            split,
            outcomes,
            objective=plan.spec.objective,
            seed=plan.spec.seed,
            directory=directory,
            confirmations=confirmations,
            device=_device(plan.spec),
        )
        progress.stage("writing the report")
        write_report(plan, features, split, outcomes, comparison, directory, confirmations)
        tracker.log_comparison(comparison, (*outcomes, *confirmations), directory)
    return StudyResult(
        study_id=plan.study_id,
        directory=directory,
        features=features,
        split=split,
        outcomes=outcomes,
        comparison=comparison,
        untracked=tracker.problems,
        confirmations=confirmations,
        tracked_by="" if tracker.store.uri == local_uri(plan.results) else tracker.store.shown,
    )


def run_trial(
    study: str | Path | StudySpec,
    *,
    results: str | Path | None = None,
    overrides: Sequence[str] = (),
    progress: StudyProgress | None = None,
) -> TrialOutcome:
    """Train one trial in this very process, where a debugger's breakpoint works: the first point of the search space.

    Ray is started only when features are missing from the cache, and is gone before the training begins. The trial's
    files lie in a study directory of its own; MLflow is told nothing.

    Args:
        study: as for `run_study`.
        results: as for `run_study`.
        overrides: as for `run_study`.
        progress: told what happens.

    Raises:
        InputError: something in the study file, the data or the results directory must be changed.
    """
    progress = progress or StudyProgress()
    plan = _plan(study, results, overrides)
    config = trial_config(plan, 0, first_params(plan.spec))
    with _study_directory(plan, study, overrides) as directory:
        features = local_copy(_extract(plan, progress))
        split = split_images([row.key for row in features.rows], plan.spec.split, plan.spec.seed)
        progress.stage(f"training {config.trial_id} in this process")
        optimum = validation_optimum(features, split)
        return run_one_trial(
            config,
            features,
            split,
            optimum,
            directory / "trials" / config.trial_id,
            progress.trial_epoch,
            _device(plan.spec),
        )


def extract_study(
    study: str | Path | StudySpec,
    *,
    results: str | Path | None = None,
    overrides: Sequence[str] = (),
    address: str | None = None,
    progress: StudyProgress | None = None,
) -> FeatureSet:
    """Extract the features that a study's cache still lacks, and train nothing.

    Args:
        study: as for `run_study`.
        results: as for `run_study`.
        overrides: as for `run_study`.
        address: as for `run_study`.
        progress: told what happens.

    Raises:
        InputError: something in the study file, the data or the results directory must be changed.
    """
    return _extract(_plan(study, results, overrides), progress or StudyProgress(), address)


def open_features(directory: str | Path) -> FeatureMatrix:
    """Open a sealed feature cache, `results/features/<fingerprint>`.

    Args:
        directory: the cache's folder, or its address on an object store; where it is not on a local disk, it is copied
            to this node first (LOWRANK_TUNE_STAGING says where to), once.

    Returns:
        All its images: `len(features)`, `features.load([0, 1])` -> float32 tensor [2, tokens, dim],
        `features.features.rows[0].key`.

    Raises:
        CacheError: it is unsealed or damaged.
        InputError: the address does not answer, or there is no room for a copy.
    """
    return FeatureMatrix(open_local(directory))


def validation_optimum(features: FeatureSet, split: Split) -> Optimum:
    """The SVD's figures of the validation images at every rank, in the order of `split.validation`."""
    return measure_optimum(FeatureMatrix(features).batches(split.validation, 16))


def results_directory(results: str | Path | None) -> Path:
    """The results directory, made when missing.

    Args:
        results: a path; `LOWRANK_TUNE_RESULTS`, else `./results`, when None.

    Raises:
        InputError: it cannot be made or written to.
    """
    name = results_place(results)
    if "://" in name:
        raise InputError(
            f"results directory {name}: only local and mounted paths can be used; mount it, or pass --results DIR"
        )
    path = Path(os.path.abspath(Path(name).expanduser()))
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(
            f"results directory {path}: cannot write to it ({error.strerror}); "
            "pass --results DIR or set LOWRANK_TUNE_RESULTS"
        ) from None
    return path


def check_ranks(spec: StudySpec, tokens: int, dim: int) -> None:
    """Refuse a study that asks for a rank that no matrix [tokens, dim] has.

    Raises:
        InputError: naming the highest rank that is possible.
    """
    highest = max_rank(spec)
    if highest > min(tokens, dim):
        raise InputError(
            f"search.space.rank: {highest} is above min(tokens, dim) = min({tokens}, {dim}) = {min(tokens, dim)}, "
            "the rank of the features themselves; lower it"
        )


def _plan(study: str | Path | StudySpec, results: str | Path | None, overrides: Sequence[str]) -> Plan:
    spec = study if isinstance(study, StudySpec) else load_study(Path(study), overrides)
    home, started = results_directory(results), datetime.now(UTC)
    plan = make_plan(spec, home, started)
    while plan.study_dir.exists():
        started += timedelta(seconds=1)
        plan = make_plan(spec, home, started)
    check_ranks(spec, *probe_shape(spec.features, plan.features_root, spec.seed))
    return plan


def _device(spec: StudySpec) -> str:
    """Where this process computes what the trials compute: on a GPU when they ask for one and it is here."""
    return "cuda" if spec.resources.gpus_per_trial and torch.cuda.is_available() else "cpu"


def _save_optimum(features: FeatureSet, split: Split, directory: Path, progress: StudyProgress) -> Path:
    progress.stage(f"measuring the optimum of {len(split.validation)} validation images at every rank")
    path = directory / "optimum.safetensors"
    validation_optimum(features, split).save(path)
    return path


def _announce(progress: StudyProgress, stage: str, trainings: int) -> None:
    progress.stage(stage)
    progress.trials(trainings)


def _confirm(
    plan: Plan,
    outcomes: Sequence[TrialOutcome],
    features: FeatureSet,
    split: Split,
    optimum_path: Path,
    tracker: StudyTracker,
    progress: StudyProgress,
) -> tuple[TrialOutcome, ...]:
    best = winners(outcomes, plan.spec.objective)
    repetitions = len(best) * plan.spec.report.confirm_seeds
    if repetitions:
        _announce(progress, f"training the best of each rank again: {repetitions} with fresh seeds", repetitions)
    return confirm_trials(plan, best, features, split, optimum_path, tracker, progress)


def _extract(plan: Plan, progress: StudyProgress, address: str | None = None) -> FeatureSet:
    progress.stage("looking for the features in the cache")
    features = extract_features(
        plan.spec.features,
        plan.features_root,
        seed=plan.spec.seed,
        on_progress=progress.images,
        on_note=progress.stage,
        address=address,
    )
    check_ranks(plan.spec, features.tokens, features.dim)
    return features


@contextmanager
def _study_directory(plan: Plan, study: str | Path | StudySpec, overrides: Sequence[str]) -> Iterator[Path]:
    """The study's folder with its files, and a status.json that is true at the start and at every kind of end."""
    directory = plan.study_dir
    directory.mkdir(parents=True)
    resolved = render_study(plan.spec)
    given = resolved if isinstance(study, StudySpec) else Path(study).read_text(encoding="utf-8")
    (directory / "study.yaml").write_text(given, encoding="utf-8")
    (directory / "study.resolved.yaml").write_text(resolved, encoding="utf-8")
    summary = {**plan_summary(plan), "overrides": list(overrides)}
    (directory / "plan.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")
    started = datetime.now(UTC)
    _write_status(directory, "running", started)
    try:
        yield directory
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt | SystemExit)
        _write_status(directory, "stopped" if stopped else "failed", started, reason=str(error))
        raise
    _write_status(directory, "finished", started)


def _write_status(directory: Path, state: StudyState, started: datetime, reason: str = "") -> None:
    status = {
        "study_id": directory.name,
        "state": state,
        "started": started.isoformat(timespec="seconds"),
        "ended": None if state == "running" else datetime.now(UTC).isoformat(timespec="seconds"),
        "reason": reason,
    }
    partial = directory / "status.json.partial"
    partial.write_text(json.dumps(status, indent=2), encoding="utf-8")
    partial.replace(directory / "status.json")
