"""A study's trials on Ray Tune."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.experiment import Trial

from lowrank_tune.errors import StudyFailedError
from lowrank_tune.records import FeatureSet, Split, TrialOutcome, TrialTracker
from lowrank_tune.spec.plan import Plan
from lowrank_tune.trials.callback import Audience, TrialListener, told_to
from lowrank_tune.trials.paths import write_material
from lowrank_tune.trials.resources import trials_at_once
from lowrank_tune.trials.scheduler import make_scheduler
from lowrank_tune.trials.searcher import StudySearcher, open_optuna_study
from lowrank_tune.trials.trainable import TrialActor, actor_config

_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no result.json, progress.csv and TensorBoard files beside ours
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # an outcome carries its reason
    "RAY_AIR_NEW_OUTPUT": "0",  # the newer reporter prints tables whatever the verbosity
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # The journal and the trials' own files hold all that a resumed study needs; Tune's snapshots of itself would only
    # be written, once at the start and once at the end.
    "TUNE_GLOBAL_CHECKPOINT_S": "inf",
}


def run_trials(
    plan: Plan,
    features: FeatureSet,
    split: Split,
    optimum_path: Path,
    tracker: TrialTracker,
    listener: TrialListener | None = None,
) -> tuple[TrialOutcome, ...]:
    """Run every trial of a study; Ray is initialised by the caller.

    Args:
        plan: the study.
        features: its features; only their path travels to the actors.
        split: which images train, validate and judge.
        optimum_path: the validation split's optimum.
        tracker: told of every trial.
        listener: told as well, for a terminal.

    Returns:
        One outcome a trial, in the order of their numbers.

    Raises:
        InputError: a trial asks for more than any node has.
        StudyFailedError: every trial failed.
        KeyboardInterrupt: the study was interrupted; trials that had ended are on file.
    """
    resources = plan.spec.resources
    at_once = trials_at_once(resources, ray.nodes())
    tune_dir, trials_dir = plan.study_dir / "tune", plan.study_dir / "trials"
    shared = actor_config(
        write_material(tune_dir, features, split, optimum_path),
        trials_dir,
        resources.cpus_per_trial,
        resources.gpus_per_trial,
    )
    searcher = StudySearcher(plan, open_optuna_study(plan, tune_dir / "optuna.journal"))
    audience = Audience(trials_dir, tracker, listener)
    with told_to(audience) as callback, _quiet_tune(callback):
        try:
            _tuner(plan, searcher, shared, at_once, tune_dir).fit()
        finally:
            searcher.abandon()
    if len(audience.outcomes) < plan.n_trials:
        raise KeyboardInterrupt
    outcomes = tuple(sorted(audience.outcomes.values(), key=lambda outcome: outcome.config.number))
    _require_one_success(outcomes)
    return outcomes


def _tuner(plan: Plan, searcher: StudySearcher, shared: dict[str, Any], at_once: int, tune_dir: Path) -> tune.Tuner:
    return tune.Tuner(
        TrialActor,
        param_space=shared,
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=make_scheduler(plan.spec),
            num_samples=plan.n_trials,
            max_concurrent_trials=at_once,
            reuse_actors=True,
            trial_name_creator=_trial_id,
            trial_dirname_creator=_trial_id,
        ),
        run_config=tune.RunConfig(
            name="ray",
            storage_path=str(tune_dir.absolute()),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
        ),
    )


def _require_one_success(outcomes: tuple[TrialOutcome, ...]) -> None:
    if any(outcome.status != "failed" for outcome in outcomes):
        return
    reasons = Counter(outcome.reason for outcome in outcomes).most_common()
    told = "; ".join(f"{count}x {reason}" for reason, count in reasons)
    raise StudyFailedError(f"all {len(outcomes)} trials failed: {told}")


def _trial_id(trial: Trial) -> str:
    return str(trial.config["trial"]["trial_id"])


@contextmanager
def _quiet_tune(callback: str) -> Iterator[None]:
    """Tune with this callback and no output, and the process as it was before: Tune keeps its handler of Ctrl-C."""
    loggers = {name: logging.getLogger(name) for name in ("ray.tune", "ray.train")}
    levels = {name: logger.level for name, logger in loggers.items()}
    in_main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1)} if in_main else {}
    with _environment(_ENVIRONMENT | {"RAY_TUNE_CALLBACKS": callback}):
        for logger in loggers.values():
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for name, logger in loggers.items():
                logger.setLevel(levels[name])
            for number, handler in handlers.items():
                signal.signal(number, handler)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
