"""One pass of Ray Tune over a study's trainings: its resources, its actors, and no output of its own."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.experiment import Trial

from lowrank_tune.records import FeatureSet
from lowrank_tune.spec.plan import Plan
from lowrank_tune.trials.callback import Audience, told_to
from lowrank_tune.trials.lane_plan import fuses, plan_lanes
from lowrank_tune.trials.lanes import LaneTrialActor, open_lanes
from lowrank_tune.trials.paths import MaterialPaths
from lowrank_tune.trials.resources import trials_at_once
from lowrank_tune.trials.sharing import fair_part
from lowrank_tune.trials.trainable import TrialActor, actor_config

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
    shared = actor_config(
        material,
        audience.trials_dir,
        resources.cpus_per_trial,
        resources.gpus_per_trial,
        resources.workers_per_trial,
    )
    with told_to(audience) as callback, _actors(plan, material) as (actor, at_once, own), _quiet_tune(callback):
        shared |= own
        if space is not None and actor is TrialActor:
            # No searcher is asked what this study's part is.
            at_once = min(at_once, fair_part(resources))
        tune.Tuner(
            actor,
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


@contextmanager
def _actors(plan: Plan, material: MaterialPaths) -> Iterator[tuple[type[TrialActor], int, dict[str, Any]]]:
    """Yield what Tune runs, how many at a time, and what it is told beside what all are."""
    resources = plan.spec.resources
    at_once = trials_at_once(resources, ray.nodes())
    if not fuses(plan, FeatureSet.read(Path(material.features))):
        yield TrialActor, at_once, {}
        return
    # Lanes keep their places until the study's end, so they are this study's part of the cluster at its start.
    planned = plan_lanes(resources, fair_part(resources))
    with open_lanes(resources, planned, plan.study_id) as names:
        at_once = min(planned.at_once, len(names) * planned.members)
        yield LaneTrialActor, at_once, {"lanes": names, "share": planned.share}


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
