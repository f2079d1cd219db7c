"""When a search begins no more trials: told from its ended trials, and by whole studies on a real Ray."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from optuna.trial import TrialState
from test_searcher import Driver
from tiny_study import Listener, optuna_trials, run_for

from lowrank_tune.config.plan import Plan
from lowrank_tune.config.search import StopSpec
from lowrank_tune.records import FeatureSet, TrialConfig, TrialOutcome
from lowrank_tune.trials.search import StudySearcher, open_optuna_study
from lowrank_tune.trials.stopping import SearchEnd

PlanOf = Callable[..., Plan]
SPACE = {"families": {"direct": {}, "sketch": {}}, "rank": [2, 8], "lr": {"loguniform": [1e-4, 1e-2]}}


def stopping(plan: Plan, **stop: Any) -> Plan:
    search = plan.spec.search.model_copy(update={"stop": StopSpec.model_validate(stop)})
    return replace(plan, spec=plan.spec.model_copy(update={"search": search}))


class Course:
    """A search whose trials end one after the other, each with what `ends` makes of it."""

    def __init__(self, plan: Plan, ends: Callable[[TrialConfig], float | str], known: list[TrialOutcome]) -> None:
        self.plan, self.ends, self.outcomes = plan, ends, known
        self.end = SearchEnd(plan, known, lambda: 0.0)
        self.driver = Driver(plan)
        study = open_optuna_study(plan, self.driver.path)
        self.driver.searcher = StudySearcher(plan, study, end=self.end)

    def go(self, most: int = 100) -> None:
        while most and (point := self.driver.suggest("one")) != StudySearcher.FINISHED:
            config, most = TrialConfig(**point["trial"]), most - 1
            value = self.ends(config)
            failed = isinstance(value, str)
            best = {} if failed else {self.plan.spec.steered_by: float(value)}
            status, why, reason = ("failed", "error", str(value)) if failed else ("finished", "budget", "")
            outcome = TrialOutcome(config, status, why, 1, int(not failed), best, "", 1.0, reason)
            self.driver.end("one", 1, 0.0 if failed else float(value), outcome.stopped_by)
            self.end.trial_ended(outcome)
            self.outcomes.append(outcome)

    def count(self, **of: Any) -> int:
        return sum(of.items() <= outcome.config.point.items() for outcome in self.outcomes)


def test_a_rank_that_has_reached_the_target_leaves_its_share_to_the_others(plan_of: PlanOf) -> None:
    plan = stopping(plan_of(SPACE, method="random", trials=30), target=1.05)
    course = Course(plan, lambda config: 1.04 if (config.rank, config.family) == (8, "direct") else 1.5, [])
    course.go()
    # The first trial of each group, in their order: rank 8 is done with its direct one.
    assert [(c.family, c.rank) for c in (outcome.config for outcome in course.outcomes[:3])] == [
        ("direct", 2),
        ("direct", 8),
        ("sketch", 2),
    ]
    assert (course.count(rank=8), course.count(rank=2), len(course.outcomes)) == (1, 29, 30)
    assert course.driver.searcher.stopped_for == "trials"
    both = Course(replace(plan, study_dir=plan.study_dir / "both"), lambda config: 1.04, [])
    both.go()
    assert (len(both.outcomes), both.driver.searcher.stopped_for) == (2, "target")
    said = "the search ended after 2 of 30 trials: val_residual_ratio 1.05 is reached (search.stop.target)"
    assert both.end.why("target", 2) == said


@pytest.mark.parametrize("within", [(), ("family",)])
def test_a_rank_without_groups_of_its_own_reaches_the_target_for_itself_alone(
    plan_of: PlanOf, within: tuple[str, ...]
) -> None:
    scheduler = {"kind": "none", "compete_within": within}
    plan = stopping(plan_of(SPACE, method="random", trials=12, scheduler=scheduler), target=1.05)
    course = Course(plan, lambda config: 1.04 if config.rank == 8 else 1.5, [])
    course.go()
    assert course.count(rank=8)
    assert (len(course.outcomes), course.driver.searcher.stopped_for) == (12, "trials")


@pytest.mark.parametrize("method", ["grid", "random"])
def test_what_ended_some_groups_is_not_said_of_those_that_had_all_their_points(plan_of: PlanOf, method: str) -> None:
    space = {"families": {"sketch": {}}, "rank": [2, 8], "lr": [1e-4, 1e-3, 1e-2]}
    trials = {} if method == "grid" else {"trials": 30}
    plan = stopping(plan_of(space, method=method, **trials), target=1.05)
    course = Course(plan, lambda config: 1.04 if config.rank == 8 else 1.5, [])
    course.go()
    assert (course.count(rank=8), course.count(rank=2)) == (1, 3)
    told = course.end.why(course.driver.searcher.stopped_for or "trials", 4)
    assert "1 of 2 groups: val_residual_ratio 1.05 is reached" in told
    assert "1 of 2 groups: every configuration of its space has been tried" in told


@pytest.mark.parametrize("after", [0, 9])
def test_what_gains_no_more_ends_group_by_group_the_same_in_one_process_and_in_two(plan_of: PlanOf, after: int) -> None:
    """Every second trial of rank 8 is better by 1 %, those of rank 2 by too little to count."""
    plan = stopping(plan_of(SPACE, method="random", trials=40), no_gain={"trials": 3, "by": 0.005})

    def value(config: TrialConfig) -> float:
        seen = course.count(rank=8, family="direct")
        return 2 * 0.99 ** (seen // 2) if (config.rank, config.family) == (8, "direct") else 2 * 0.9999 ** len(seen_all)

    seen_all: list[TrialOutcome] = []
    course = Course(plan, value, seen_all)
    course.go(after or 100)
    if after:
        course = Course(plan, value, seen_all)
        course.go()
    first, others = course.count(rank=8, family="direct"), course.count(rank=2, family="sketch")
    # One that is the first gain, and three without.
    assert (others, first, len(seen_all)) == (4, 40 - 3 * 4, 40)
    still = stopping(plan_of(SPACE, method="random", trials=40), no_gain={"trials": 3, "by": 0.0})
    flat = Course(replace(still, study_dir=plan.study_dir / "flat"), lambda config: 1.5, [])
    flat.go()
    assert (len(flat.outcomes), flat.driver.searcher.stopped_for) == (16, "no_gain")
    assert flat.end.why("no_gain", 16).endswith("no more was gained by 3 trials in a row (search.stop.no_gain)")


def test_a_trial_at_work_may_let_its_group_go_on(plan_of: PlanOf) -> None:
    plan = stopping(plan_of({"lr": {"loguniform": [1e-4, 1e-2]}, "rank": 2}, "random", 9), no_gain={"trials": 2})
    course = Course(plan, lambda config: 1.5, [])
    late = TrialConfig(**course.driver.suggest("late")["trial"])
    course.go(3)
    assert course.driver.suggest("another") is None
    course.driver.end("late", 1, 1.1, "budget")
    course.end.trial_ended(TrialOutcome(late, "finished", "budget", 1, 1, {"val_residual_ratio": 1.1}, "", 1.0))
    assert course.driver.suggest("another")["trial"]["number"] == 4


def test_failures_alike_end_a_group_and_all_of_them_in_a_row_the_search(plan_of: PlanOf) -> None:
    plan = stopping(plan_of(SPACE, method="random", trials=40), alike_failures=4)

    def value(config: TrialConfig) -> float | str:
        return f"out of memory with {config.number} images" if config.rank == 8 else 1.5

    course = Course(plan, value, [])
    course.go()
    assert (course.count(rank=8, family="direct"), course.count(rank=8), len(course.outcomes)) == (4, 8, 40)
    unread = Course(replace(plan, study_dir=plan.study_dir / "all"), lambda config: "cannot be read", [])
    unread.go()
    assert (len(unread.outcomes), unread.driver.searcher.stopped_for) == (4, "alike_failures")
    apart = Course(replace(plan, study_dir=plan.study_dir / "apart"), lambda config: "ab"[config.number % 2], [])
    apart.go(12)
    assert len(apart.outcomes) == 12


@pytest.mark.usefixtures("ray_cluster")
def test_the_hours_end_a_study_at_once_and_what_is_at_work_goes_on_when_they_are_raised(
    plan_of: PlanOf, tiny_cache: FeatureSet
) -> None:
    whole = plan_of({"rank": [2, 3, 4]}, training={"epochs": 6, "patience": 6})
    told = Listener()

    def searched_s() -> float:
        return 3600.0 if len(told.epochs) >= 9 else 0.0

    outcomes = run_for(stopping(whole, hours=1), tiny_cache, searched_s, told)
    assert told.stopped_for == ["hours"]
    assert [outcome.stopped_by for outcome in outcomes] == ["budget", "interruption"]
    states = [trial.state for trial in optuna_trials(whole)]
    assert states[:2] == [TrialState.COMPLETE, TrialState.RUNNING]
    assert [path.parent.name for path in whole.study_dir.rglob("checkpoint.pt")] == [outcomes[1].config.trial_id]
    # A second look changes nothing.
    assert run_for(stopping(whole, hours=1), tiny_cache, searched_s, told) == outcomes
    again = run_for(stopping(whole, hours=2), tiny_cache, searched_s, told)
    assert [outcome.stopped_by for outcome in again] == ["budget"] * 3
    assert told.stopped_for == ["hours", "hours", "trials"]
    trained = [(trial_id, epoch) for trial_id, epoch, _ in told.epochs]
    assert trained == [(outcome.config.trial_id, epoch) for outcome in again for epoch in range(1, 7)]


def test_the_seconds_of_a_search_count_even_where_no_hours_end_it(plan_of: PlanOf) -> None:
    asked: list[float] = []
    end = SearchEnd(plan_of(), (), lambda: asked.append(0.0) or 0.0)  # type: ignore[func-returns-value]
    assert (end.at_once, len(asked)) == (None, 1)
