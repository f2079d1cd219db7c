import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from lowrank_tune.config.plan import Plan
from lowrank_tune.config.schema import SpaceSpec
from lowrank_tune.trials.search import StudySearcher, open_optuna_study, optuna_params, suggest

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


def test_a_trial_that_the_scheduler_stopped_is_pruned_at_its_epoch(driver: Driver) -> None:
    driver.suggest("a")
    driver.epoch("a", 1, 1.5)
    # Tune shows the searcher no result that its scheduler answered with a stop, but passes it on at the end.
    driver.end("a", 2, 1.4, stopped_by="")
    (trial,) = driver.reopened().trials
    assert trial.state == TrialState.PRUNED
    assert trial.intermediate_values == {1: 1.5, 2: 1.4}


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


def test_tpe_learns_from_what_it_was_told(plan_of: PlanOf) -> None:
    early, late = [], []
    for seed in range(5):
        plan = plan_of({"rank": 2, "lr": {"loguniform": [1e-6, 1.0]}}, method="tpe", trials=40, seed=seed)
        driver, distances = Driver(plan), []
        for number in range(plan.n_trials):
            distances.append(abs(math.log10(driver.suggest(str(number))["trial"]["lr"]) + 3))
            driver.end(str(number), 1, distances[-1], "budget")
        early += distances[:10]
        late += distances[-10:]
    assert median(late) < median(early) / 2


def test_trials_are_dealt_to_ranks_and_families_in_turn_and_each_is_searched_for_itself(
    plan_of: PlanOf, tmp_path: Path
) -> None:
    space = {"families": {"direct": {"lambda_b": {"loguniform": [1e-6, 1e-2]}}, "sketch": {}}, "rank": [2, 8]}
    nearest: dict[str, list[float]] = {}
    for deal in ("evenly", "freely"):
        drawn: dict[tuple[str, int], list[float]] = {}
        plan = plan_of(space | {"lr": {"loguniform": [1e-6, 1.0]}}, method="tpe", trials=80)
        search = plan.spec.search.model_copy(update={"deal": deal})
        plan = replace(plan, spec=plan.spec.model_copy(update={"search": search}), study_dir=tmp_path / deal)
        driver = Driver(plan)
        for number in range(80):
            trial = driver.suggest(str(number))["trial"]
            off = abs(math.log10(trial["lr"]) + 3)
            drawn.setdefault((trial["family"], trial["rank"]), []).append(off)
            # One rank's error is many times the other's.
            driver.end(str(number), 1, (1 + off) * 100 / trial["rank"] ** 2, "budget")
        assert (sorted(map(len, drawn.values())) == [20] * 4) == (deal == "evenly")
        nearest[deal] = [min(drawn.get((family, rank), [9.0])) for family in ("direct", "sketch") for rank in (2, 8)]
    assert sum(nearest["evenly"]) < sum(nearest["freely"])


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
    assert first != draw(
        Driver(replace(plan, spec=plan.spec.model_copy(update={"seed": 1}), study_dir=tmp_path)), range(12)
    )
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


def draw_from(
    space: dict[str, Any], fixed: dict[str, Any] | None = None
) -> tuple[dict[str, Any], optuna.trial.FrozenTrial]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    if fixed:
        study.enqueue_trial(fixed)
    trial = study.ask()
    point = suggest(trial, SpaceSpec.model_validate(space))
    return point, study.trials[-1]


def test_a_constant_and_a_list_of_one_are_no_parameters() -> None:
    point, trial = draw_from({"families": {"sketch": {}}, "rank": [16], "lr": 0.5})
    assert trial.params == {}
    assert point == {"family": "sketch", "rank": 16, "lr": 0.5, "weight_decay": 1e-5, "batch_size": 8}


@pytest.mark.parametrize(
    ("axis", "expected"),
    [
        ([1e-3, 1e-2], CategoricalDistribution((1e-3, 1e-2))),
        ({"uniform": [0.1, 0.2]}, FloatDistribution(0.1, 0.2)),
        ({"loguniform": [1e-4, 1e-2]}, FloatDistribution(1e-4, 1e-2, log=True)),
        ({"int": [2, 9]}, IntDistribution(2, 9)),
    ],
)
def test_a_value_that_varies_keeps_its_kind(axis: Any, expected: Any) -> None:
    name = "rank" if isinstance(expected, IntDistribution) else "lr"
    point, trial = draw_from({"families": {"sketch": {}}, name: axis})
    assert trial.distributions == {name: expected}
    assert point[name] == trial.params[name]
    assert type(point[name]) is (int if name == "rank" else float)


@pytest.mark.parametrize("family", ["direct", "sketch"])
def test_a_familys_own_parameters_are_drawn_for_it_alone(family: str) -> None:
    space = {"families": {"direct": {"lambda_b": {"loguniform": [1e-6, 1e-2]}}, "sketch": {}}}
    point, trial = draw_from(space, {"family": family})
    assert ("lambda_b" in point) == (family == "direct")
    assert ("direct.lambda_b" in trial.params) == (family == "direct")
    assert ("lambda_ortho" in point) == (family == "direct")


def test_an_enqueued_point_is_drawn_as_it_was() -> None:
    space = {"families": {"direct": {"lambda_b": [0.0, 0.5]}, "sketch": {}}, "rank": [2, 4], "lr": [0.1, 0.2]}
    wanted = {"family": "direct", "rank": 4, "lr": 0.2, "weight_decay": 1e-5, "batch_size": 8}
    wanted |= {"lambda_b": 0.5, "lambda_ortho": 1e-3}
    point, _ = draw_from(space, optuna_params(wanted))
    assert point == wanted
