"""Two studies on one Ray: the one that came first gives the other its part."""

from contextlib import ExitStack
from pathlib import Path

import pytest
from tiny_study import Listener, World, build_plan

from lowrank_tune.records import TrialConfig
from lowrank_tune.trials import tuning
from lowrank_tune.trials.tuning import run_trials, studies_at_work, taking_part

pytestmark = pytest.mark.usefixtures("ray_cluster")


def test_a_study_that_fills_the_cluster_makes_room_for_one_that_comes(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "_LOOK_EVERY_S", 0.0)
    space = {"rank": [2, 3, 4, 5, 6, 7], "lr": [1e-3, 1e-2]}
    plan = build_plan(tmp_path, space, training={"epochs": 40, "patience": 40}, resources={})
    at_work: list[int] = []

    class Watching(Listener):
        def trial_started(self, config: TrialConfig) -> None:
            super().trial_started(config)
            at_work.append(len(self.started) - len(self.ended))
            if at_work[-1] == 2 and studies_at_work() == 1:
                stack.enter_context(taking_part("the-other"))

    with ExitStack() as stack:
        stack.enter_context(taking_part(plan.study_id))
        assert studies_at_work() == 1
        told = Watching()
        outcomes = run_trials(plan, world.features, world.split, world.optimum_path, [told])
        assert studies_at_work() == 2
    assert studies_at_work() == 0
    assert [outcome.status for outcome in outcomes] == ["finished"] * 12
    # The Ray of these tests has two CPUs. What had been begun, or chosen, when the other came goes on.
    assert max(at_work) == 2
    assert at_work[-3:] == [1] * 3
