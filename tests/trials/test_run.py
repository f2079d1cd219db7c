"""Whole studies on a real Ray, a real Optuna journal and a real trainer; tiny, and few, for each starts an actor."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from tiny_study import Listener, World, build_plan, make_world, optuna_trials, processes, run

from lowrank_tune.config.plan import Plan
from lowrank_tune.errors import InputError, StudyFailedError
from lowrank_tune.lowrank.decomposers import load_decomposer
from lowrank_tune.lowrank.svd import Optimum
from lowrank_tune.records import TrialConfig, TrialOutcome
from lowrank_tune.trials.trial import run_one_trial

pytestmark = pytest.mark.usefixtures("ray_cluster")

PlanOf = Callable[..., Plan]

SLOW, STUCK, BROKEN = 1e-5, 1e-30, 1e30  # float32 weights do not move at 1e-30, and overflow at 1e30
DIRECT = {"families": {"direct": {"lambda_b": 1e-4, "lambda_ortho": 0.0}}}


@dataclass(frozen=True)
class Study:
    """A study that has run."""

    plan: Plan
    outcomes: tuple[TrialOutcome, ...]
    told: Listener
    pids: frozenset[int]


def optuna_states(plan: Plan) -> list[TrialState]:
    return [trial.state for trial in optuna_trials(plan)]


def figures(outcomes: tuple[TrialOutcome, ...]) -> list[Any]:
    return [(outcome.config, outcome.status, outcome.epochs, outcome.best) for outcome in outcomes]


@pytest.fixture(scope="module")
def grid(ray_cluster: None, world: World, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Two families at two ranks, all combinations."""
    pids: set[int] = set()

    class Watching(Listener):
        def trial_epoch(self, trial_id: str, epoch: int, metrics: dict[str, float]) -> None:
            super().trial_epoch(trial_id, epoch, metrics)
            pids.update(process.pid for process in processes("TrialActor"))

    told = Watching()
    plan = build_plan(tmp_path_factory.mktemp("grid"), {"families": {"direct": {}, "sketch": {}}})
    return Study(plan, run(plan, world, told), told, frozenset(pids))


def test_a_grid_runs_every_combination_to_its_budget(grid: Study) -> None:
    assert [(outcome.config.family, outcome.config.rank) for outcome in grid.outcomes] == [
        ("direct", 2),
        ("direct", 4),
        ("sketch", 2),
        ("sketch", 4),
    ]
    assert {(o.status, o.stopped_by, o.epochs) for o in grid.outcomes} == {("finished", "budget", 3)}
    assert optuna_states(grid.plan) == [TrialState.COMPLETE] * 4


def test_observers_are_told_of_every_start_epoch_and_end(grid: Study) -> None:
    ids = [outcome.config.trial_id for outcome in grid.outcomes]
    assert [config.trial_id for config in grid.told.started] == ids
    assert [(trial_id, epoch) for trial_id, epoch, _ in grid.told.epochs] == [(i, e) for i in ids for e in (1, 2, 3)]
    assert tuple(grid.told.ended) == grid.outcomes
    assert all(metrics["val_residual_ratio"] >= 1 - 1e-6 for _, _, metrics in grid.told.epochs)


def test_a_trial_leaves_its_model_configuration_and_history(grid: Study) -> None:
    outcome = grid.outcomes[3]
    directory = Path(outcome.directory)
    assert directory == grid.plan.study_dir / "trials" / "r004-sketch-0003"
    assert load_decomposer(directory / "best_model.safetensors").rank == 4
    assert json.loads((directory / "config.json").read_text())["trial_id"] == outcome.config.trial_id
    assert [row["epoch"] for row in json.loads((directory / "history.json").read_text())] == [1, 2, 3]


def test_all_trials_share_one_process(grid: Study) -> None:
    assert len(grid.pids) == 1


def test_a_trial_alone_has_the_numbers_that_it_has_in_a_study(grid: Study, world: World, tmp_path: Path) -> None:
    optimum = Optimum.load(world.optimum_path)
    for outcome in grid.outcomes:
        told = Listener()
        alone = run_one_trial(outcome.config, world.features, world.split, optimum, tmp_path, told.trial_epoch)
        assert figures((alone,)) == figures((outcome,))
        assert [epoch for _, epoch, _ in told.epochs] == [1, 2, 3]


def test_the_same_grid_gives_the_same_numbers_and_says_nothing(
    grid: Study, world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    again = run(replace(grid.plan, study_dir=tmp_path / "again"), world)
    said = capfd.readouterr()
    assert figures(again) == figures(grid.outcomes)
    assert (said.out, said.err) == ("", "")


def test_the_same_tpe_study_gives_the_same_numbers(plan_of: PlanOf, world: World, tmp_path: Path) -> None:
    asha = {"kind": "asha", "grace_epochs": 1}
    plan = plan_of({"lr": {"loguniform": [1e-4, 1e-1]}}, method="tpe", trials=14, scheduler=asha)
    first, second = (run(replace(plan, study_dir=tmp_path / name), world) for name in ("first", "second"))
    assert len(first) == 14
    assert figures(first) == figures(second)


def test_random_runs_as_many_trials_as_asked_two_at_a_time_whatever_a_watcher_does(
    plan_of: PlanOf, world: World
) -> None:
    class Broken(Listener):
        def trial_started(self, config: TrialConfig) -> None:
            raise RuntimeError("the watcher is broken")

    space = {"families": {"direct": {}, "sketch": {}}, "lr": {"loguniform": [1e-4, 1e-2]}}
    plan = plan_of(space, method="random", trials=6, resources={"max_concurrent": 2})
    outcomes = run(plan, world, Broken())
    assert [outcome.config.number for outcome in outcomes] == list(range(6))
    assert {outcome.config.family for outcome in outcomes} == {"direct", "sketch"}
    assert len({outcome.config.lr for outcome in outcomes}) == 6
    assert {outcome.status for outcome in outcomes} == {"finished"}


def test_an_exception_is_a_trials_reason(plan_of: PlanOf, tmp_path: Path, images_NTD: torch.Tensor) -> None:
    world = make_world(tmp_path / "features", images_NTD)
    (tmp_path / "features" / "shards" / "00000.safetensors").unlink()
    plan = plan_of({"rank": 2})
    with pytest.raises(StudyFailedError, match=r"all 1 trials failed: 1x .*00000.safetensors.*cannot be read"):
        run(plan, world)
    assert optuna_states(plan) == [TrialState.FAIL]


def test_a_study_of_broken_losses_fails_with_the_reasons_counted(plan_of: PlanOf, world: World) -> None:
    told = Listener()
    with pytest.raises(StudyFailedError, match="all 3 trials failed: 3x epoch 1: .* not finite"):
        run(plan_of(DIRECT | {"rank": [2, 3, 4], "lr": BROKEN}), world, told)
    assert [outcome.status for outcome in told.ended] == ["failed"] * 3


def test_an_interrupted_study_goes_on_as_if_it_had_not_been(plan_of: PlanOf, world: World, tmp_path: Path) -> None:
    class Interrupter(Listener):
        def trial_epoch(self, trial_id: str, epoch: int, metrics: dict[str, float]) -> None:
            super().trial_epoch(trial_id, epoch, metrics)
            if len(self.epochs) in {8, 17}:
                os.kill(os.getpid(), signal.SIGINT)

    space = {"lr": {"loguniform": [1e-4, 1e-1]}, "families": {"direct": {}, "sketch": {}}}
    asha = {"kind": "asha", "grace_epochs": 1, "reduction_factor": 2}
    plan = plan_of(space, method="tpe", trials=14, scheduler=asha)
    whole = run(replace(plan, study_dir=tmp_path / "whole"), world)
    told, handler = Interrupter(), signal.getsignal(signal.SIGINT)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(plan, world, told)
    assert signal.getsignal(signal.SIGINT) is handler
    assert len(told.ended) < 14
    outcomes = run(plan, world, told)
    assert figures(outcomes) == figures(whole)
    assert tuple(sorted(told.ended, key=lambda outcome: outcome.config.number)) == outcomes
    assert not list(plan.study_dir.rglob("checkpoint*"))
    assert [(trial_id, epoch) for trial_id, epoch, _ in told.epochs] == [
        (outcome.config.trial_id, epoch) for outcome in outcomes for epoch in range(1, outcome.epochs + 1)
    ]
    assert run(plan, world) == outcomes


def test_a_trial_that_no_node_can_hold_is_refused(plan_of: PlanOf, world: World) -> None:
    with pytest.raises(InputError, match=r"resources.gpus_per_trial: .* 0.5 GPU, .* more than 0"):
        run(plan_of(resources={"gpus_per_trial": 0.5}), world)


def test_a_study_may_steer_by_the_token_cosine_which_is_better_when_higher(plan_of: PlanOf, world: World) -> None:
    plan = plan_of(
        DIRECT | {"rank": 4, "lr": [0.001, SLOW]},
        scheduler={"kind": "asha", "grace_epochs": 2, "reduction_factor": 2},
        objective="val_token_cosine",
    )
    outcomes = run(plan, world)
    learned, slow = outcomes
    assert [outcome.status for outcome in outcomes] == ["finished", "pruned"]
    storage = JournalStorage(JournalFileBackend(str(plan.study_dir / "tune" / "optuna.journal")))
    study = optuna.load_study(study_name=plan.study_id, storage=storage)
    assert study.direction.name == "MAXIMIZE"
    assert slow.best["val_token_cosine"] < learned.best["val_token_cosine"] == study.best_value
    for outcome, trial in zip(outcomes, study.trials, strict=True):
        history = json.loads((Path(outcome.directory) / "history.json").read_text())
        assert list(trial.intermediate_values.values()) == [row["val_token_cosine"] for row in history]
