import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from lowrank_tune.config.plan import Plan
from lowrank_tune.trials.search import StudySearcher, open_optuna_study

PlanOf = Callable[..., Plan]


class Driver:
    """Speaks to a searcher as Tune does, and reads the study back as Optuna's own tools do."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.path = plan.study_dir / "tune" / "optuna.journal"
        self.searcher = StudySearcher(plan, open_optuna_study(plan, self.path))

    def suggest(self, tune_id: str) -> Any:
        return self.searcher.suggest(tune_id)

    def epoch(self, tune_id: str, epoch: int, value: float) -> dict[str, Any]:
        result = {"epoch": epoch, self.plan.spec.objective: value, "stopped_by": "", "reason": ""}
        self.searcher.on_trial_result(tune_id, result)
        return result

    def end(self, tune_id: str, epoch: int, value: float, stopped_by: str, best: float | None = None) -> None:
        objective = self.plan.spec.objective
        best = value if best is None else best
        result = {"epoch": epoch, objective: value, f"best_{objective}": best, "stopped_by": stopped_by}
        self.searcher.on_trial_complete(tune_id, result)

    def reopened(self) -> optuna.Study:
        storage = JournalStorage(JournalFileBackend(str(self.path)))
        return optuna.load_study(study_name=self.plan.study_id, storage=storage)


@pytest.fixture
def driver(plan_of: PlanOf) -> Driver:
    return Driver(plan_of({"rank": [2, 4, 8], "lr": [0.1, 0.2]}))


def test_a_grid_is_suggested_whole_in_order_and_then_is_finished(driver: Driver) -> None:
    suggested = []
    while (point := driver.suggest(f"t{len(suggested)}")) != StudySearcher.FINISHED:
        suggested.append(point["trial"])
    assert [(trial["rank"], trial["lr"]) for trial in suggested] == [(r, lr) for r in (2, 4, 8) for lr in (0.1, 0.2)]
    assert [trial["number"] for trial in suggested] == list(range(6))
    assert [trial.params for trial in driver.reopened().trials] == [
        {"rank": rank, "lr": lr} for rank in (2, 4, 8) for lr in (0.1, 0.2)
    ]


@pytest.mark.parametrize("stopped_by", ["budget", "patience"])
def test_a_trial_that_had_its_say_is_complete_with_its_best_value(driver: Driver, stopped_by: str) -> None:
    driver.suggest("a")
    driver.epoch("a", 1, 1.5)
    driver.epoch("a", 2, 1.2)
    driver.end("a", 3, 1.4, stopped_by, best=1.2)
    (trial,) = driver.reopened().trials
    assert (trial.state, trial.value) == (TrialState.COMPLETE, 1.2)
    assert trial.intermediate_values == {1: 1.5, 2: 1.2, 3: 1.4}
    assert trial.user_attrs["trial_id"] == trial.user_attrs["config"]["trial_id"] == "r002-sketch-0000"


def test_a_trial_that_the_scheduler_stopped_is_pruned_at_its_epoch(driver: Driver) -> None:
    driver.suggest("a")
    driver.epoch("a", 1, 1.5)
    # Tune shows the searcher no result that its scheduler answered with a stop, but passes it on at the end.
    driver.end("a", 2, 1.4, stopped_by="")
    (trial,) = driver.reopened().trials
    assert trial.state == TrialState.PRUNED
    assert trial.intermediate_values == {1: 1.5, 2: 1.4}


def test_a_failed_trial_has_no_value(driver: Driver) -> None:
    driver.suggest("a")
    driver.epoch("a", 1, 1.5)
    driver.end("a", 2, float("nan"), "error", best=1.5)
    (trial,) = driver.reopened().trials
    assert (trial.state, trial.value) == (TrialState.FAIL, None)
    assert trial.intermediate_values == {1: 1.5}


def test_a_crashed_trial_is_failed_and_one_at_work_stays_running(driver: Driver) -> None:
    driver.suggest("crashed")
    driver.suggest("running")
    driver.searcher.on_trial_complete("crashed", error=True)
    assert [trial.state for trial in driver.reopened().trials] == [TrialState.FAIL, TrialState.RUNNING]


def test_a_cosine_is_maximised(plan_of: PlanOf) -> None:
    driver = Driver(plan_of(objective="val_token_cosine"))
    for name, value in (("a", 0.5), ("b", 0.9)):
        driver.suggest(name)
        driver.end(name, 1, value, "budget")
    assert driver.reopened().best_trial.number == 1


@pytest.mark.parametrize("method", ["random", "tpe"])
def test_the_same_study_draws_the_same_points(plan_of: PlanOf, method: str, tmp_path: Any) -> None:
    def points(path: Any, seed: int) -> list[Any]:
        space = {"families": {"direct": {"lambda_b": {"loguniform": [1e-6, 1e-2]}}, "sketch": {}}}
        plan = plan_of(space | {"lr": {"loguniform": [1e-4, 1e-1]}}, method=method, trials=16, seed=seed)
        searcher = StudySearcher(plan, open_optuna_study(plan, path))
        drawn = []
        for number in range(plan.n_trials):
            point = searcher.suggest(str(number))
            assert isinstance(point, dict)
            drawn.append({**point["trial"], "seed": 0})
            value = abs(point["trial"]["lr"] - 0.01) + (point["trial"]["family"] == "direct")
            searcher.on_trial_complete(
                str(number),
                {"epoch": 1, "val_residual_ratio": value, "best_val_residual_ratio": value, "stopped_by": "budget"},
            )
        return drawn

    first = points(tmp_path / "a.journal", 0)
    assert first == points(tmp_path / "b.journal", 0)
    assert first != points(tmp_path / "c.journal", 1)


def test_tpe_learns_from_what_it_was_told(plan_of: PlanOf) -> None:
    early, late = [], []
    for seed in range(5):
        plan = plan_of({"lr": {"loguniform": [1e-6, 1.0]}}, method="tpe", trials=40, seed=seed)
        driver, distances = Driver(plan), []
        for number in range(plan.n_trials):
            distances.append(abs(math.log10(driver.suggest(str(number))["trial"]["lr"]) + 3))
            driver.end(str(number), 1, distances[-1], "budget")
        early += distances[:10]
        late += distances[-10:]
    assert median(late) < median(early) / 2


def test_a_search_that_another_process_goes_on_with_draws_what_it_would_have(plan_of: PlanOf, tmp_path: Path) -> None:
    space = {"families": {"direct": {"lambda_b": {"loguniform": [1e-6, 1e-2]}}, "sketch": {}}}
    plan = plan_of(space | {"lr": {"loguniform": [1e-4, 1e-1]}}, method="tpe", trials=16)

    def draw(driver: Driver, numbers: range) -> list[Any]:
        drawn = []
        for number in numbers:
            drawn.append(driver.suggest(str(number))["trial"])
            driver.end(str(number), 1, drawn[-1]["lr"], "budget")
        return drawn

    whole = draw(Driver(plan), range(16))
    parted = Driver(replace(plan, study_dir=tmp_path / "parted"))
    first = draw(parted, range(12))
    parted.suggest("at work")
    parted.epoch("at work", 2, 1.0)
    after = Driver(parted.plan)
    assert after.suggest("again") == {"trial": whole[12], "reported": 2}
    after.end("again", 3, whole[12]["lr"], "budget")
    assert [*first, whole[12], *draw(after, range(13, 16))] == whole
    assert after.suggest("none") == StudySearcher.FINISHED
    assert list(after.reopened().trials[12].intermediate_values) == [2, 3]


def test_a_point_that_waits_is_asked_for_once(driver: Driver) -> None:
    driver.suggest("a")
    driver.searcher._study.enqueue_trial({"rank": 2, "lr": 0.2})
    after = Driver(driver.plan)
    points = [after.suggest(str(number))["trial"] for number in range(6)]
    assert [(point["rank"], point["lr"]) for point in points] == [(r, lr) for r in (2, 4, 8) for lr in (0.1, 0.2)]
    assert after.suggest("none") == StudySearcher.FINISHED


def test_nothing_is_suggested_while_the_turn_is_others(plan_of: PlanOf) -> None:
    driver = Driver(plan_of())
    driver.searcher = StudySearcher(driver.plan, open_optuna_study(driver.plan, driver.path), share=lambda: 1)
    assert driver.suggest("a")
    assert driver.suggest("b") is None
    driver.end("a", 1, 1.0, "budget")
    assert driver.suggest("b")["trial"]["number"] == 1
