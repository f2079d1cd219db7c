"""What refuses a study before it leaves a trace: ranks and words that its features do not have."""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from lowrank_tune.checks import check_space, with_first_points
from lowrank_tune.cluster.study_dir import create_study, read_plan
from lowrank_tune.config.axes import FamiliesSpec
from lowrank_tune.config.loading import parse_study
from lowrank_tune.config.plan import Plan, make_plan, trial_config
from lowrank_tune.config.points import first_params
from lowrank_tune.errors import InputError
from lowrank_tune.lowrank.decomposers import FAMILIES
from lowrank_tune.records import TrialOutcome
from lowrank_tune.trials.outcomes import write_outcome


def space(rank: Any, families: str, *overrides: str) -> Any:
    text = "name: a\nfeatures: {source: {tensors: cache}}\nsearch: {space: {rank: 8, families: {sketch: }}}\n"
    given = (f"search.space.rank={rank}", f"search.space.families={{{families}}}", *overrides)
    return parse_study(text, "study.yaml", given)


def test_the_study_file_and_the_models_know_the_same_families_parameters_and_limits() -> None:
    every = FamiliesSpec.model_validate(dict.fromkeys(FamiliesSpec.model_fields))
    assert list(every.chosen()) == list(FAMILIES)
    for name, own in every.chosen().items():
        metric = ["metric"] if FAMILIES[name].weighable else []
        assert sorted(type(own).model_fields) == sorted([*metric, *FAMILIES[name].params])
    assert every.limited() == [name for name, family in FAMILIES.items() if family.highest_rank(4, 6) == 4]


@pytest.mark.parametrize(
    ("study", "message"),
    [
        (
            space("[8, 17]", "sketch: "),
            r"space\.rank: 17 is above min\(tokens, dim\) = .* = 16.* so of sketch; lower it$",
        ),
        (
            space(17, "refined: , shared: "),
            r"17 is above min.* so of refined; lower it; shared alone may go on to dim$",
        ),
        (space("{int: [2, 25]}", "shared: "), r"space\.rank: 25 is above dim = 24, the most of shared"),
        (space(24, "shared: "), r"^objective: ρ has no meaning at rank 24.*val_bytes_at_error"),
        (space("{nested: [4, 17]}", "shared: "), r"^objective: ρ has no meaning at rank 17"),
    ],
)
def test_a_rank_that_the_features_do_not_have_is_refused_with_the_family_and_the_key(study: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_space(study, 16, 24)


@pytest.mark.parametrize("objective", ["val_mse", "val_token_cosine", "val_bytes_at_error", "[val_bytes, val_error]"])
def test_shared_alone_goes_up_to_dim_by_what_has_a_meaning_there(objective: str) -> None:
    target = ["target_error=0.1"] if "bytes" in objective else []
    check_space(space(24, "shared: ", f"objective={objective}", *target), 16, 24)
    check_space(space(16, "shared: , direct: "), 16, 24)
    check_space(space(12, "shared: , direct: "), 16, 12)
    with pytest.raises(
        InputError, match=r"13 is above min\(tokens, dim\) = min\(16, 12\) = 12.* so of shared; lower it$"
    ):
        check_space(space(13, "shared: ", "objective=val_mse"), 16, 12)


@pytest.mark.parametrize("transform", ["dct", "[none, dct]"])
def test_a_dct_needs_a_square_grid_of_tokens(transform: str) -> None:
    study = space(8, f"shared: {{token_transform: {transform}}}")
    check_space(study, 16, 24)
    with pytest.raises(
        InputError, match=r"families\.shared\.token_transform: dct needs .* 15 are none; make it learned"
    ):
        check_space(study, 15, 24)
    check_space(space(8, "shared: {token_transform: [none, learned]}"), 15, 24)


def test_a_search_begins_with_the_best_of_each_rank_of_an_earlier_study(tmp_path: Path) -> None:
    def plan_of(rank: Any, *overrides: str) -> Plan:
        return make_plan(space(rank, "sketch: , refined: ", *overrides), tmp_path, datetime(2026, 2, 1, tzinfo=UTC))

    past = plan_of("[4, 8]", "search.space.lr={loguniform: [1e-4, 1]}")
    create_study(past, "")
    (past.study_dir / "trials").mkdir()
    for number, (family, rank, lr, ratio) in enumerate(
        [("sketch", 4, 0.5, 1.2), ("refined", 8, 0.02, 1.1), ("direct", 8, 0.3, 1.0), ("refined", 4, 0.001, 1.4)]
    ):
        config = trial_config(past, number, {**first_params(past.spec.search.space), "rank": rank, "lr": lr})
        config = replace(config, family=family, trial_id=f"r{number}")
        best, folder = {"val_residual_ratio": ratio}, past.study_dir / "trials" / config.trial_id
        write_outcome(TrialOutcome(config, "finished", "budget", 3, 2, best, str(folder), 1.0))
    into = ("search.space.lr={loguniform: [1e-4, 0.1]}", "search.space.families={sketch: , refined: {steps: [1, 3]}}")
    plan = with_first_points(plan_of("[6, 16]", *into, f"search.first={{study: {past.study_id}, best: 2}}"))
    # Both ranks are nearest to 6 here, and a rate of 0.5 to 0.1; of what was not searched there is the default.
    shared, own = {"weight_decay": 1e-5, "batch_size": 8}, {"metric": "none", "steps": 3}
    assert plan.first == (
        {"family": "refined", "rank": 6, "lr": 0.02, **shared, **own},
        {"family": "sketch", "rank": 6, "lr": 0.1, **shared},
        {"family": "refined", "rank": 6, "lr": 0.001, **shared, **own},
    )
    create_study(plan, "")
    assert read_plan(plan.study_dir) == plan
    with pytest.raises(InputError, match=r"^search\.first\.study: study nothing: not in .*studies: "):
        with_first_points(plan_of(4, "search.first={study: nothing}"))
    with pytest.raises(InputError, match=r"has no trained model of shared; name another, or give points themselves"):
        with_first_points(plan_of(4, "search.space.families={shared: }", f"search.first={{study: {past.study_id}}}"))
