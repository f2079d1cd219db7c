"""Whole studies on a real Ray, a real Optuna journal and a real trainer: tiny, and few, for each starts an actor."""

import gc
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from optuna.trial import TrialState
from ray.tune.experiment import Trial
from tiny_study import SPLIT, Interrupter, Listener, optuna_trials, run, write_features

from lowrank_tune.config.plan import Plan
from lowrank_tune.config.schema import ResourcesSpec
from lowrank_tune.errors import StudyFailedError
from lowrank_tune.records import FeatureSet, TrialConfig, TrialOutcome
from lowrank_tune.trials import cluster_share
from lowrank_tune.trials.cluster_share import FairShare, studies_at_work, taking_part
from lowrank_tune.trials.trial import write_inputs
from lowrank_tune.trials.tuning import run_trials

pytestmark = pytest.mark.usefixtures("ray_cluster")

PlanOf = Callable[..., Plan]


class Broken(Listener):
    def trial_started(self, config: TrialConfig) -> None:
        raise RuntimeError("the watcher is broken")


class Held(Listener):
    """Counts the trials that Tune holds whenever one ends, itself among them."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[int] = []

    def trial_ended(self, outcome: TrialOutcome) -> None:
        gc.collect()
        self.counts.append(sum(type(one) is Trial for one in gc.get_objects()))


def figures(outcomes: tuple[TrialOutcome, ...]) -> list[Any]:
    return [(outcome.config, outcome.status, outcome.epochs, outcome.best) for outcome in outcomes]


SHARED = {"token_transform": ["none", "learned"], "lambda_rate": {"loguniform": [3, 300]}}
TWO_OBJECTIVES = {"objective": ["val_bytes", "val_error"], "target_error": 0.5}


@pytest.mark.parametrize(
    ("families", "fastest", "sections"),
    [({"direct": {}, "sketch": {}}, 0.1, {}), ({"shared": SHARED, "sketch": {}}, 1.0, TWO_OBJECTIVES)],
    ids=["one objective", "two objectives"],
)
def test_an_interrupted_search_goes_on_as_if_it_had_not_been_and_trains_nothing_twice(
    plan_of: PlanOf,
    tiny_cache: FeatureSet,
    tmp_path: Path,
    families: dict[str, Any],
    fastest: float,
    sections: dict[str, Any],
) -> None:
    space = {"lr": {"loguniform": [1e-4, fastest]}, "families": families}
    asha = {"kind": "asha", "grace_epochs": 1, "reduction_factor": 2}
    plan = plan_of(space, method="tpe", trials=12, scheduler=asha, **sections)
    held = Held()
    whole = run(replace(plan, study_dir=tmp_path / "whole"), tiny_cache, held)
    assert {outcome.status for outcome in whole} == {"finished", "pruned"}
    # One ends, one ended before it, and the next may be waiting.
    assert len(held.counts) == 12
    assert max(held.counts) <= 3
    told, handler = Interrupter(8), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(plan, tiny_cache, told)
    assert signal.getsignal(signal.SIGINT) is handler
    assert len(told.ended) < 12
    outcomes = run(plan, tiny_cache, told)
    assert figures(outcomes) == figures(whole)
    assert tuple(sorted(told.ended, key=lambda outcome: outcome.config.number)) == outcomes
    assert all(plan.spec.steered_by in outcome.best for outcome in outcomes)
    values = {trial.number: trial.values for trial in optuna_trials(plan) if trial.state == TrialState.COMPLETE}
    assert values == {
        outcome.config.number: [outcome.best[name] for name in plan.spec.objectives]
        for outcome in outcomes
        if outcome.status == "finished"
    }
    assert not list(plan.study_dir.rglob("checkpoint*"))
    assert [(trial_id, epoch) for trial_id, epoch, _ in told.epochs] == [
        (outcome.config.trial_id, epoch) for outcome in outcomes for epoch in range(1, outcome.epochs + 1)
    ]
    for status in ("finished", "pruned"):
        over = next(outcome for outcome in outcomes if outcome.status == status)
        Path(over.directory, "outcome.json").write_text('{"config": ')
    assert run(plan, tiny_cache) == outcomes


def test_random_trials_run_two_at_a_time_whatever_an_observer_does_and_say_nothing(
    plan_of: PlanOf, tiny_cache: FeatureSet, capfd: pytest.CaptureFixture[str]
) -> None:
    space = {"families": {"direct": {}, "sketch": {}}, "lr": {"loguniform": [1e-4, 1e-2]}}
    plan, told = plan_of(space, method="random", trials=6, resources={"max_concurrent": 2}), Listener()
    capfd.readouterr()
    outcomes = run(plan, tiny_cache, Broken(), told)
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")
    assert [outcome.config.number for outcome in outcomes] == list(range(6))
    assert {outcome.config.family for outcome in outcomes} == {"direct", "sketch"}
    lrs = [(outcome.config.origin, outcome.config.lr) for outcome in outcomes]
    # Each of four groups, two families at two ranks, begins with its family's defaults.
    assert [lr for _, lr in lrs[:4]] == [0.001] * 4 and len(set(lrs)) == 3
    assert {outcome.status for outcome in outcomes} == {"finished"}
    assert len(told.started) == len(told.ended) == 6


def test_a_study_whose_trials_all_fail_fails_with_the_reasons_counted(
    plan_of: PlanOf, tmp_path: Path, images_NTD: torch.Tensor
) -> None:
    plan, told = plan_of({"rank": [2, 3, 4]}), Listener()
    write_inputs(plan.study_dir, write_features(tmp_path / "features", images_NTD), SPLIT)
    (tmp_path / "features" / "shards" / "00000.safetensors").unlink()
    with pytest.raises(StudyFailedError, match=r"all 3 trials failed: 3x .*00000.safetensors.*cannot be read"):
        run_trials(plan, [told])
    assert [outcome.status for outcome in told.ended] == ["failed"] * 3
    assert [trial.state for trial in optuna_trials(plan)] == [TrialState.FAIL] * 3


def test_a_study_makes_room_for_one_that_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_share, "_LOOK_EVERY_S", 0.0)
    share = FairShare(ResourcesSpec())
    assert (studies_at_work(), share()) == (0, 2)  # the Ray of these tests has two CPUs
    with taking_part("one"):
        assert (studies_at_work(), share()) == (1, 2)
        with taking_part("the-other"):
            assert (studies_at_work(), share()) == (2, 1)
    assert (studies_at_work(), share()) == (0, 2)


def test_a_space_that_has_no_more_points_ends_its_study_and_says_so(plan_of: PlanOf, tiny_cache: FeatureSet) -> None:
    plan, told = plan_of({"rank": [2, 3, 4]}, method="tpe", trials=9), Listener()
    assert plan.n_trials == 3
    # As of an extension, whose space may overlap with what has been tried.
    plan = replace(plan, n_trials=9)
    outcomes = run(plan, tiny_cache, told)
    assert [outcome.config.rank for outcome in outcomes] == [2, 3, 4]
    assert run(plan, tiny_cache, told) == outcomes
    assert (len(told.started), told.stopped_for) == (3, ["space", "space"])
