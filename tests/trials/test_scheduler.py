from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from optuna.trial import TrialState, create_trial
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

from lowrank_tune.config.plan import Plan
from lowrank_tune.trials.scheduler import FairASHA, Forgetful, make_scheduler

PlanOf = Callable[..., Plan]

# Learning-rate quality 0 (best) to 2; at epoch 3 a low rank is worse than every high rank, whatever its rate.
ERRORS = {(rank, quality): 1.0 / rank + 0.001 * quality for rank in (16, 64, 256) for quality in (0, 1, 2)}


def trial_of(name: str, rank: int, family: str = "sketch") -> Any:
    return SimpleNamespace(trial_id=name, config={"trial": {"rank": rank, "family": family}})


def survivors(scheduler: Any, objective: str = "val_mse") -> set[tuple[int, int]]:
    """Trials of three ranks and three qualities, high ranks first, all seen at epoch 3: who may go on."""
    alive = set()
    for (rank, quality), error in sorted(ERRORS.items(), key=lambda item: -item[0][0]):
        trial = trial_of(f"{rank}-{quality}", rank)
        scheduler.on_trial_add(None, trial)
        value = 1 - error if objective == "val_token_cosine" else error
        result = {"epoch": 3, objective: value, "stopped_by": ""}
        if scheduler.on_trial_result(None, trial, result) == TrialScheduler.CONTINUE:
            alive.add((rank, quality))
    return alive


def fair(plan_of: PlanOf, objective: str = "val_mse", **scheduler: Any) -> FairASHA:
    plan = plan_of(
        training={"epochs": 9, "patience": 9},
        scheduler={"kind": "asha", "grace_epochs": 3, "reduction_factor": 3, **scheduler},
        objective=objective,
    )
    made = make_scheduler(plan.spec)
    assert isinstance(made, FairASHA)
    return made


FAIR, PLAIN = {(16, 0), (64, 0), (256, 0)}, {(256, 0)}


@pytest.mark.parametrize(
    ("within", "objective", "alive"),
    [(["rank"], "val_mse", FAIR), (["rank"], "val_token_cosine", FAIR), ([], "val_mse", PLAIN)],
)
def test_plain_asha_kills_the_low_ranks_and_ours_does_not(
    plan_of: PlanOf, within: list[str], objective: str, alive: set[tuple[int, int]]
) -> None:
    plain = AsyncHyperBandScheduler("epoch", "val_mse", "min", max_t=9, grace_period=3, reduction_factor=3)
    assert survivors(plain) == PLAIN
    assert survivors(fair(plan_of, objective, compete_within=within), objective) == alive


def test_families_compete_apart_where_the_file_says_so(plan_of: PlanOf) -> None:
    for within, verdict in ((["rank"], TrialScheduler.STOP), (["rank", "family"], TrialScheduler.CONTINUE)):
        scheduler = fair(plan_of, compete_within=within)
        for name, family, value in (("good", "sketch", 0.1), ("poor", "direct", 0.9)):
            trial = trial_of(name, 16, family)
            scheduler.on_trial_add(None, trial)
            said = scheduler.on_trial_result(None, trial, {"epoch": 3, "val_mse": value, "stopped_by": ""})
        assert said == verdict


def test_nobody_is_stopped_before_the_grace_epochs_end(plan_of: PlanOf) -> None:
    scheduler = fair(plan_of)
    for name, value in (("good", 0.1), ("poor", 0.9)):
        trial = trial_of(name, 16)
        scheduler.on_trial_add(None, trial)
        for epoch in (1, 2):
            result = {"epoch": epoch, "val_mse": value, "stopped_by": ""}
            assert scheduler.on_trial_result(None, trial, result) == TrialScheduler.CONTINUE


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_failed_trial_counts_for_nobody(plan_of: PlanOf, value: float) -> None:
    scheduler = fair(plan_of)
    failed, next_one = trial_of("failed", 16), trial_of("next", 16)
    result = {"epoch": 3, "val_mse": value, "stopped_by": "error"}
    scheduler.on_trial_add(None, failed)
    assert scheduler.on_trial_result(None, failed, result) == TrialScheduler.CONTINUE
    tune = SimpleNamespace(_trials=[], _stopped_trials=set(), _failed_trials=set(), _trials_to_cache=set())
    scheduler.on_trial_complete(tune, failed, result)
    scheduler.on_trial_add(None, next_one)
    going_on = {"epoch": 3, "val_mse": 5.0, "stopped_by": ""}
    assert scheduler.on_trial_result(None, next_one, going_on) == TrialScheduler.CONTINUE


def test_without_asha_trials_run_to_their_end(plan_of: PlanOf) -> None:
    assert type(make_scheduler(plan_of(scheduler={"kind": "none"}).spec)) is Forgetful


def test_two_objectives_compete_by_bytes_at_the_target_error_those_of_an_earlier_process_too(plan_of: PlanOf) -> None:
    def past(number: int, value: float) -> Any:
        attributes = {"trial_id": f"past-{number}", "config": {"rank": 16, "family": "shared"}, "epoch 3": value}
        return create_trial(state=TrialState.PRUNED, user_attrs=attributes)

    plan = plan_of(
        training={"epochs": 9, "patience": 9},
        scheduler={"kind": "asha", "grace_epochs": 3, "reduction_factor": 3, "compete_within": ["rank"]},
        objective=["val_bytes", "val_error"],
        target_error=0.05,
    )
    for known, verdict in (([], TrialScheduler.CONTINUE), ([past(0, 10.0), past(1, 20.0)], TrialScheduler.STOP)):
        scheduler = make_scheduler(plan.spec, known)
        trial = trial_of("new", 16, "shared")
        scheduler.on_trial_add(None, trial)
        result = {"epoch": 3, "val_bytes": 1.0, "val_error": 1.0, "val_bytes_at_error": 30.0, "stopped_by": ""}
        assert scheduler.on_trial_result(None, trial, result) == verdict


def test_what_is_trained_in_the_answers_metric_competes_with_its_like_alone(plan_of: PlanOf) -> None:
    def goes_on(scheduler: FairASHA, metric: str, quality: int) -> bool:
        trial = trial_of(f"{metric}-{quality}", 16, "refined")
        trial.config["trial"]["family_params"] = {"metric": metric}
        scheduler.on_trial_add(None, trial)
        result = {"epoch": 3, "val_mse": 1 + quality + 5 * (metric == "answers"), "stopped_by": ""}
        return scheduler.on_trial_result(None, trial, result) == TrialScheduler.CONTINUE

    for within, expected in ((["rank", "family"], True), (["rank"], False)):
        scheduler = fair(plan_of, compete_within=within)
        assert all(goes_on(scheduler, "none", quality) for quality in (2, 1, 0))
        assert goes_on(scheduler, "answers", 0) is expected
