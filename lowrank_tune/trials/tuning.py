"""One pass of Ray Tune over a study's trainings: its resources, its actors, and no output of its own."""

from __future__ import annotations

import copy
import logging
import math
import os
import signal
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ray
from optuna.trial import FixedTrial, FrozenTrial
from ray import tune
from ray.tune import Callback
from ray.tune.experiment import Trial
from ray.util import placement_group, placement_group_table, remove_placement_group

from lowrank_tune.config.plan import Plan, confirmation_config
from lowrank_tune.config.schema import ResourcesSpec, SpaceSpec
from lowrank_tune.errors import InputError, StudyFailedError
from lowrank_tune.records import FeatureSet, Split, TrialConfig, TrialOutcome, TrialTracker
from lowrank_tune.trials.outcomes import (
    MaterialPaths,
    begin_trial,
    outcome_of,
    read_outcomes,
    recovered_outcome,
    remove_checkpoints,
    write_material,
    write_outcome,
)
from lowrank_tune.trials.scheduler import PastTrial, make_scheduler
from lowrank_tune.trials.search import StudySearcher, config_of, open_optuna_study, optuna_params, settle, suggest
from lowrank_tune.trials.trainable import TrialActor, actor_config

_SLACK = 1e-9  # 4 trials of 0.25 GPUs fit on one, whatever floating point says


def trials_at_once(spec: ResourcesSpec, nodes: Iterable[Mapping[str, Any]]) -> int:
    """How many trials run at a time: as many as fit, or fewer where the study file says so.

    Args:
        spec: as for `trials_that_fit`.
        nodes: as for `trials_that_fit`.

    Raises:
        InputError: as `trials_that_fit` does.
    """
    fit = trials_that_fit(spec, nodes)
    return min(fit, spec.max_concurrent or fit)


def trials_that_fit(spec: ResourcesSpec, nodes: Iterable[Mapping[str, Any]]) -> int:
    """How many trials the cluster has room for.

    Args:
        spec: what one trial needs; each of its workers must fit on one node.
        nodes: as `ray.nodes()` describes them.

    Raises:
        InputError: no node can hold a trial's worker, or all of them together not all of its workers; the message says
            what there is.
    """
    needs = {"CPU": ("cpus_per_trial", spec.cpus_per_trial), "GPU": ("gpus_per_trial", spec.gpus_per_trial)}
    owned = [node["Resources"] for node in nodes if node["Alive"]]
    for resource, (key, need) in needs.items():
        most = max((has.get(resource, 0.0) for has in owned), default=0.0)
        if need > most + _SLACK:
            raise InputError(
                f"resources.{key}: a trial asks for {need:g} {resource}, but no node of this Ray has more than "
                f"{most:g}; lower it, or run where there are enough"
            )
    wanted = [(resource, need) for resource, (_, need) in needs.items() if need > 0]
    fit = sum(min(int(has.get(resource, 0.0) / need + _SLACK) for resource, need in wanted) for has in owned)
    if fit == 0:
        raise InputError(
            f"resources: no node of this Ray has {spec.cpus_per_trial:g} CPU and {spec.gpus_per_trial:g} GPU together; "
            "lower cpus_per_trial or gpus_per_trial"
        )
    trials = fit // spec.workers_per_trial
    if trials == 0:
        raise InputError(
            f"resources.workers_per_trial: a trial asks for {spec.workers_per_trial} workers of "
            f"{spec.cpus_per_trial:g} CPU and {spec.gpus_per_trial:g} GPU each, but this Ray has room for {fit}; "
            "lower it, or run where there are enough"
        )
    return trials


_NAME = "lowrank-tune study "
_LOOK_EVERY_S = 2.0


@contextmanager
def taking_part(study_id: str) -> Iterator[None]:
    """Let the other studies of this cluster know of this one until the block ends, or this driver does.

    Args:
        study_id: the study; Ray is initialised by the caller.
    """
    # Of what it reserves, one byte, only the name is wanted. Ray removes it with the driver that made it.
    sign = placement_group([{"memory": 1}], name=f"{_NAME}{study_id}")
    try:
        yield
    finally:
        remove_placement_group(sign)


def studies_at_work() -> int:
    """How many studies of this cluster extract features or train now."""
    groups = placement_group_table().values()
    return sum(group["name"].startswith(_NAME) and group["state"] != "REMOVED" for group in groups)


def fair_part(resources: ResourcesSpec) -> int:
    """A study's part of as many trials as fit, whatever others leave unused; at least one.

    Args:
        resources: what a trial needs.

    Raises:
        InputError: none fits.
    """
    return math.ceil(trials_that_fit(resources, ray.nodes()) / max(1, studies_at_work()))


class FairShare:
    """How many trials a study may have at work while it runs: its part, or fewer where the study file says so.

    Args:
        resources: what a trial needs.
    """

    def __init__(self, resources: ResourcesSpec) -> None:
        self._resources = resources
        self._share, self._looked_at = 1, -math.inf

    def __call__(self) -> int:
        """At least one; looked up at most every two seconds."""
        now = time.monotonic()
        if now - self._looked_at > _LOOK_EVERY_S:
            self._looked_at = now
            # While a node is lost, nothing may fit; what fitted before is the best guess.
            with suppress(InputError):
                part = fair_part(self._resources)
                self._share = min(part, self._resources.max_concurrent or part)
        return self._share


logger = logging.getLogger(__name__)

EPOCH_METRICS = (
    "epoch",
    "train_loss",
    "val_mse",
    "val_token_cosine",
    "val_residual_ratio",
    "lr",
    "seconds",
    "best_epoch",
    "best_val_mse",
    "best_val_token_cosine",
    "best_val_residual_ratio",
)


_LOW_ON_MEMORY = "the node running low on memory"
"""What Ray says of a process that it has killed before the system would have."""


@dataclass(frozen=True, slots=True)
class Audience:
    """Who is told of a study's trials.

    Attributes:
        trials_dir: `studies/<study_id>/trials`.
        observers: told side by side, in this order, of an end once its outcome is on file.
        outcomes: of the trials that are over, by trial id.
    """

    trials_dir: Path
    observers: Sequence[TrialTracker]
    outcomes: dict[str, TrialOutcome] = field(default_factory=dict)


@contextmanager
def told_to(audience: Audience) -> Iterator[str]:
    """Let the callback of a study that is run in this block tell `audience`.

    Yields:
        What RAY_TUNE_CALLBACKS must hold. A callback that Tuner is handed as an object makes Ray import MLflow, only to
        count it in its usage statistics: two seconds before the first trial.
    """
    token = _AUDIENCE.set(audience)
    try:
        yield f"{WatchTrials.__module__}.{WatchTrials.__name__}"
    finally:
        _AUDIENCE.reset(token)


class WatchTrials(Callback):
    """Tells its audience of every trial's start, epochs and end; Tune makes it by its name."""

    def __init__(self) -> None:
        self._audience = _AUDIENCE.get()
        self._seconds: dict[str, float] = {}
        self._epochs: dict[str, int] = {}

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial has an actor to run on."""
        config = _config(trial)
        # Before its actor trains, so that what it leaves has a name whatever happens to this driver.
        _tell(begin_trial, self._audience.trials_dir / config.trial_id, config)
        for observer in self._audience.observers:
            _tell(observer.trial_started, config)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """An epoch ended."""
        trial_id = _config(trial).trial_id
        metrics = {key: result[key] for key in EPOCH_METRICS if key in result}
        # Tune's own clock would count the imports of an actor's first trial as training.
        self._seconds[trial_id] = result["trained_seconds"]
        if metrics["epoch"] <= self._epochs.get(trial_id, 0):
            # A retry begins at its checkpoint, which may lie some epochs back.
            return
        self._epochs[trial_id] = int(metrics["epoch"])
        for observer in self._audience.observers:
            _tell(observer.trial_epoch, trial_id, int(result["epoch"]), metrics)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial is over by its own word or the scheduler's."""
        self._end(trial, crash="")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial's process raised or died."""
        self._end(trial, crash=_crash(trial))

    def _end(self, trial: Trial, crash: str) -> None:
        config, last = _config(trial), trial.last_result or {}
        directory = self._audience.trials_dir / config.trial_id
        outcome = outcome_of(config, last, directory, self._seconds.pop(config.trial_id, 0.0), crash)
        self._epochs.pop(config.trial_id, None)
        self._audience.outcomes[config.trial_id] = outcome
        _tell(write_outcome, self._audience.trials_dir, outcome)
        for observer in self._audience.observers:
            _tell(observer.trial_ended, outcome)
        _forget(trial)


def _forget(trial: Trial) -> None:
    """Let go of what Tune keeps of each trial until its very end: most of what a driver grows by."""
    # What an actor answered when it was asked where it is; Ray keeps the answer and its task for as long as this lives.
    trial._default_result_or_future = None
    trial.run_metadata.metric_analysis.clear()
    trial.run_metadata.metric_n_steps.clear()


_AUDIENCE: ContextVar[Audience] = ContextVar("audience")


def _config(trial: Trial) -> TrialConfig:
    return TrialConfig(**trial.config["trial"])


def _tell(hear: Callable[..., None], *said: Any) -> None:
    try:
        hear(*said)
    except Exception:
        logger.exception("a watcher of the trials failed; the study goes on")


def _crash(trial: Trial) -> str:
    """The line of Tune's error file that says what happened: a traceback's last, else the message's first."""
    try:
        lines = [line.strip() for line in Path(trial.error_file).read_text(encoding="utf-8").splitlines()]
    except (OSError, TypeError):
        return "its process died"
    # Tune opens the file with a heading of its own.
    said = [line for line in lines if line][1:]
    if said and _LOW_ON_MEMORY in said[0]:
        return f"out of memory: {said[0]}"
    traceback = any(line.startswith(("Traceback", "File ", "ray::")) for line in said)
    return said[-1 if traceback else 0] if said else "its process died"


MAX_RETRIES = 2
"""How often a trial whose process or node died is begun again, from its last checkpoint, wherever there is room."""
_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no result.json, progress.csv and TensorBoard files beside ours
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # an outcome carries its reason
    "RAY_AIR_NEW_OUTPUT": "0",  # the newer reporter prints tables whatever the verbosity
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # The journal and the trials' own files hold all that a resumed study needs; Tune's snapshots of itself would only
    # be written, once at the start and once at the end.
    "TUNE_GLOBAL_CHECKPOINT_S": "inf",
}


def run_on_tune(
    plan: Plan,
    material: MaterialPaths,
    audience: Audience,
    name: str,
    *,
    space: Mapping[str, Any] | None = None,
    **search: Any,
) -> None:
    """Let Tune train, as many at a time as fit; Ray is initialised by the caller.

    Args:
        plan: the study.
        material: what its trainings share.
        audience: told of each; holds every outcome afterwards, unless Tune was interrupted.
        name: of Tune's own folder in `tune/`.
        space: `trial`, a TrialConfig as a dict or Tune's choice among several, where no searcher suggests it.
        search: of `TuneConfig`: `search_alg`, `scheduler`, `num_samples`.

    Raises:
        InputError: a training asks for more than any node has.
    """
    resources = plan.spec.resources
    at_once = trials_at_once(resources, ray.nodes())
    if space is not None:
        # No searcher is asked what this study's part is.
        at_once = min(at_once, fair_part(resources))
    shared = actor_config(
        material,
        audience.trials_dir,
        resources.cpus_per_trial,
        resources.gpus_per_trial,
        resources.workers_per_trial,
    )
    with told_to(audience) as callback, _quiet_tune(callback):
        tune.Tuner(
            TrialActor,
            param_space={**shared, **(space or {})},
            tune_config=tune.TuneConfig(
                max_concurrent_trials=at_once,
                reuse_actors=True,
                trial_name_creator=_trial_id,
                trial_dirname_creator=_trial_id,
                **search,
            ),
            run_config=tune.RunConfig(
                name=name,
                storage_path=str((plan.study_dir / "tune").absolute()),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                # Of what a trial meets only a lost process, node or file system reaches Tune; the rest it tells itself.
                failure_config=tune.FailureConfig(max_failures=MAX_RETRIES),
                verbose=0,
            ),
        ).fit()


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


def run_trials(
    plan: Plan,
    features: FeatureSet,
    split: Split,
    optimum_path: Path,
    observers: Sequence[TrialTracker],
) -> tuple[TrialOutcome, ...]:
    """Run the trials of a study that are not over yet; Ray is initialised by the caller.

    A trial with an outcome on file is not trained again. One that was being trained goes on from its checkpoint, and
    searcher and scheduler know all that they knew: Optuna's journal holds it. Tune itself starts afresh: its own
    `restore` can neither extend a search nor trust refs that a killed cluster took along.

    Args:
        plan: the study.
        features: its features; only their path travels to the actors.
        split: which images train, validate and judge.
        optimum_path: the validation split's optimum.
        observers: told of every trial that is trained here.

    Returns:
        One outcome a trial, in the order of their numbers.

    Raises:
        InputError: a trial asks for more than any node has.
        StudyFailedError: every trial failed.
        KeyboardInterrupt: the study was interrupted; trials that had ended are on file, and those at work can go on.
    """
    tune_dir, trials_dir = plan.study_dir / "tune", plan.study_dir / "trials"
    material = write_material(tune_dir, features, split, optimum_path)
    study = open_optuna_study(plan, tune_dir / "optuna.journal")
    ended = {key: outcome for key, outcome in read_outcomes(trials_dir).items() if not outcome.config.confirms}
    past = []
    for trial in settle(plan, study, ended):
        config = config_of(trial)
        if config is None:
            continue
        past.append(PastTrial(config, trial.intermediate_values, trial.state.is_finished()))
        if trial.state.is_finished() and config.trial_id not in ended:
            ended[config.trial_id] = recovered_outcome(trial, trials_dir)
            write_outcome(trials_dir, ended[config.trial_id])
    audience = Audience(trials_dir, observers, ended)
    if len(ended) < plan.n_trials:
        run_on_tune(
            plan,
            material,
            audience,
            "ray",
            search_alg=StudySearcher(plan, study, FairShare(plan.spec.resources)),
            scheduler=make_scheduler(plan.spec, past),
            num_samples=plan.n_trials - len(ended),
        )
    if len(audience.outcomes) < plan.n_trials:
        raise KeyboardInterrupt
    outcomes = tuple(sorted(audience.outcomes.values(), key=lambda outcome: outcome.config.number))
    remove_checkpoints(trials_dir, outcomes)
    _require_one_success(outcomes)
    return outcomes


def _require_one_success(outcomes: tuple[TrialOutcome, ...]) -> None:
    if any(outcome.status != "failed" for outcome in outcomes):
        return
    reasons = Counter(outcome.reason for outcome in outcomes).most_common()
    told = "; ".join(f"{count}x {reason}" for reason, count in reasons)
    raise StudyFailedError(f"all {len(outcomes)} trials failed: {told}")


def confirm_trials(
    plan: Plan,
    winners: Sequence[TrialOutcome],
    features: FeatureSet,
    split: Split,
    optimum_path: Path,
    observers: Sequence[TrialTracker],
) -> tuple[TrialOutcome, ...]:
    """Train each winner's configuration `report.confirm_seeds` times, to its budget or its patience.

    No scheduler stops a repetition, no searcher learns of it, and the winner's own training is not one of them: it was
    chosen for its figures, so that they are too good on average. A repetition that fails is an outcome like any other,
    and one whose outcome is on file is not trained again.

    Args:
        plan: the study.
        winners: trials of its search.
        features: its features; only their path travels to the actors.
        split: which images train, validate and judge.
        optimum_path: the validation split's optimum.
        observers: told of every repetition.

    Returns:
        By winner and repetition; the directories are `trials/<trial_id>-s<repetition>`.

    Raises:
        InputError: a training asks for more than any node has.
        KeyboardInterrupt: the study was interrupted.
    """
    repeats = range(1, plan.spec.report.confirm_seeds + 1)
    configs = [confirmation_config(plan, winner.config, repeat) for winner in winners for repeat in repeats]
    if not configs:
        return ()
    trials_dir = plan.study_dir / "trials"
    material = write_material(plan.study_dir / "tune", features, split, optimum_path)
    audience = Audience(trials_dir, observers, read_outcomes(trials_dir))
    missing = [config for config in configs if config.trial_id not in audience.outcomes]
    if missing:
        run_on_tune(
            plan,
            material,
            audience,
            "ray-confirmation",
            space={"trial": tune.grid_search([asdict(config) for config in missing])},
        )
    if any(config.trial_id not in audience.outcomes for config in configs):
        raise KeyboardInterrupt
    repetitions = tuple(audience.outcomes[config.trial_id] for config in configs)
    remove_checkpoints(trials_dir, repetitions)
    return repetitions


def widen_journal(plan: Plan, path: Path) -> None:
    """Write a study's journal anew for its plan's search space, in one step.

    Optuna lets no parameter of a study change its choices, so the trials move into a study of the same name whose
    parameters are the new ones; what they taught the searcher it knows on, also where a list became a range. A trial
    outside the new space keeps its place and its figures, and teaches nothing.

    Args:
        plan: the study as it is to be.
        path: its journal.
    """
    old = open_optuna_study(plan, path)
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)
    new = open_optuna_study(plan, partial)
    new.add_trials(_moved(trial, plan.spec.search.space) for trial in old.get_trials(deepcopy=False))
    partial.replace(path)


def _moved(trial: FrozenTrial, space: SpaceSpec) -> FrozenTrial:
    moved, config = copy.deepcopy(trial), config_of(trial)
    fixed = _drawn(_point(config), space) if config is not None else None
    moved.distributions = dict(fixed.distributions) if fixed else {}
    moved.params = {name: fixed.params[name] for name in fixed.distributions} if fixed else {}
    return moved


def _drawn(point: dict[str, Any], space: SpaceSpec) -> FixedTrial | None:
    """A trial that drew this point from the space; None when the space has no such point."""
    fixed = FixedTrial(optuna_params(point))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of a value outside its range
        try:
            return fixed if suggest(fixed, space) == point else None
        except (KeyError, ValueError, UserWarning):
            return None


def _point(config: TrialConfig) -> dict[str, Any]:
    shared = {name: getattr(config, name) for name in ("family", "rank", "lr", "weight_decay", "batch_size")}
    return {**shared, **config.family_params}
