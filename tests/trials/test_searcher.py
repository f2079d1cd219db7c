import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from tiny_study import build_plan

from lowrank_tune.config.axes import SpaceSpec
from lowrank_tune.config.plan import Plan, make_plan
from lowrank_tune.config.points import count_points
from lowrank_tune.config.search import RequireSpec
from lowrank_tune.errors import InputError
from lowrank_tune.records import TrialConfig
from lowrank_tune.trials.drawing import auto_sampler, optuna_params, suggest
from lowrank_tune.trials.search import (
    StudySearcher,
    _drawn,
    migrate_search,
    open_optuna_study,
    told_epochs,
)

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
        result = {"epoch": epoch, self.plan.spec.steered_by: value, "stopped_by": "", "reason": ""}
        self.searcher.on_trial_result(tune_id, result)
        return result

    def end(self, tune_id: str, epoch: int, value: float, stopped_by: str, best: float | None = None) -> None:
        objective = self.plan.spec.steered_by
        best = value if best is None else best
        result = {"epoch": epoch, objective: value, f"best_{objective}": best, "stopped_by": stopped_by}
        self.searcher.on_trial_complete(tune_id, result)

    def reopened(self) -> optuna.Study:
        storage = JournalStorage(JournalFileBackend(str(self.path)))
        return optuna.load_study(study_name=self.plan.study_id, storage=storage)


@pytest.fixture
def driver(plan_of: PlanOf) -> Driver:
    return Driver(plan_of({"rank": [2, 4, 8], "lr": [0.1, 0.2]}))


IN_ORDER = [*((rank, 0.1) for rank in (2, 4, 8)), *((rank, 0.2) for rank in (2, 4, 8))]
"""Of that grid: what is nearest to the published defaults comes first, then the rest as it is."""


def test_a_grid_is_suggested_whole_in_order_and_then_is_finished(driver: Driver) -> None:
    suggested = []
    while (point := driver.suggest(f"t{len(suggested)}")) != StudySearcher.FINISHED:
        suggested.append(point["trial"])
    assert [(trial["rank"], trial["lr"]) for trial in suggested] == IN_ORDER
    assert [trial["origin"] for trial in suggested] == ["defaults"] * 3 + [""] * 3
    assert [trial["number"] for trial in suggested] == list(range(6))
    assert [trial.params for trial in driver.reopened().trials] == [{"rank": rank, "lr": lr} for rank, lr in IN_ORDER]


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


def test_a_trial_is_in_the_journal_whole_or_not_at_all(driver: Driver) -> None:
    """A driver that dies at any moment leaves whole trials, which the next one goes on with."""
    lines = driver.path.read_bytes().splitlines(keepends=True)
    driver.suggest("a")
    more = driver.path.read_bytes().splitlines(keepends=True)[len(lines) :]
    assert len(more) == 1
    after = Driver(driver.plan)
    points = [after.suggest(str(number))["trial"] for number in range(6)]
    assert [(point["rank"], point["lr"]) for point in points] == IN_ORDER
    assert after.suggest("none") == StudySearcher.FINISHED


def everything(driver: Driver, most: int = 1000) -> list[TrialConfig]:
    """What a searcher suggests, each with an error that follows from it, until it has finished."""
    found: list[TrialConfig] = []
    while len(found) < most and (point := driver.suggest(f"t{len(found)}")) != StudySearcher.FINISHED:
        found.append(TrialConfig(**point["trial"]))
        driver.end(f"t{len(found) - 1}", 1, 1 + found[-1].lr * found[-1].batch_size / found[-1].rank, "budget")
    return found


@pytest.mark.parametrize("method", ["random", "tpe"])
def test_of_60_points_200_trials_train_each_once(plan_of: PlanOf, method: str) -> None:
    space = {"rank": [2, 4, 8], "lr": [0.1, 0.2, 0.3, 0.4, 0.5], "batch_size": {"int": [1, 4]}}
    plan = plan_of(space, method=method, trials=200)
    assert plan.n_trials == 60
    driver = Driver(replace(plan, n_trials=200))
    found = everything(driver, 33)
    # Another process goes on, in a space that is a little wider.
    space |= {"lr": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]}
    wider = replace(plan, spec=plan_of(space, method=method, trials=200).spec, n_trials=200)
    migrate_search(wider, driver.path)
    again = Driver(wider)
    found += everything(again)
    assert len(found) == len({config.trains for config in found}) == 72
    assert again.searcher.stopped_for == "space"


def test_what_an_older_study_trained_without_a_metric_teaches_and_is_not_trained_again(plan_of: PlanOf) -> None:
    space: dict[str, Any] = {"rank": 4, "lr": [0.1, 0.2], "families": {"refined": {"steps": [2, 3]}}}
    driver = Driver(plan_of(space, method="tpe", trials=9))
    found = everything(driver)
    older = [replace(config, family_params={"steps": config.family_params["steps"]}) for config in found]
    assert [config.trains for config in older] == [config.trains for config in found]
    drawn = [_drawn(config, driver.plan.spec.search.space) for config in older]
    assert [fixed.params["refined.steps"] for fixed in drawn if fixed] == [it.family_params["steps"] for it in found]


def test_ranks_that_are_nested_are_one_configuration_whatever_their_order(plan_of: PlanOf) -> None:
    plans = [plan_of({"rank": {"nested": ranks}, "lr": [0.1, 0.2]}, "tpe", 9) for ranks in ([2, 4], [4, 2])]
    assert sorted(config.lr for config in everything(Driver(plans[0]))) == [0.1, 0.2]
    assert everything(Driver(replace(plans[0], spec=plans[1].spec, n_trials=9))) == []


def test_numbers_that_differ_in_the_seventh_digit_alone_are_not_both_trained(plan_of: PlanOf) -> None:
    driver = Driver(plan_of({"rank": 2, "lr": {"uniform": [0.1, 0.1 + 1e-9]}}, method="random", trials=9))
    assert len(everything(driver)) == 1
    assert driver.searcher.stopped_for == "space"


def test_each_group_begins_with_its_familys_published_defaults(plan_of: PlanOf) -> None:
    families = {"direct": {"lambda_b": {"loguniform": [1e-6, 1e-5]}}, "refined": {"steps": [3, 5, 1]}}
    space = {"families": families, "rank": [2, 8], "lr": {"loguniform": [1e-4, 1e-2]}, "batch_size": {"int": [2, 4]}}
    trials = everything(Driver(plan_of(space, method="tpe", trials=6)))
    first = [(trial.family, trial.rank, trial.family_params) for trial in trials[:4]]
    direct, refined = {"lambda_b": 1e-5, "lambda_ortho": 1e-3}, {"steps": 3, "metric": "none"}
    assert first == [("direct", 2, direct), ("direct", 8, direct), ("refined", 2, refined), ("refined", 8, refined)]
    assert {(trial.lr, trial.weight_decay, trial.batch_size) for trial in trials[:4]} == {(1e-3, 1e-5, 4)}
    assert [trial.origin for trial in trials] == ["defaults"] * 4 + [""] * 2
    (alone, *_) = everything(Driver(plan_of({"lr": 0.5, "rank": {"int": [4, 9]}}, method="random", trials=3)))
    assert (alone.rank, alone.lr, alone.origin) == (9, 0.5, "defaults")


def test_points_that_are_known_come_first_each_after_its_groups_defaults(plan_of: PlanOf) -> None:
    space = {"families": {"direct": {}, "refined": {"steps": [2, 3]}}, "rank": [2, 8], "lr": [1e-4, 1e-3, 1e-2]}
    plan = plan_of(space, method="tpe", trials=9)
    given = ({"family": "refined", "rank": 8, "steps": 3}, {"family": "refined", "rank": 8, "lr": 0.01})
    search = plan.spec.search.model_copy(update={"first": given})
    plan = make_plan(plan.spec.model_copy(update={"search": search}), plan.results, plan.started)
    driver = Driver(plan)
    trials = everything(driver, 4)
    assert [(trial.rank, trial.lr, trial.family_params, trial.origin) for trial in trials[:3]] == [
        (8, 1e-3, {"steps": 2, "metric": "none"}, "defaults"),
        (8, 1e-3, {"steps": 3, "metric": "none"}, "first"),
        (8, 1e-2, {"steps": 2, "metric": "none"}, "first"),
    ]
    # Another process trains none of them again.
    trials += everything(Driver(plan))
    assert Counter(trial.origin for trial in trials) == {"defaults": 4, "first": 2, "": 3}


few = st.lists(st.integers(1, 4), min_size=1, max_size=2, unique=True) | st.just({"int": [2, 4]})


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    ranks=few, sizes=few, steps=few, trials=st.integers(1, 12), deal=st.sampled_from(["evenly", "freely"]),
    method=st.sampled_from(["random", "tpe"]),
)  # fmt: skip
def test_whatever_the_space_no_configuration_comes_twice_and_none_is_left_out(
    tmp_path_factory: pytest.TempPathFactory, ranks: Any, sizes: Any, steps: Any, trials: int, deal: str, method: str
) -> None:
    space = {"rank": ranks, "batch_size": sizes, "families": {"sketch": {}, "refined": {"steps": steps}}}
    plan = build_plan(tmp_path_factory.mktemp("any"), space, method, trials)
    search = plan.spec.search.model_copy(update={"deal": deal})
    driver = Driver(replace(plan, spec=plan.spec.model_copy(update={"search": search})))
    found = everything(driver)
    assert len({config.trains for config in found}) == len(found) == plan.n_trials
    assert plan.n_trials == min(trials, count_points(search.space))


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


class TwoObjectives(Driver):
    """A driver of a study of bytes and error, whose epochs give all three figures."""

    def end_with(self, tune_id: str, size: float, error: float, stopped_by: str = "budget") -> None:
        result = {"epoch": 2, "val_bytes_at_error": size * error, "stopped_by": stopped_by}
        best = {"best_val_bytes": size, "best_val_error": error, "best_val_bytes_at_error": size * error}
        self.searcher.on_trial_complete(tune_id, result | best)


BOTH = {"objective": ["val_bytes", "val_error"], "target_error": 0.05}


def test_two_objectives_are_a_study_of_two_directions_whose_best_trials_are_the_front(plan_of: PlanOf) -> None:
    driver = TwoObjectives(plan_of({"rank": [2, 4, 8], "lr": [0.1, 0.2]}, **BOTH))
    told = {"a": (100, 0.5), "b": (200, 0.1), "c": (300, 0.2), "d": (100, 0.4)}
    for name, (size, error) in told.items():
        driver.suggest(name)
        driver.epoch(name, 1, size * error)
        driver.end_with(name, size, error, stopped_by="" if name == "c" else "budget")
    driver.suggest("running")
    driver.epoch("running", 1, 7.0)
    driver.suggest("crashed")
    driver.searcher.on_trial_complete("crashed", error=True)
    study = driver.reopened()
    assert [direction.name for direction in study.directions] == ["MINIMIZE", "MINIMIZE"]
    states = [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.PRUNED, TrialState.COMPLETE, TrialState.RUNNING]
    assert [trial.state for trial in study.trials] == [*states, TrialState.FAIL]
    assert {trial.number: trial.values for trial in study.best_trials} == {1: [200, 0.1], 3: [100, 0.4]}
    assert [told_epochs(trial) for trial in study.trials[2:5]] == [{1: 60.0, 2: 60.0}, {1: 40.0, 2: 40.0}, {1: 7.0}]
    # Optuna's own samplers go on with the file, pruned trials and all.
    study.sampler = optuna.samplers.TPESampler(seed=0, n_startup_trials=2)
    assert study.ask({"rank": CategoricalDistribution((2, 4, 8))}).params["rank"] in (2, 4, 8)


@pytest.mark.parametrize("method", ["grid", "random", "tpe"])
def test_a_search_of_two_objectives_goes_on_in_another_process(plan_of: PlanOf, tmp_path: Path, method: str) -> None:
    rates = [1e-3, 1e-2, 1e-1] if method == "grid" else {"loguniform": [1e-4, 1e-1]}
    trials = None if method == "grid" else 24
    space = {"families": {"shared": {"token_transform": ["none", "learned", "dct"]}, "sketch": {}}, "lr": rates}
    plan = plan_of(space, method=method, trials=trials, **BOTH)

    def draw(driver: TwoObjectives, numbers: range) -> list[Any]:
        drawn = []
        for number in numbers:
            drawn.append(driver.suggest(str(number))["trial"])
            size = 1e3 / drawn[-1]["lr"] ** 0.5
            driver.end_with(str(number), size, drawn[-1]["lr"], stopped_by="" if number % 4 == 3 else "budget")
        return drawn

    whole = draw(TwoObjectives(plan), range(plan.n_trials))
    first = draw(TwoObjectives(replace(plan, study_dir=tmp_path / "parted")), range(plan.n_trials - 4))
    parted = TwoObjectives(replace(plan, study_dir=tmp_path / "parted"))
    parted.suggest("at work")
    parted.epoch("at work", 3, 1.0)
    after = TwoObjectives(parted.plan)
    assert after.suggest("again") == {"trial": whole[plan.n_trials - 4], "reported": 3}
    after.end_with("again", 1e3 / whole[plan.n_trials - 4]["lr"] ** 0.5, whole[plan.n_trials - 4]["lr"])
    assert first == whole[: plan.n_trials - 4]
    words = {trial["family_params"].get("token_transform") for trial in whole}
    assert words == {"none", "learned", "dct", None}
    assert draw(after, range(plan.n_trials - 3, plan.n_trials)) == whole[-3:]
    assert after.suggest("none") == StudySearcher.FINISHED


def test_tpe_learns_of_both_objectives(plan_of: PlanOf) -> None:
    """Between 1e-4 and 1e-2 nothing is better in bytes and in error at once; all else is worse than one of its ends."""
    early, late = [], []
    for seed in range(3):
        plan = plan_of({"rank": 2, "lr": {"loguniform": [1e-8, 1.0]}}, method="tpe", trials=40, seed=seed, **BOTH)
        driver, outside = TwoObjectives(plan), []
        for number in range(plan.n_trials):
            place = math.log10(driver.suggest(str(number))["trial"]["lr"])
            outside.append(max(0.0, -4 - place, place + 2))
            driver.end_with(str(number), 1 + abs(place + 4), 1 + abs(place + 2))
        early += outside[:10]
        late += outside[-20:]
    assert sum(late) / len(late) < sum(early) / len(early) / 2


def test_a_wider_space_keeps_what_two_objectives_were_told(plan_of: PlanOf) -> None:
    space: dict[str, Any] = {"families": {"shared": {"token_transform": ["none", "dct"]}}, "lr": [0.1, 0.2]}
    driver = TwoObjectives(plan_of(space, **BOTH))
    for number in range(3):
        driver.suggest(str(number))
        driver.epoch(str(number), 1, 5.0)
        driver.end_with(str(number), 100 - number, 0.1 + number, stopped_by="" if number == 1 else "budget")
    space["families"] = {"shared": {"token_transform": ["none", "dct", "learned"]}}
    wider = plan_of(space, **BOTH)
    wider = replace(wider, study_id=driver.plan.study_id, study_dir=driver.plan.study_dir)
    migrate_search(wider, driver.path)
    trials = TwoObjectives(wider).reopened().trials
    assert [(trial.state.name, trial.values) for trial in trials] == [
        ("COMPLETE", [100, 0.1]), ("PRUNED", None), ("COMPLETE", [98, 2.1])
    ]  # fmt: skip
    assert [told_epochs(trial) for trial in trials] == [{1: 5.0, 2: 10.0}, {1: 5.0, 2: 99 * 1.1}, {1: 5.0, 2: 98 * 2.1}]
    assert trials[0].distributions["shared.token_transform"] == CategoricalDistribution(("none", "dct", "learned"))


REQUIRED = {"val_residual_ratio_worst": 1.5, "bytes": 1000}


@pytest.mark.parametrize("method", ["tpe", "gp"])
def test_a_sampler_learns_where_the_best_is_that_holds_what_is_required(plan_of: PlanOf, method: str) -> None:
    """The least error is at a rate of 1e-5, where too many bytes are taken; from 1e-3 on they suffice."""
    late: list[float] = []
    for seed in range(1 if method == "gp" else 2):
        plan = plan_of({"rank": 2, "lr": {"loguniform": [1e-6, 1.0]}}, method=method, trials=24, seed=seed)
        search = plan.spec.search.model_copy(update={"require": RequireSpec.model_validate(REQUIRED)})
        driver = Driver(replace(plan, spec=plan.spec.model_copy(update={"search": search})))
        for number in range(plan.n_trials):
            place = math.log10(driver.suggest(str(number))["trial"]["lr"])
            best = {"best_val_residual_ratio": 1 + abs(place + 5), "best_val_residual_ratio_worst": 1.2}
            best |= {"best_val_bytes": 1000.0 * 2 ** (-3 - place)}
            result = {
                "epoch": 1,
                "val_residual_ratio": 1 + abs(place + 5),
                "stopped_by": "" if number % 5 == 4 else "budget",
            }
            driver.searcher.on_trial_complete(str(number), {**result, **best})
            late += [place] if number >= 16 else []
        study = driver.reopened()
        assert math.log10(study.best_trial.params["lr"]) >= -3
        assert set(study.trials[0].constraints) == {"val_residual_ratio_worst", "val_bytes"}
        assert study.trials[4].state == TrialState.PRUNED
    assert abs(median(late) + 3) < 1


def test_a_gaussian_process_draws_what_it_would_have_in_another_process_and_nothing_twice(
    plan_of: PlanOf, tmp_path: Path
) -> None:
    space = {"families": {"direct": {"lambda_b": {"loguniform": [1e-6, 1e-2]}}}, "rank": [2, 4]}
    plan = plan_of({**space, "lr": [1e-4, 1e-3, 1e-2]}, method="gp", trials=15)
    whole = everything(Driver(plan))
    parted = Driver(replace(plan, study_dir=tmp_path))
    assert [*everything(parted, 13), *everything(Driver(parted.plan))] == whole
    assert len({config.trains for config in whole}) == 15


def test_a_sampler_that_is_not_installed_is_refused_with_what_serves() -> None:
    with pytest.raises(
        InputError, match=r"^search\.method: auto is .* no package that is installed here .* tpe or gp$"
    ):
        auto_sampler()
