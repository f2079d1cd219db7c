"""Trials of two workers each, in studies on a real Ray: every worker a process of Ray Train's, exchanging over Gloo."""

import json
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import ray
from optuna.trial import TrialState
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from test_run import BROKEN, DIRECT, SLOW, STUCK, optuna_states, run
from tiny_study import Killer, Listener, World, build_plan

from lowrank_tune.config.plan import Plan
from lowrank_tune.errors import InputError, StudyFailedError
from lowrank_tune.lowrank.svd import Optimum
from lowrank_tune.records import TrialOutcome
from lowrank_tune.trials.outcomes import CHECKPOINT
from lowrank_tune.trials.trainable import _said
from lowrank_tune.trials.trial import run_one_trial

pytestmark = pytest.mark.usefixtures("ray_cluster")

PlanOf = Callable[..., Plan]

PAIR = {"workers_per_trial": 2, "max_concurrent": 1}
FAMILIES = {"direct": {}, "sketch": {}, "refined": {"steps": 2}}


def workers() -> list[psutil.Process]:
    """This test's own training processes, oldest first."""
    assert ray.is_initialized()
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return sorted(found, key=lambda process: process.create_time())


def last_worker() -> list[psutil.Process]:
    return workers()[-1:]


def all_ended() -> bool:
    return not psutil.wait_procs(workers(), timeout=30)[1]


def history(outcome: TrialOutcome) -> list[dict[str, float]]:
    rows = json.loads((Path(outcome.directory) / "history.json").read_text())
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def assert_as_alone(outcome: TrialOutcome, world: World, folder: Path) -> None:
    """Every epoch of a trial as it is in one process."""
    optimum = Optimum.load(world.optimum_path)
    alone = run_one_trial(outcome.config, world.features, world.split, optimum, folder / outcome.config.trial_id)
    assert (alone.status, alone.epochs) == (outcome.status, outcome.epochs)
    for row, expected in zip(history(outcome), history(alone), strict=True):
        assert row == pytest.approx(expected, rel=1e-4)


def test_a_study_of_two_workers_a_trial_has_the_numbers_of_one_and_keeps_its_workers(
    world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pids: set[int] = set()

    class Watching(Listener):
        def trial_epoch(self, trial_id: str, epoch: int, metrics: dict[str, float]) -> None:
            super().trial_epoch(trial_id, epoch, metrics)
            pids.update(process.pid for process in workers())

    told = Watching()
    space = {"families": FAMILIES, "rank": 4, "batch_size": 3}  # batches of 3, 3 and 2 images
    plan = build_plan(tmp_path / "results", space, resources=PAIR)
    outcomes = run(plan, world, told)
    said = capfd.readouterr()
    assert [outcome.config.family for outcome in outcomes] == list(FAMILIES)
    assert [(outcome.status, outcome.epochs) for outcome in outcomes] == [("finished", 3)] * 3
    assert [epoch for _, epoch, _ in told.epochs] == [1, 2, 3] * 3
    assert len(pids) == 2
    assert all_ended()
    assert (said.out, said.err) == ("", "")
    for outcome in outcomes:
        assert 0 < outcome.seconds < sum(row["seconds"] for row in read(outcome)) * 1.001
        assert_as_alone(outcome, world, tmp_path)


def read(outcome: TrialOutcome) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = json.loads((Path(outcome.directory) / "history.json").read_text())
    return rows


def test_budget_asha_patience_and_a_broken_loss_each_end_a_trial(plan_of: PlanOf, world: World) -> None:
    plan = plan_of(
        DIRECT | {"rank": 4, "lr": [0.001, SLOW, STUCK, BROKEN]},
        training={"epochs": 4, "patience": 1},
        scheduler={"kind": "asha", "grace_epochs": 3, "reduction_factor": 2},
        objective="val_mse",
        resources=PAIR,
    )
    outcomes = run(plan, world)
    assert [(o.status, o.stopped_by, o.epochs, o.best_epoch) for o in outcomes] == [
        ("finished", "budget", 4, 4),
        ("pruned", "asha", 3, 3),
        ("finished", "patience", 2, 1),
        ("failed", "error", 1, 0),
    ]
    assert "not finite" in outcomes[3].reason
    # Workers train no epoch that was not asked for.
    assert [len(read(outcome)) for outcome in outcomes[:3]] == [4, 3, 2]


def test_a_trial_that_loses_a_worker_goes_on_with_others(plan_of: PlanOf, world: World, tmp_path: Path) -> None:
    plan, told = (
        plan_of({"batch_size": 3}, training={"epochs": 4, "patience": 4}, resources=PAIR),
        Killer(last_worker, again=False),
    )
    outcomes = run(plan, world, told)
    for outcome in outcomes:
        assert [epoch for trial_id, epoch, _ in told.epochs if trial_id == outcome.config.trial_id] == [1, 2, 3, 4]
        assert_as_alone(outcome, world, tmp_path)
    assert not list(plan.study_dir.rglob(CHECKPOINT))


def test_a_trial_that_keeps_losing_workers_fails_and_says_so(plan_of: PlanOf, world: World) -> None:
    plan = plan_of({"rank": 2}, training={"epochs": 9, "patience": 9}, resources=PAIR)
    with pytest.raises(StudyFailedError, match="all 1 trials failed: 1x .*worker [12]: actor died"):
        run(plan, world, Killer(last_worker, again=True))


def test_an_interrupted_study_goes_on_where_it_was(plan_of: PlanOf, world: World, tmp_path: Path) -> None:
    class Interrupter(Listener):
        def trial_epoch(self, trial_id: str, epoch: int, metrics: dict[str, float]) -> None:
            super().trial_epoch(trial_id, epoch, metrics)
            if len(self.epochs) == 6:
                os.kill(os.getpid(), signal.SIGINT)

    plan, told = plan_of(training={"epochs": 4, "patience": 4}, resources=PAIR), Interrupter()
    with pytest.raises(KeyboardInterrupt):
        run(plan, world, told)
    assert len(list(plan.study_dir.rglob(CHECKPOINT))) == 1
    assert all_ended()
    outcomes = run(plan, world, told)
    assert [epoch for _, epoch, _ in told.epochs] == [1, 2, 3, 4] * 2
    assert optuna_states(plan) == [TrialState.COMPLETE] * 2
    for outcome in outcomes:
        assert_as_alone(outcome, world, tmp_path)


def test_more_workers_than_there_is_room_for_are_refused(plan_of: PlanOf, world: World) -> None:
    with pytest.raises(InputError, match=r"resources.workers_per_trial: .* 3 workers .* room for 2"):
        run(plan_of(resources={"workers_per_trial": 3}), world)


@pytest.mark.parametrize(
    ("failures", "said"),
    [
        (
            {0: ConnectionError("worker 1 of 2 has lost the others"), 1: ValueError("odd\nmore")},
            "worker 2: ValueError: odd",
        ),
        ({0: MemoryError("full")}, "worker 1: out of memory: full"),
        (
            {1: OutOfMemoryError("1 worker(s) were killed\nstatistics")},
            "worker 2: out of memory: 1 worker(s) were killed",
        ),
        ({1: ActorDiedError()}, "worker 2: actor died: The actor died unexpectedly before finishing this task."),
    ],
)
def test_a_crew_that_has_ended_names_the_worker_that_was_first_and_why(
    failures: dict[int, Exception], said: str
) -> None:
    wrapped = {rank: WorkerHealthCheckFailedError("health", failure) for rank, failure in failures.items()}
    assert _said(WorkerGroupError("text", wrapped)) == said
    assert _said(ray.cloudpickle.loads(ray.cloudpickle.dumps(WorkerGroupError("text", failures)))) == said
