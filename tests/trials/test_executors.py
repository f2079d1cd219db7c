"""What holds whatever trains a trial: this very process, an actor on Ray, or a group of two workers there."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from optuna.trial import TrialState
from tiny_study import SPLIT, Interrupter, Killer, Listener, build_plan, optuna_trials, processes, run
from torch.distributed import get_rank

from lowrank_tune.config.plan import Plan, trial_config
from lowrank_tune.lowrank.decomposers import load_decomposer
from lowrank_tune.records import FeatureSet, TrialConfig, TrialOutcome
from lowrank_tune.trials import tuning
from lowrank_tune.trials.outcomes import CHECKPOINT, read_history
from lowrank_tune.trials.trainable import WorkerGroup
from lowrank_tune.trials.trial import run_one_trial, write_inputs

pytestmark = pytest.mark.usefixtures("ray_cluster")

SLOW, STUCK, BROKEN = 1e-5, 1e-30, 1e30  # float32 weights do not move at 1e-30, and overflow at 1e30
ACTOR = {"max_concurrent": 1}
WORKERS = ACTOR | {"workers_per_trial": 2}
RESOURCES = {"actor": ACTOR, "workers": WORKERS}
PROCESS = {"actor": "TrialActor", "workers": "TrialWorker"}


@dataclass(frozen=True)
class Ran:
    """A study of four trials that end in four ways; each has two batches of 3 images and one of 2."""

    plan: Plan
    outcomes: tuple[TrialOutcome, ...]
    told: Listener
    pids: frozenset[int]


def four_ways(results: Path, resources: dict[str, int]) -> Plan:
    return build_plan(
        results,
        {
            "families": {"direct": {"lambda_b": 1e-4, "lambda_ortho": 0.0}},
            "rank": 4,
            "batch_size": 3,
            "lr": [0.001, SLOW, STUCK, BROKEN],
        },
        training={"epochs": 4, "patience": 1},
        scheduler={"kind": "asha", "grace_epochs": 3, "reduction_factor": 2},
        objective="val_mse",
        resources=resources,
    )


def train_alone(
    config: TrialConfig, tiny_cache: FeatureSet, folder: Path, told: Listener | None = None
) -> TrialOutcome:
    write_inputs(folder / "alone", tiny_cache, SPLIT)
    return run_one_trial(config, folder / "alone", (told or Listener()).trial_epoch)


@pytest.fixture(scope="module")
def alone(tiny_cache: FeatureSet, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder, told = tmp_path_factory.mktemp("alone"), Listener()
    plan = four_ways(folder, ACTOR)
    configs = [trial_config(plan, number, point) for number, point in enumerate(plan.grid)]
    return Ran(plan, tuple(train_alone(config, tiny_cache, folder, told) for config in configs), told, frozenset())


@pytest.fixture(scope="module", params=["actor", "workers"])
def study(
    request: pytest.FixtureRequest,
    ray_cluster: None,
    tiny_cache: FeatureSet,
    tmp_path_factory: pytest.TempPathFactory,
) -> Ran:
    pids: set[int] = set()

    class Watching(Listener):
        def trial_epoch(self, trial_id: str, epoch: int, metrics: dict[str, float]) -> None:
            super().trial_epoch(trial_id, epoch, metrics)
            pids.update(process.pid for process in processes(PROCESS[request.param]))

    told = Watching()
    plan = four_ways(tmp_path_factory.mktemp(request.param), RESOURCES[request.param])
    return Ran(plan, run(plan, tiny_cache, told), told, frozenset(pids))


def ends(outcomes: tuple[TrialOutcome, ...]) -> list[tuple[str, str, int, int]]:
    return [(o.status, o.stopped_by, o.epochs, o.best_epoch) for o in outcomes]


def assert_equal_epochs(outcome: TrialOutcome, other: TrialOutcome) -> None:
    """Every epoch that one of them has as in the other, which may have been longer."""
    rows, others = (read_history(Path(each.directory)) for each in (outcome, other))
    for row, expected in zip(rows, others[: len(rows)], strict=True):
        assert row == pytest.approx(expected | {"seconds": row["seconds"]}, rel=1e-4)


def test_budget_patience_and_a_broken_loss_end_a_trial_that_is_alone(alone: Ran) -> None:
    assert ends(alone.outcomes) == [
        ("finished", "budget", 4, 4),
        ("finished", "budget", 4, 4),
        ("finished", "patience", 2, 1),
        ("failed", "error", 1, 0),
    ]


def test_budget_asha_patience_and_a_broken_loss_each_end_a_trial_of_a_study(study: Ran) -> None:
    assert ends(study.outcomes) == [
        ("finished", "budget", 4, 4),
        ("pruned", "asha", 3, 3),
        ("finished", "patience", 2, 1),
        ("failed", "error", 1, 0),
    ]
    assert "not finite" in study.outcomes[3].reason
    # No epoch is trained that was not asked for.
    assert [len(read_history(Path(outcome.directory))) for outcome in study.outcomes] == [4, 3, 2, 0]


def test_optuna_is_told_the_truth(study: Ran) -> None:
    trials = optuna_trials(study.plan)
    complete, pruned, failed = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL
    assert [trial.state for trial in trials] == [complete, pruned, complete, failed]
    for outcome, trial in zip(study.outcomes, trials, strict=True):
        history = read_history(Path(outcome.directory))
        assert list(trial.intermediate_values.values()) == [row["val_mse"] for row in history]


def test_a_trial_has_the_numbers_that_it_has_alone(study: Ran, alone: Ran) -> None:
    for outcome, other in zip(study.outcomes, alone.outcomes, strict=True):
        # What a search's trial comes from, one by itself does not know.
        assert replace(outcome.config, origin="") == other.config
        assert_equal_epochs(outcome, other)
    if study.plan.spec.resources.workers_per_trial == 1:
        assert [o.best for o in study.outcomes if o.epochs != 3] == [alone.outcomes[n].best for n in (0, 2, 3)]


def test_observers_are_told_of_every_start_epoch_and_end(study: Ran, alone: Ran) -> None:
    ids = [outcome.config.trial_id for outcome in study.outcomes]
    assert [config.trial_id for config in study.told.started] == ids
    told = [(trial_id, epoch) for trial_id, epoch, _ in study.told.epochs]
    assert told == [(i, epoch) for i, last in zip(ids, (4, 3, 2, 1), strict=True) for epoch in range(1, last + 1)]
    assert tuple(study.told.ended) == study.outcomes
    assert all(metrics["val_residual_ratio"] >= 1 - 1e-6 for _, epoch, metrics in study.told.epochs[:9])
    assert [(trial_id, epoch) for trial_id, epoch, _ in alone.told.epochs[:4]] == told[:4]


def test_a_trial_leaves_its_model_configuration_and_history(study: Ran) -> None:
    directory = Path(study.outcomes[0].directory)
    assert directory == study.plan.study_dir / "trials" / "r004-direct-0000"
    assert load_decomposer(directory / "best_model.safetensors").rank == 4
    assert json.loads((directory / "config.json").read_text())["trial_id"] == directory.name
    assert {path.name for path in directory.iterdir()} == {
        "best_model.safetensors", "config.json", "history.json", "outcome.json"
    }  # fmt: skip


def test_trials_share_their_processes_which_end_with_the_study(study: Ran) -> None:
    assert len(study.pids) == study.plan.spec.resources.workers_per_trial
    left = [process for title in PROCESS.values() for process in processes(title)]
    assert not psutil.wait_procs(left, timeout=30)[1]


@pytest.mark.parametrize("executor", list(RESOURCES))
def test_a_trial_that_loses_a_process_goes_on_and_one_that_keeps_losing_them_fails_alone(
    plan_of: Callable[..., Plan],
    tiny_cache: FeatureSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    executor: str,
) -> None:
    monkeypatch.setattr(tuning, "MAX_RETRIES", 1)
    space, training = {"batch_size": 3}, {"epochs": 4, "patience": 4}
    plan, told = plan_of(space, training=training, resources=RESOURCES[executor]), Killer(PROCESS[executor])
    first, second = run(plan, tiny_cache, told)
    assert (second.status, second.stopped_by) == ("failed", "error")
    assert "actor died" in second.reason
    assert ("worker " in second.reason) == (executor == "workers")
    assert (first.status, first.epochs) == ("finished", 4)
    assert [epoch for trial_id, epoch, _ in told.epochs if trial_id == first.config.trial_id] == [1, 2, 3, 4]
    assert_equal_epochs(first, train_alone(first.config, tiny_cache, tmp_path))
    assert not list(plan.study_dir.rglob(CHECKPOINT))
    assert [trial.state for trial in optuna_trials(plan)] == [TrialState.COMPLETE, TrialState.FAIL]


def test_of_a_group_of_workers_the_one_that_ran_out_of_memory_is_named() -> None:
    class Starved(dict[str, Any]):
        """Settings that the second worker has no memory for, which costs the first one its neighbour."""

        def __missing__(self, key: str) -> Any:
            raise MemoryError("a batch of 64 MiB") if get_rank() else ConnectionError("the neighbour is gone")

    group = WorkerGroup({"cpus": 0.5, "gpus": 0, "workers": 2})
    with pytest.raises(RuntimeError, match=r"^worker 2: out of memory: a batch of 64 MiB$"):
        group.ask("open", Starved())


def test_an_interrupted_trial_of_two_workers_goes_on_where_it_was(
    plan_of: Callable[..., Plan], tiny_cache: FeatureSet, tmp_path: Path
) -> None:
    plan, told = plan_of({"rank": 2}, training={"epochs": 4, "patience": 4}, resources=WORKERS), Interrupter(2)
    with pytest.raises(KeyboardInterrupt):
        run(plan, tiny_cache, told)
    assert len(list(plan.study_dir.rglob(CHECKPOINT))) == 1
    (outcome,) = run(plan, tiny_cache, told)
    assert [epoch for _, epoch, _ in told.epochs] == [1, 2, 3, 4]
    assert_equal_epochs(outcome, train_alone(outcome.config, tiny_cache, tmp_path))
