"""A study's trainings on Ray Tune, without its output."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from optuna.trial import FrozenTrial, TrialState
from ray import tune
from ray.tune import Stopper
from ray.tune.experiment import Trial
from ray.tune.progress_reporter import TrialProgressCallback

from lowrank_tune.config.plan import Plan, confirmation_config
from lowrank_tune.errors import StudyFailedError
from lowrank_tune.records import FIGURES, StoppedFor, TrialConfig, TrialOutcome, TrialTracker
from lowrank_tune.trials.cluster_share import FairShare, studies_at_work, trials_at_once
from lowrank_tune.trials.outcomes import (
    begin_trial,
    outcome_of,
    read_history,
    read_outcomes,
    recovered_outcome,
    remove_checkpoint,
    write_outcome,
)
from lowrank_tune.trials.scheduler import make_scheduler
from lowrank_tune.trials.search import StudySearcher, config_of, open_optuna_study, sync_search
from lowrank_tune.trials.stopping import SearchEnd, StopTune
from lowrank_tune.trials.trainable import TrialActor

logger = logging.getLogger(__name__)

EPOCH_METRICS = ("epoch", "train_loss", *FIGURES, "lr", "seconds", "best_epoch", *(f"best_{x}" for x in FIGURES))
"""What observers hear of an epoch."""
_LOW_ON_MEMORY = "the node running low on memory"
"""What Ray says of a process that it has killed before the system would have."""


class WatchTrials(TrialProgressCallback):
    """Keeps how a study's trials ended, by id, and tells its observers, in order, of every start, epoch and end.

    An end is told once its outcome is on file. It stands in the place of Tune's own, which would keep every trial.
    """

    def __init__(
        self,
        trials_dir: Path,
        observers: Sequence[TrialTracker],
        outcomes: dict[str, TrialOutcome],
        end: SearchEnd | None = None,
    ) -> None:
        self.outcomes = outcomes
        self._end_of_search = end
        self._trials_dir = trials_dir
        self._observers = observers
        self._epochs: dict[str, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune's copy to restore a study from is not used."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        config = _config(trial)
        # Before its actor trains, so that what it leaves has a name whatever happens to this driver.
        _tell(begin_trial, self._trials_dir / config.trial_id, config)
        for observer in self._observers:
            _tell(observer.trial_started, config)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        trial_id = _trial_id(trial)
        metrics = {key: result[key] for key in EPOCH_METRICS if key in result}
        if metrics["epoch"] <= self._epochs.get(trial_id, 0):
            # A retry begins at its checkpoint, which may lie some epochs back.
            return
        self._epochs[trial_id] = int(metrics["epoch"])
        for observer in self._observers:
            _tell(observer.trial_epoch, trial_id, int(result["epoch"]), metrics)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._end(trial, crash="")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._end(trial, crash=_crash(trial))

    def search_ended(self, stopped_for: StoppedFor, told: str) -> None:
        for observer in self._observers:
            _tell(observer.search_ended, stopped_for, told)

    def _end(self, trial: Trial, crash: str) -> None:
        config = _config(trial)
        outcome = outcome_of(config, trial.last_result or {}, self._trials_dir / config.trial_id, crash)
        self._epochs.pop(config.trial_id, None)
        self.outcomes[config.trial_id] = outcome
        _tell(write_outcome, outcome)
        if self._end_of_search:
            self._end_of_search.trial_ended(outcome)
        for observer in self._observers:
            _tell(observer.trial_ended, outcome)


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
    watch: WatchTrials,
    name: str,
    *,
    space: Mapping[str, Any] | None = None,
    stop: Stopper | None = None,
    **search: Any,
) -> None:
    """Let Tune train, as many at a time as fit; InputError where a training asks for more than any node has.

    Each training is told to `watch`. `space` is `trial`, Tune's choice among several TrialConfigs as dicts, where no
    searcher suggests it; `search` is `TuneConfig`'s `search_alg`, `scheduler`, `num_samples`.
    """
    resources = plan.spec.resources
    # A searcher is asked for each trial what this study's part is.
    at_once = trials_at_once(resources, ray.nodes(), studies_at_work() if space else 1)
    shared = {
        "study_dir": str(plan.study_dir),
        "cpus": resources.cpus_per_trial,
        "gpus": resources.gpus_per_trial,
        "workers": resources.workers_per_trial,
    }
    with _quiet_tune():
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
                storage_path=str(plan.study_dir / "tune"),
                callbacks=[watch],
                stop=stop,
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                # Of what a trial meets only a lost process, node or file system reaches Tune; the rest it tells itself.
                failure_config=tune.FailureConfig(max_failures=MAX_RETRIES),
                verbose=0,
            ),
        ).fit()


def _trial_id(trial: Trial) -> str:
    return str(trial.config["trial"]["trial_id"])


@contextmanager
def _quiet_tune() -> Iterator[None]:
    """Tune without output, and the process as it was before: Tune keeps its handler of Ctrl-C."""
    loggers = {name: logging.getLogger(name) for name in ("ray.tune", "ray.train")}
    levels = {name: logger.level for name, logger in loggers.items()}
    in_main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1)} if in_main else {}
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)
    for logger in loggers.values():
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ.update({name: value} if value is not None else {})
        for name, logger in loggers.items():
            logger.setLevel(levels[name])
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run_trials(
    plan: Plan, observers: Sequence[TrialTracker], searched_s: Callable[[], float] = lambda: 0.0
) -> tuple[TrialOutcome, ...]:
    """Run the trials of a study that are not over yet on what `write_inputs` wrote; returns one outcome a trial.

    One that was being trained goes on from its checkpoint, and Optuna's journal holds all that searcher and scheduler
    knew. Tune itself starts afresh: its `restore` can neither extend a search nor trust refs that a killed cluster took
    along. `searched_s` tells the seconds of the study's search so far, over all its goes.

    Raises:
        InputError: a trial asks for more than any node has.
        StudyFailedError: every trial failed.
        KeyboardInterrupt: the study was interrupted; trials that had ended are on file, and those at work can go on.
    """
    trials_dir = plan.study_dir / "trials"
    study = open_optuna_study(plan, plan.study_dir / "tune" / "optuna.journal")
    ended = {key: outcome for key, outcome in read_outcomes(trials_dir).items() if not outcome.config.confirms}
    past = sync_search(plan, study, ended)
    for trial in past:
        config = TrialConfig(**trial.user_attrs["config"])
        if trial.state.is_finished() and config.trial_id not in ended:
            folder = trials_dir / config.trial_id
            ended[config.trial_id] = recovered_outcome(config, folder, read_history(folder), trial.state.name)
            write_outcome(ended[config.trial_id])
    over = sorted((trial for trial in past if trial.datetime_complete), key=lambda trial: str(trial.datetime_complete))
    end = SearchEnd(plan, (ended[trial.user_attrs["trial_id"]] for trial in over), searched_s)
    watch = WatchTrials(trials_dir, observers, ended, end)
    searcher = StudySearcher(plan, study, FairShare(plan.spec.resources), end)
    if len(ended) < plan.n_trials and not end.at_once:
        run_on_tune(
            plan,
            watch,
            "ray",
            search_alg=searcher,
            stop=StopTune(end),
            scheduler=make_scheduler(plan.spec, past),
            num_samples=plan.n_trials - len(ended),
        )
    at_work = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    if not searcher.stopped_for or (at_work and not end.at_once):
        raise KeyboardInterrupt
    told = end.why(searcher.stopped_for, len(watch.outcomes))
    watch.search_ended(searcher.stopped_for, told)
    for outcome in watch.outcomes.values():
        remove_checkpoint(outcome)
    outcomes = _by_number([*watch.outcomes.values(), *_cut_short(at_work, trials_dir)])
    if any(outcome.status != "failed" for outcome in outcomes):
        return outcomes
    if not outcomes:
        raise StudyFailedError(f"{told}; none of them has trained an epoch: raise it, and `extend` goes on")
    reasons = Counter(outcome.reason for outcome in outcomes).most_common()
    told = "; ".join(f"{count}x {reason}" for reason, count in reasons)
    raise StudyFailedError(f"all {len(outcomes)} trials failed: {told}")


def _by_number(outcomes: Sequence[TrialOutcome]) -> tuple[TrialOutcome, ...]:
    return tuple(sorted(outcomes, key=lambda outcome: outcome.config.number))


def _cut_short(at_work: Sequence[FrozenTrial], trials_dir: Path) -> Iterator[TrialOutcome]:
    """What trials have that the search's end found at work; nothing is written, for they may go on."""
    for config in filter(None, map(config_of, at_work)):
        folder = trials_dir / config.trial_id
        if history := read_history(folder):
            yield recovered_outcome(config, folder, history)


def confirm_trials(
    plan: Plan, winners: Sequence[TrialOutcome], observers: Sequence[TrialTracker]
) -> tuple[TrialOutcome, ...]:
    """Train each winner's configuration `report.confirm_seeds` times, without a scheduler; errors as `run_trials`.

    The winner's own training is not one of them: it was chosen for its figures, so that they are too good on average. A
    repetition that fails is an outcome like any other; one whose outcome is on file is not trained again.
    """
    repeats = range(1, plan.spec.report.confirm_seeds + 1)
    configs = [confirmation_config(plan, winner.config, repeat) for winner in winners for repeat in repeats]
    trials_dir = plan.study_dir / "trials"
    watch = WatchTrials(trials_dir, observers, read_outcomes(trials_dir))
    missing = [config for config in configs if config.trial_id not in watch.outcomes]
    if missing:
        run_on_tune(
            plan,
            watch,
            "ray-confirmation",
            space={"trial": tune.grid_search([asdict(config) for config in missing])},
        )
    if any(config.trial_id not in watch.outcomes for config in configs):
        raise KeyboardInterrupt
    repetitions = tuple(watch.outcomes[config.trial_id] for config in configs)
    for outcome in repetitions:
        remove_checkpoint(outcome)
    return repetitions
