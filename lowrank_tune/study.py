"""The story of a study, from its file to its report, and the ways into it from a program."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch

from lowrank_tune.cluster.probe import check_shared
from lowrank_tune.cluster.study_dir import (
    READY,
    Lineage,
    StatusFile,
    StatusTracker,
    check_id,
    claimed,
    create_study,
    extended_plan,
    find_study,
    read_plan,
    read_status,
    record_extension,
    results_directory,
    spec_difference,
    working_on,
)
from lowrank_tune.comparison.compare import compare, read_comparison
from lowrank_tune.comparison.methods import winners
from lowrank_tune.config.loading import load_study, parse_study
from lowrank_tune.config.plan import Plan, first_params, make_plan, max_rank, split_images, trial_config
from lowrank_tune.config.render import render_study
from lowrank_tune.config.schema import StudySpec
from lowrank_tune.errors import InputError
from lowrank_tune.features.extract import extract_features, probe_shape
from lowrank_tune.features.remote import local_copy, open_local
from lowrank_tune.lowrank.data import FeatureMatrix, open_matrix
from lowrank_tune.lowrank.svd import Optimum, measure_optimum
from lowrank_tune.records import Comparison, FeatureSet, Split, TrialConfig, TrialOutcome
from lowrank_tune.report.report import write_report
from lowrank_tune.report.spatial import check_images
from lowrank_tune.runtime import ray_session
from lowrank_tune.tracking.mlflow_tracker import Repairs, StudyTracker
from lowrank_tune.tracking.store import local_uri
from lowrank_tune.trials.outcomes import check_same_images, read_outcomes
from lowrank_tune.trials.trial import run_one_trial
from lowrank_tune.trials.tuning import confirm_trials, run_trials, taking_part, widen_journal


class StudyProgress:
    """What a study tells while it runs; each method may be overridden, and none needs to be."""

    def stage(self, text: str) -> None:
        """A new part of the story begins."""

    def images(self, done: int, total: int) -> None:
        """So many of the images that the cache lacked are in it now."""

    def trials(self, total: int) -> None:
        """So many trainings begin: the search's trials, then the repetitions of its best."""

    def trial_started(self, config: TrialConfig) -> None:
        """A trial begins."""

    def trial_epoch(self, trial_id: str, epoch: int, metrics: dict[str, Any]) -> None:
        """A trial finished an epoch."""

    def trial_ended(self, outcome: TrialOutcome) -> None:
        """A trial is over."""


class Told(StudyProgress):
    """Passes on what happens, and puts the part of the story at work into status.json."""

    def __init__(self, progress: StudyProgress, status: StatusFile) -> None:
        self._progress = progress
        self._status = status
        self.images, self.trials = progress.images, progress.trials  # type: ignore[method-assign]
        self.trial_started = progress.trial_started  # type: ignore[method-assign]
        self.trial_epoch, self.trial_ended = progress.trial_epoch, progress.trial_ended  # type: ignore[method-assign]

    def stage(self, text: str) -> None:
        """Put it into status.json as well."""
        self._status.update(stage=text)
        self._progress.stage(text)


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
    study_id: str = "",
) -> StudyResult:
    """Run a whole study: features, trials, confirmation, comparison, report, MLflow.

    Args:
        study: a study file, or a spec that `load_study` gave.
        results: the results directory; `LOWRANK_TUNE_RESULTS`, else `./results`, by default.
        overrides: `key.path=value` texts laid over the file; for a file only.
        address: a Ray cluster; by default RAY_ADDRESS, else a Ray of this process's own.
        progress: told what happens.
        study_id: its id, where one was promised already; by default one that follows from the file and the time.

    Raises:
        InputError: something in the study file, the data or the results directory must be changed.
        StudyFailedError: no trial gave a model.
        TrackingError: the MLflow server does not answer.
    """
    plan = plan_study(_spec_of(study, overrides), results, study_id)
    return carry_out(plan, address, progress, Given(_text_of(study), tuple(overrides)))


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
    plan = plan_study(_spec_of(study, overrides), results)
    config = trial_config(plan, 0, first_params(plan.spec))
    create_study(plan, _text_of(study), overrides, Lineage())
    directory = plan.study_dir
    with working_on(directory):
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
    plan = plan_study(_spec_of(study, overrides), results)
    return _extract(plan, progress or StudyProgress(), address)


def open_features(directory: str | Path) -> FeatureMatrix:
    """Open a sealed feature cache, `results/features/<fingerprint>`, or one of factors that `apply` wrote.

    Args:
        directory: the cache's folder, or its address on an object store; where it is not on a local disk, it is copied
            to this node first (LOWRANK_TUNE_STAGING says where to), once.

    Returns:
        All its images: `len(features)`, `features.load([0, 1])` -> float32 tensor [2, tokens, dim],
        `features.features.rows[0].key`. Of factors, `load` gives X ≈ A·B, and `features.factors([0, 1])` A and B.

    Raises:
        CacheError: it is unsealed or damaged.
        InputError: the address does not answer, or there is no room for a copy.
    """
    return open_matrix(open_local(directory))


def validation_optimum(features: FeatureSet, split: Split) -> Optimum:
    """The SVD's figures of the validation images at every rank, in the order of `split.validation`."""
    return measure_optimum(FeatureMatrix(features).batches(split.validation, 16))


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


@dataclass(frozen=True, slots=True)
class Given:
    """What a new study is made of.

    Attributes:
        text: its file.
        overrides: what was laid over it.
        lineage: where it comes from.
    """

    text: str
    overrides: tuple[str, ...] = ()
    lineage: Lineage = Lineage()


def carry_out(
    plan: Plan, address: str | None, progress: StudyProgress | None, given: Given | None = None
) -> StudyResult:
    """Do all of a study that is not done yet.

    Args:
        plan: the study.
        address: as for `run_study`.
        progress: as for `run_study`.
        given: what a new study is made of; None for one that has begun.

    Raises:
        InputError: another process works on it, or the data or the results directory cannot be used.
        StudyFailedError: no trial gave a model.
        TrackingError: the MLflow server does not answer.
    """
    progress = progress or StudyProgress()
    if given is None:
        # Before the tracker looks which runs there are.
        with claimed(plan.study_dir):
            repair_tracking(plan)
    with ExitStack() as stack:
        mlflow = stack.enter_context(StudyTracker(plan))
        stack.enter_context(ray_session(address))
        check_shared(plan.results)
        if given is not None:
            create_study(plan, given.text, given.overrides, given.lineage)
        status = stack.enter_context(working_on(plan.study_dir))
        tracker = StatusTracker(mlflow, status, plan.n_trials, read_outcomes(plan.study_dir / "trials").values())
        told = Told(progress, status)
        told.stage(READY.format(study_id=plan.study_id))
        try:
            return _story(plan, mlflow, tracker, told)
        except KeyboardInterrupt:
            progress.stage(f"stopped; go on with: {resume_line(plan)}")
            raise


def repair_tracking(plan: Plan) -> Repairs:
    """Make MLflow hold what a study's own files hold; the caller has claimed the study.

    Raises:
        TrackingError: the store does not answer.
    """
    # It imports MLflow, which takes seconds.
    from lowrank_tune.tracking.sync import reconcile

    finished = (plan.study_dir / "comparison.json").is_file()
    return reconcile(plan, read_comparison(plan.study_dir) if finished else None)


def resume_line(plan: Plan) -> str:
    """The command that goes on with a study that was stopped."""
    return shlex.join(["lowrank-tune", "resume", plan.study_id, "--results", str(plan.results)])


def _story(plan: Plan, mlflow: StudyTracker, tracker: StatusTracker, progress: StudyProgress) -> StudyResult:
    directory = plan.study_dir
    with taking_part(plan.study_id):
        features, split, outcomes, confirmations = _train(plan, tracker, progress)
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
    mlflow.log_comparison(comparison, (*outcomes, *confirmations), directory)
    return StudyResult(
        study_id=plan.study_id,
        directory=directory,
        features=features,
        split=split,
        outcomes=outcomes,
        comparison=comparison,
        untracked=mlflow.problems,
        confirmations=confirmations,
        tracked_by="" if mlflow.store.uri == local_uri(plan.results) else mlflow.store.shown,
    )


def _train(
    plan: Plan, tracker: StatusTracker, progress: StudyProgress
) -> tuple[FeatureSet, Split, tuple[TrialOutcome, ...], tuple[TrialOutcome, ...]]:
    """All that occupies the cluster: features, trials and repetitions."""
    features = local_copy(_extract(plan, progress))
    check_same_images(plan.study_dir / "tune", features)
    split = split_images([row.key for row in features.rows], plan.spec.split, plan.spec.seed)
    check_images(plan.spec.report.images, len(split.test))
    optimum_path = _save_optimum(features, split, plan.study_dir, progress)
    progress.stage(f"training {tracker.left} trials on {len(split.train)} images")
    progress.trials(tracker.left)
    outcomes = run_trials(plan, features, split, optimum_path, [tracker, progress])
    confirmations = _confirm(plan, outcomes, features, split, optimum_path, tracker, progress)
    return features, split, outcomes, confirmations


def plan_study(spec: StudySpec, results: str | Path | None, study_id: str = "") -> Plan:
    """Plan a new study: its folder is free, and its ranks exist in its data.

    Args:
        spec: what to do.
        results: as for `run_study`.
        study_id: as for `run_study`.

    Raises:
        InputError: the results directory or the data cannot be used, or the id is taken.
    """
    home, started = results_directory(results), datetime.now(UTC)
    plan = make_plan(spec, home, started)
    if study_id:
        plan = replace(plan, study_id=check_id(study_id), study_dir=home / "studies" / study_id)
    while not study_id and plan.study_dir.exists():
        started += timedelta(seconds=1)
        plan = make_plan(spec, home, started)
    check_ranks(spec, *probe_shape(spec.features, plan.features_root, spec.seed))
    return plan


def _spec_of(study: str | Path | StudySpec, overrides: Sequence[str]) -> StudySpec:
    return study if isinstance(study, StudySpec) else load_study(Path(study), overrides)


def _text_of(study: str | Path | StudySpec) -> str:
    return render_study(study) if isinstance(study, StudySpec) else Path(study).read_text(encoding="utf-8")


def _device(spec: StudySpec) -> str:
    """Where this process computes what the trials compute: on a GPU when they ask for one and it is here."""
    return "cuda" if spec.resources.gpus_per_trial and torch.cuda.is_available() else "cpu"


def _save_optimum(features: FeatureSet, split: Split, directory: Path, progress: StudyProgress) -> Path:
    progress.stage(f"measuring the optimum of {len(split.validation)} validation images at every rank")
    path = directory / "optimum.safetensors"
    validation_optimum(features, split).save(path)
    return path


def _confirm(
    plan: Plan,
    outcomes: Sequence[TrialOutcome],
    features: FeatureSet,
    split: Split,
    optimum_path: Path,
    tracker: StatusTracker,
    progress: StudyProgress,
) -> tuple[TrialOutcome, ...]:
    best = winners(outcomes, plan.spec.objective)
    repetitions = len(best) * plan.spec.report.confirm_seeds
    tracker.expect_confirmations({outcome.config.trial_id for outcome in best}, repetitions)
    if repetitions:
        progress.stage(f"training the best of each rank again: {repetitions} with fresh seeds")
        progress.trials(repetitions)
    return confirm_trials(plan, best, features, split, optimum_path, [tracker, progress])


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


def resume_study(
    study_id: str,
    *,
    results: str | Path | None = None,
    address: str | None = None,
    progress: StudyProgress | None = None,
) -> StudyResult:
    """Go on with a study that was stopped, or that failed: its features, trials and repetitions are not made again.

    Trials that are over stay over; those that were being trained go on from their last checkpoint; the search goes on
    as it would have. A study whose trials are all over is compared and reported anew.

    Args:
        study_id: its id, or the beginning of it.
        results: as for `run_study`.
        address: as for `run_study`.
        progress: as for `run_study`.

    Raises:
        InputError: there is no such study, another process works on it, or its images have changed.
        StudyFailedError: no trial gave a model.
        TrackingError: the MLflow server does not answer.
    """
    return carry_out(read_plan(find_study(results_directory(results), study_id)), address, progress)


def extend_study(
    study_id: str,
    *,
    trials: int = 0,
    overrides: Sequence[str] = (),
    results: str | Path | None = None,
    address: str | None = None,
    progress: StudyProgress | None = None,
) -> StudyResult:
    """Add trials to a finished study; searcher and scheduler know the old ones, and all are compared anew.

    Args:
        study_id: as for `resume_study`.
        trials: how many to add; a grid grows with its space instead.
        overrides: `key.path=value` texts, such as a wider `search.space`.
        results: as for `run_study`.
        address: as for `run_study`.
        progress: as for `run_study`.

    Raises:
        InputError: it is not finished, nothing would be added, or what changes would make its trials incomparable.
        StudyFailedError: no trial gave a model.
        TrackingError: the MLflow server does not answer.
    """
    directory = find_study(results_directory(results), study_id)
    with claimed(directory):
        state = read_status(directory, ours=True)["state"]
        if state != "finished":
            raise InputError(f"study {directory.name}: it is {state}; `lowrank-tune resume` comes before `extend`")
        before = read_plan(directory)
        plan = extended_plan(before, trials, overrides)
        check_ranks(plan.spec, *probe_shape(plan.spec.features, plan.features_root, plan.spec.seed))
        widen_journal(plan, directory / "tune" / "optuna.journal")
        record_extension(before, plan, overrides)
    return carry_out(plan, address, progress)


def clone_study(
    study_id: str,
    *,
    overrides: Sequence[str] = (),
    results: str | Path | None = None,
    address: str | None = None,
    progress: StudyProgress | None = None,
    new_id: str = "",
) -> StudyResult:
    """Run a new study with another one's file and some other values; it remembers its parent and the difference.

    Args:
        study_id: the parent's id, or the beginning of it.
        overrides: `key.path=value` texts laid over the parent's file.
        results: as for `run_study`.
        address: as for `run_study`.
        progress: as for `run_study`.
        new_id: as for `run_study`.

    Raises:
        InputError: there is no such study, or something in its file, the data or the results must be changed.
        StudyFailedError: no trial gave a model.
        TrackingError: the MLflow server does not answer.
    """
    directory = find_study(results_directory(results), study_id)
    text = (directory / "study.resolved.yaml").read_text(encoding="utf-8")
    spec = parse_study(text, directory.name, overrides)
    lineage = Lineage(directory.name, spec_difference(load_study(directory / "study.resolved.yaml"), spec))
    plan = plan_study(spec, results, new_id)
    return carry_out(plan, address, progress, Given(text, tuple(overrides), lineage))


def reconcile_study(study_id: str, results: str | Path | None = None) -> dict[str, Any]:
    """Make MLflow hold what a study's own files hold.

    Args:
        study_id: its id, or the beginning of it.
        results: as for `run_study`.

    Returns:
        `study_id` and what was repaired, as `Repairs` counts it, fit for JSON.

    Raises:
        InputError: there is no such study, its files are damaged, or a process works on it and tells MLflow itself.
        TrackingError: the store does not answer.
    """
    directory = find_study(results_directory(results), study_id)
    plan = read_plan(directory)
    with claimed(directory):
        return {"study_id": plan.study_id, **asdict(repair_tracking(plan))}
