"""The story of a study, from its file to its report, and the ways into it from a program.

A command that is refused changes nothing: data, Ray, results directory and MLflow are looked at first.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import ray

from lowrank_tune.checks import check_begun, check_data, check_space, paths_explained, with_first_points
from lowrank_tune.cluster.jobs import check_shared
from lowrank_tune.cluster.notify import notified, notify_address
from lowrank_tune.cluster.study_dir import (
    READY,
    Status,
    check_id,
    claimed,
    create_study,
    extended_plan,
    find_study,
    read_plan,
    read_status,
    record_extension,
    results_directory,
    results_path,
    search_told,
    spec_difference,
)
from lowrank_tune.comparison.choice import winners
from lowrank_tune.comparison.compare import compare
from lowrank_tune.config.loading import load_past_study, load_study
from lowrank_tune.config.paths import anchored
from lowrank_tune.config.plan import Plan, make_plan, split_images, trial_config
from lowrank_tune.config.points import first_params
from lowrank_tune.config.render import render_study
from lowrank_tune.config.schema import StudySpec
from lowrank_tune.errors import InputError
from lowrank_tune.features.extract import extract_features
from lowrank_tune.features.groups import image_groups
from lowrank_tune.features.pictures import measure_pictures
from lowrank_tune.features.remote import local_copy
from lowrank_tune.fidelity.answers_metric import estimate_metric
from lowrank_tune.fidelity.measure import Measured, measure_fidelity, read_fidelity
from lowrank_tune.lowrank.device import device_for
from lowrank_tune.measured import Comparison, Fidelity, Pictures
from lowrank_tune.records import FeatureSet, Split, StudyProgress, TrialOutcome, TrialTracker
from lowrank_tune.report.spatial import check_images
from lowrank_tune.report.text import size_text
from lowrank_tune.runtime import ray_session
from lowrank_tune.tracking.tracker import Tracker
from lowrank_tune.trials.cluster_share import taking_part, trials_at_once
from lowrank_tune.trials.outcomes import check_same_images, read_outcomes
from lowrank_tune.trials.search import migrate_search
from lowrank_tune.trials.trial import run_one_trial, write_inputs
from lowrank_tune.trials.tuning import confirm_trials, run_trials
from lowrank_tune.upkeep import free_trials, other_studies, repair_tracking

Trials = Sequence[TrialOutcome]


@dataclass(frozen=True, slots=True)
class StudyResult:
    """What a finished study leaves behind in `results/studies/<study_id>`."""

    study_id: str
    directory: Path
    features: FeatureSet
    split: Split
    outcomes: tuple[TrialOutcome, ...]
    comparison: Comparison
    confirmations: tuple[TrialOutcome, ...] = ()
    untracked: tuple[str, ...] = ()  # what MLflow was not told, and why
    tracked_by: str = ""  # where MLflow's pages are, or the command that serves them; empty for `lowrank-tune ui`
    fidelity: Fidelity | None = None  # what the language model still sees; None where nothing was asked


def run_study(
    study: str | Path | StudySpec,
    *,
    results: str | Path | None = None,
    overrides: Sequence[str] = (),
    address: str | None = None,
    progress: StudyProgress | None = None,
    study_id: str = "",
    file: Path | None = None,
) -> StudyResult:
    """Run a whole study: features, trials, confirmation, comparison, report, MLflow.

    Args:
        study: a study file, or a spec that `load_study` gave.
        results: the results directory; `LOWRANK_TUNE_RESULTS`, else `./results`, by default.
        overrides: `key.path=value` texts laid over the file.
        address: a Ray cluster; by default RAY_ADDRESS, else a Ray of this process's own.
        progress: told what happens.
        study_id: its id, where one was promised already.
        file: where a spec was read from; the study's folder keeps its text.

    Raises:
        InputError: something in the study file, the data or the results directory must be changed.
        StudyFailedError: no trial gave a model.
        TrackingError: the MLflow server does not answer.
    """
    plan = plan_study(_spec_of(study, overrides), results, study_id)
    with _ready(plan, address) as (tracker, opened):
        create_study(plan, _text_of(file or study), overrides)
        with claimed(plan.study_dir):
            return _carry_out(plan, tracker, opened, progress)


def resume_study(
    study_id: str,
    *,
    results: str | Path | None = None,
    address: str | None = None,
    progress: StudyProgress | None = None,
) -> StudyResult:
    """Go on with a study that was stopped, or that failed; one whose trials are all over is compared and reported anew.

    Trials that are over stay over; those that were being trained go on from their last checkpoint.
    """
    directory = find_study(results_path(results), study_id)
    with claimed(directory):
        plan = read_plan(directory)
        check_begun(plan)
        with _ready(plan, address, begun=True) as (tracker, opened):
            return _carry_out(plan, tracker, opened, progress)


def extend_study(
    study_id: str,
    *,
    trials: int = 0,
    overrides: Sequence[str] = (),
    results: str | Path | None = None,
    address: str | None = None,
    progress: StudyProgress | None = None,
) -> StudyResult:
    """Add trials to a finished study, a grid's by a wider `search.space` in `overrides`; all are compared anew."""
    directory = find_study(results_path(results), study_id)
    with claimed(directory):
        status = read_status(directory, ours=True)
        state = status["state"]
        # One whose search was ended with nothing but failures can only go on with another `search.stop`.
        if state != "finished" and not (state == "failed" and status["stopped_for"]):
            raise InputError(f"study {directory.name}: it is {state}; `lowrank-tune resume` comes before `extend`")
        before = read_plan(directory)
        plan = with_first_points(extended_plan(before, trials, overrides))
        check_begun(plan)
        with _ready(plan, address, begun=True) as (tracker, opened):
            migrate_search(plan, directory / "tune" / "optuna.journal")
            record_extension(before, plan, overrides)
            return _carry_out(plan, tracker, opened, progress)


def clone_study(
    study_id: str,
    *,
    overrides: Sequence[str] = (),
    results: str | Path | None = None,
    address: str | None = None,
    progress: StudyProgress | None = None,
    new_id: str = "",
) -> StudyResult:
    """Run a new study with another one's file and some other values; it remembers its parent and the difference."""
    directory = find_study(results_path(results), study_id)
    resolved = directory / "study.resolved.yaml"
    old, spec = load_past_study(resolved), load_past_study(resolved, overrides)
    with paths_explained(directory.name, spec):
        plan = plan_study(spec, results, new_id)
    difference = spec_difference(old, spec)
    with _ready(plan, address) as (tracker, opened):
        create_study(plan, render_study(old), overrides, parent=directory.name, difference=difference)
        with claimed(plan.study_dir):
            return _carry_out(plan, tracker, opened, progress)


def run_trial(
    study: str | Path | StudySpec,
    *,
    results: str | Path | None = None,
    overrides: Sequence[str] = (),
    progress: StudyProgress | None = None,
    file: Path | None = None,
) -> TrialOutcome:
    """Train the first point of the search space in this process, where a debugger's breakpoint works.

    Ray is started only when features are missing, and is gone before the training begins; MLflow is told nothing.
    """
    progress = progress or StudyProgress()
    plan = plan_study(_spec_of(study, overrides), results)
    config = trial_config(plan, 0, first_params(plan.spec.search.space))
    create_study(plan, _text_of(file or study), overrides)
    with claimed(plan.study_dir), Status(plan.study_dir, 1) as status:
        features, split = _prepare(plan, progress, progress.stage)
        if config.family_params.get("metric") == "answers":
            estimate_metric(plan, features, split, progress.stage)
        progress.stage(f"training {config.trial_id} in this process")
        progress.trials(1)
        progress.trial_started(config)
        outcome = run_one_trial(config, plan.study_dir, progress.trial_epoch, device_of(plan.spec))
        status.trial_ended(outcome)
        progress.trial_ended(outcome)
        return outcome


def extract_study(
    study: str | Path | StudySpec,
    *,
    results: str | Path | None = None,
    overrides: Sequence[str] = (),
    address: str | None = None,
    progress: StudyProgress | None = None,
) -> FeatureSet:
    """Extract the features that a study's cache still lacks, and train nothing."""
    plan = plan_study(_spec_of(study, overrides), results, trains=False)
    progress = progress or StudyProgress()
    return _extract(plan, progress, progress.stage, address)


def compare_study(
    plan: Plan, features: FeatureSet, split: Split, outcomes: Trials, confirmations: Trials, pictures: Pictures
) -> Comparison:
    """Compare what a study's trials left, on its test split, with what its pictures gave; errors as `compare`."""
    return compare(
        features,
        split,
        outcomes,
        objective=plan.spec.steered_by,
        seed=plan.spec.seed,
        directory=plan.study_dir,
        groups=image_groups(features, plan.spec.split.group_by),
        confirmations=confirmations,
        pictures=pictures,
        device=device_of(plan.spec),
        told=search_told(plan.study_dir),
    )


def device_of(spec: StudySpec) -> str:
    """Where this process computes: on a GPU when trials ask for one and it is here."""
    return device_for(spec.resources.gpus_per_trial)


def plan_study(spec: StudySpec, results: str | Path | None, study_id: str = "", *, trains: bool = True) -> Plan:
    """Plan a new study that its data allow, with absolute paths and a free folder; only its results directory is made.

    Raises:
        InputError: the results directory or the data cannot be used, or the id is taken.
    """
    spec, started = anchored(spec), datetime.now(UTC)
    home = results_path(results)
    check_data(spec, trains=trains)
    plan = make_plan(spec, home, started)
    while not study_id and plan.study_dir.exists():
        started += timedelta(seconds=1)
        plan = make_plan(spec, home, started)
    if study_id:
        plan = replace(plan, study_id=check_id(study_id), study_dir=home / "studies" / study_id)
        if plan.study_dir.exists():
            raise InputError(f"study {study_id}: {plan.study_dir} is there already; go on with it by `resume`")
    plan = with_first_points(plan) if trains else plan
    results_directory(home)
    return plan


@contextmanager
def _ready(plan: Plan, address: str | None, *, begun: bool = False) -> Iterator[tuple[Tracker, ExitStack]]:
    """Ray with room for a trial, a results directory that its nodes share, and MLflow, which the stack ends."""
    tracker = Tracker(plan, lambda: other_studies(plan))  # refuses what cannot be tracked before a cluster is asked
    notify_address(plan.spec)
    with ray_session(address), ExitStack() as opened:
        check_shared(plan.results)
        trials_at_once(plan.spec.resources, ray.nodes())
        if begun:
            repair_tracking(plan)
        yield opened.enter_context(tracker), opened


def _carry_out(plan: Plan, tracker: Tracker, opened: ExitStack, progress: StudyProgress | None) -> StudyResult:
    """Do all of a claimed study that is not done yet."""
    progress = progress or StudyProgress()
    known = read_outcomes(plan.study_dir / "trials").values()
    with notified(plan, progress.stage), Status(plan.study_dir, plan.n_trials, known) as status:
        try:
            # MLflow hears the last of it before the status tells the end, and what it never heard.
            with opened.pop_all():
                result = _story(plan, status, tracker, progress)
            # Of what MLflow lacks the files are needed still.
            if not tracker.problems and (freed := free_trials(plan, result.comparison)):
                progress.stage(f"keep: {size_text(freed)} are free again, of all but the best trials")
        except KeyboardInterrupt:
            line = shlex.join(["lowrank-tune", "resume", plan.study_id, "--results", str(plan.results)])
            progress.stage(f"stopped; go on with: {line}")
            raise
        finally:
            status.update(untracked=list(tracker.problems))
            if tracker.problems:
                progress.stage(f"not in MLflow: {'; '.join(tracker.problems)}")
    return replace(result, untracked=tracker.problems, tracked_by=tracker.store.page)


def _story(plan: Plan, status: Status, tracker: Tracker, progress: StudyProgress) -> StudyResult:
    spec, directory = plan.spec, plan.study_dir
    observers: list[TrialTracker] = [status, tracker, progress]

    def say(text: str) -> None:
        status.update(stage=text)
        progress.stage(text)

    say(READY.format(study_id=plan.study_id))
    with taking_part(plan.study_id):
        features, split = _prepare(plan, progress, say)
        estimate_metric(plan, features, split, say)
        say(f"training {status.trials_left} trials on {len(split.train)} images")
        progress.trials(status.trials_left)
        outcomes = run_trials(plan, observers, status.searched_s)
        best = winners(outcomes, spec.steered_by)
        repetitions = len(best) * spec.report.confirm_seeds
        status.expect_confirmations([outcome.config.trial_id for outcome in best], repetitions)
        if repetitions:
            say(f"training the best of each rank again: {repetitions} with fresh seeds")
            progress.trials(repetitions)
        confirmations = confirm_trials(plan, best, observers)
        pictures = measure_pictures(plan, features, split.test, say)
    say(f"comparing with the SVD and the controls on {len(split.test)} test images")
    comparison = compare_study(plan, features, split, outcomes, confirmations, pictures)
    study = Measured(plan, features, split, tuple(outcomes), comparison)
    fidelity = measure_fidelity(study, spec.fidelity, note=say, progress=progress.asked) or read_fidelity(directory)
    # Here, for it imports what draws, which takes seconds.
    from lowrank_tune.report.report import write_report

    write_report(plan, features, split, outcomes, comparison, directory, confirmations, say, fidelity)
    tracker.compared(comparison, (*outcomes, *confirmations))
    return StudyResult(
        plan.study_id, directory, features, split, outcomes, comparison, confirmations, fidelity=fidelity
    )


def _prepare(plan: Plan, progress: StudyProgress, say: Callable[[str], None]) -> tuple[FeatureSet, Split]:
    """A study's features and their split, and in its folder what its trials need of them."""
    features = local_copy(_extract(plan, progress, say))
    check_same_images(plan.study_dir / "tune", features.fingerprint, [row.key for row in features.rows])
    split = split_images(image_groups(features, plan.spec.split.group_by), plan.spec.split, plan.spec.seed)
    check_images(plan.spec.report.images, len(split.test))
    say(f"measuring the optimum of {len(split.validation)} validation images at every rank")
    write_inputs(plan.study_dir, features, split)
    return features, split


def _extract(plan: Plan, progress: StudyProgress, say: Callable[[str], None], address: str | None = None) -> FeatureSet:
    say("looking for the features in the cache")
    features = extract_features(
        plan.spec.features,
        plan.features_root,
        seed=plan.spec.seed,
        on_progress=progress.images,
        on_note=say,
        address=address,
    )
    check_space(plan.spec, features.tokens, features.dim)
    return features


def _spec_of(study: str | Path | StudySpec, overrides: Sequence[str]) -> StudySpec:
    return study if isinstance(study, StudySpec) else load_study(Path(study), overrides)


def _text_of(study: str | Path | StudySpec) -> str:
    return render_study(study) if isinstance(study, StudySpec) else Path(study).read_text(encoding="utf-8")
