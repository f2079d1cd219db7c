"""Whole studies whose trials train as one, on a real Ray: what comes out is what comes out of each alone."""

import os
import re
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from optuna.trial import TrialState
from test_run import optuna_states, run
from tiny_study import Listener, World

from lowrank_tune.config.plan import Plan
from lowrank_tune.lowrank.decomposers import load_decomposer
from lowrank_tune.lowrank.svd import Optimum
from lowrank_tune.records import TrialOutcome
from lowrank_tune.trials import lanes
from lowrank_tune.trials.outcomes import CHECKPOINT
from lowrank_tune.trials.trial import run_one_trial

pytestmark = pytest.mark.usefixtures("ray_cluster")

PlanOf = Callable[..., Plan]
FUSED: dict[str, Any] = {"fuse": "always", "max_concurrent": 2}


def processes(kind: str) -> list[psutil.Process]:
    """This test's own actors of a kind: children of the Ray that it started."""
    assert ray.is_initialized()
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if re.match(rf"ray::{kind}\b", " ".join(process.cmdline())):
                found.append(process)
    return found


def assert_no_lane_is_left() -> None:
    _, alive = psutil.wait_procs(processes("Lane"), timeout=60)
    assert not alive


def assert_as_alone(outcomes: tuple[TrialOutcome, ...], world: World, folder: Path) -> None:
    """Every outcome is the one of its configuration trained by itself, to its own end or as far as it got."""
    for outcome in outcomes:
        rows: list[dict[str, Any]] = []
        optimum = Optimum.load(world.optimum_path)
        alone = run_one_trial(
            outcome.config, world.features, world.split, optimum, folder / outcome.config.trial_id, rows.append
        )
        if outcome.status == "finished":
            assert (outcome.stopped_by, outcome.epochs) == (alone.stopped_by, alone.epochs)
        told = rows[outcome.epochs - 1]
        assert outcome.best_epoch == told["best_epoch"]
        assert outcome.best == pytest.approx({name: told[f"best_{name}"] for name in outcome.best}, rel=1e-5)
        assert load_decomposer(Path(outcome.directory) / "best_model.safetensors").rank == outcome.config.rank


def test_three_families_as_one_give_what_each_trial_gives_alone(plan_of: PlanOf, world: World, tmp_path: Path) -> None:
    seen: set[int] = set()

    class Watching(Listener):
        def trial_epoch(self, trial_id: str, epoch: int, metrics: dict[str, float]) -> None:
            super().trial_epoch(trial_id, epoch, metrics)
            seen.update(process.pid for process in processes("Lane"))

    space = {"families": {"direct": {}, "sketch": {}, "refined": {}}, "rank": 4, "lr": [1e-3, 2e-3]}
    plan, told = plan_of(space, resources=FUSED), Watching()
    outcomes = run(plan, world, told)
    assert [outcome.status for outcome in outcomes] == ["finished"] * 6
    assert_as_alone(outcomes, world, tmp_path / "alone")
    assert len(seen) == 1
    assert {(trial_id, epoch) for trial_id, epoch, _ in told.epochs} == {
        (outcome.config.trial_id, epoch) for outcome in outcomes for epoch in (1, 2, 3)
    }
    assert optuna_states(plan) == [TrialState.COMPLETE] * 6
    assert_no_lane_is_left()


def test_a_trial_that_asha_stops_leaves_and_the_others_go_on(plan_of: PlanOf, world: World, tmp_path: Path) -> None:
    # The last two begin when the first ones have filled the rungs, and hardly learn.
    plan = plan_of(
        {"families": {"direct": {}}, "rank": 4, "lr": [1e-3, 2e-3, 1e-6, 1e-7]},
        training={"epochs": 6, "patience": 6},
        scheduler={"kind": "asha", "grace_epochs": 1, "reduction_factor": 2},
        objective="val_mse",
        resources=FUSED,
    )
    outcomes = run(plan, world)
    assert {outcome.stopped_by for outcome in outcomes[:2]} <= {"budget", "asha"}
    assert [outcome.epochs for outcome in outcomes if outcome.status == "finished"]
    assert [(outcome.stopped_by, outcome.epochs) for outcome in outcomes[2:]] == [("asha", 1)] * 2
    assert_as_alone(outcomes, world, tmp_path / "alone")
    assert not list(plan.study_dir.rglob(CHECKPOINT))


class Killer(Listener):
    """Kills one process of a kind, once, when a trial has got somewhere."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self._kind = kind
        self.killed = 0

    def trial_epoch(self, trial_id: str, epoch: int, metrics: dict[str, float]) -> None:
        super().trial_epoch(trial_id, epoch, metrics)
        if epoch == 2 and not self.killed:
            processes(self._kind)[0].kill()
            self.killed += 1


@pytest.mark.parametrize("kind", ["Lane", "LaneTrialActor"], ids=["the lane", "one trial's own"])
def test_a_killed_process_is_replaced_and_every_trial_goes_on(
    plan_of: PlanOf, world: World, tmp_path: Path, kind: str
) -> None:
    plan = plan_of({"rank": 4, "lr": [1e-3, 2e-3]}, training={"epochs": 8, "patience": 8}, resources=FUSED)
    told = Killer(kind)
    outcomes = run(plan, world, told)
    assert told.killed == 1
    assert [(outcome.status, outcome.epochs) for outcome in outcomes] == [("finished", 8)] * 2
    assert_as_alone(outcomes, world, tmp_path / "alone")
    for outcome in outcomes:
        mine = [epoch for trial_id, epoch, _ in told.epochs if trial_id == outcome.config.trial_id]
        assert mine == list(range(1, 9))
    assert not list(plan.study_dir.rglob(CHECKPOINT))


def test_a_stopped_study_goes_on_with_what_each_trial_had(plan_of: PlanOf, world: World, tmp_path: Path) -> None:
    class Interrupter(Listener):
        def trial_epoch(self, trial_id: str, epoch: int, metrics: dict[str, float]) -> None:
            super().trial_epoch(trial_id, epoch, metrics)
            if len(self.epochs) == 6:
                os.kill(os.getpid(), signal.SIGINT)

    plan = plan_of({"rank": 4, "lr": [1e-3, 2e-3]}, training={"epochs": 8, "patience": 8}, resources=FUSED)
    told = Interrupter()
    with pytest.raises(KeyboardInterrupt):
        run(plan, world, told)
    assert len(list(plan.study_dir.rglob(CHECKPOINT))) == 2
    assert_no_lane_is_left()
    before = len(told.epochs)
    outcomes = run(plan, world, told)
    assert [(outcome.status, outcome.epochs) for outcome in outcomes] == [("finished", 8)] * 2
    assert_as_alone(outcomes, world, tmp_path / "alone")
    assert 6 <= before < 16
    assert sorted((trial_id, epoch) for trial_id, epoch, _ in told.epochs) == sorted(
        (outcome.config.trial_id, epoch) for outcome in outcomes for epoch in range(1, 9)
    )


def test_a_lane_that_gets_no_place_is_done_without(
    plan_of: PlanOf, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    @ray.remote(num_cpus=1)
    class Other:
        def here(self) -> bool:
            return True

    other = Other.remote()
    assert ray.get(other.here.remote())
    monkeypatch.setattr(lanes, "_PLACE_S", 5.0)
    try:
        # The Ray of these tests has two CPUs.
        plan = plan_of({"rank": 3, "lr": [1e-3, 2e-3, 3e-3, 4e-3]}, resources=FUSED | {"max_concurrent": 16})
        assert [outcome.status for outcome in run(plan, world)] == ["finished"] * 4
    finally:
        ray.kill(other)
    assert_no_lane_is_left()
