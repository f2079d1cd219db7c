"""Repetitions of winners on a real Ray: all to their end, told apart from trials, and never a study's failure."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_study import SPLIT, Interrupter, Listener

from lowrank_tune.config.plan import Plan, trial_config
from lowrank_tune.records import FeatureSet, TrialOutcome
from lowrank_tune.trials.trial import run_one_trial, write_inputs
from lowrank_tune.trials.tuning import confirm_trials

pytestmark = pytest.mark.usefixtures("ray_cluster")

PlanOf = Callable[..., Plan]
BROKEN = 1e30  # float32 weights overflow
FOUND = {"val_residual_ratio": 1.2, "val_mse": 0.1, "val_token_cosine": 0.9}


def winner(plan: Plan, number: int, **params: Any) -> TrialOutcome:
    """A trial of the grid as the search left it; its files are not asked for."""
    config = trial_config(plan, number, {**plan.grid[number], **params})
    return TrialOutcome(config, "pruned", "asha", 1, 1, FOUND, "/nowhere", 1.0)


def confirm(
    plan: Plan, winners: list[TrialOutcome], tiny_cache: FeatureSet, told: Listener
) -> tuple[TrialOutcome, ...]:
    write_inputs(plan.study_dir, tiny_cache, SPLIT)
    return confirm_trials(plan, winners, [told])


def test_every_winner_is_repeated_to_its_end_with_seeds_of_its_own(
    plan_of: PlanOf, tiny_cache: FeatureSet, tmp_path: Path
) -> None:
    asha = {"kind": "asha", "grace_epochs": 1, "reduction_factor": 2}
    plan = plan_of(scheduler=asha, report={"confirm_seeds": 2})
    direct = {"family": "direct", "lambda_b": 0.0, "lambda_ortho": 0.0}
    winners, told = [winner(plan, 0), winner(plan, 1, **direct, lr=BROKEN)], Listener()
    repeats = confirm(plan, winners, tiny_cache, told)
    ids = [f"{found.config.trial_id}-s{repeat}" for found in winners for repeat in (1, 2)]
    assert [outcome.config.trial_id for outcome in repeats] == ids
    assert [outcome.config.confirms for outcome in repeats] == [trial_id[:-3] for trial_id in ids]
    sound, broken = repeats[:2], repeats[2:]
    assert {(outcome.status, outcome.stopped_by, outcome.epochs) for outcome in sound} == {("finished", "budget", 3)}
    assert {(outcome.status, outcome.stopped_by, outcome.best_epoch) for outcome in broken} == {("failed", "error", 0)}
    assert all("not finite" in outcome.reason for outcome in broken)
    assert len({outcome.best["val_residual_ratio"] for outcome in sound}) == 2
    for outcome in sound:
        directory = plan.study_dir / "trials" / outcome.config.trial_id
        assert directory == Path(outcome.directory)
        files = {path.name for path in directory.iterdir()}
        assert files == {"best_model.safetensors", "config.json", "history.json", "outcome.json"}
        assert json.loads((directory / "config.json").read_text())["confirms"] == outcome.config.confirms
    assert sorted(config.trial_id for config in told.started) == sorted(ids)
    assert sorted(outcome.config.trial_id for outcome in told.ended) == sorted(ids)
    torch.set_num_threads(1)
    write_inputs(tmp_path, tiny_cache, SPLIT)
    alone = run_one_trial(repeats[1].config, tmp_path, told.trial_epoch)
    assert (alone.config, alone.best) == (repeats[1].config, repeats[1].best)


def test_none_asked_for_is_none_run(plan_of: PlanOf, tiny_cache: FeatureSet) -> None:
    plan, told = plan_of(report={"confirm_seeds": 0}), Listener()
    assert confirm(plan, [winner(plan, 0)], tiny_cache, told) == ()
    assert confirm(plan_of(report={"confirm_seeds": 2}), [], tiny_cache, told) == ()
    assert told.started == []


def test_an_interruption_is_passed_on(plan_of: PlanOf, tiny_cache: FeatureSet) -> None:
    plan, told = plan_of(report={"confirm_seeds": 3}), Interrupter(3)
    with pytest.raises(KeyboardInterrupt):
        confirm(plan, [winner(plan, 0)], tiny_cache, told)
    assert len(told.ended) < 3
