from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from lowrank_tune.config.axes import SpaceSpec
from lowrank_tune.trials.search import optuna_params, suggest


def draw(space: dict[str, Any], fixed: dict[str, Any] | None = None) -> tuple[dict[str, Any], optuna.trial.FrozenTrial]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    if fixed:
        study.enqueue_trial(fixed)
    trial = study.ask()
    point = suggest(trial, SpaceSpec.model_validate(space))
    return point, study.trials[-1]


def test_a_constant_and_a_list_of_one_are_no_parameters() -> None:
    point, trial = draw({"families": {"sketch": {}}, "rank": [16], "lr": 0.5})
    assert trial.params == {}
    assert point == {"family": "sketch", "rank": 16, "lr": 0.5, "weight_decay": 1e-5, "batch_size": 8}


@pytest.mark.parametrize(
    ("axis", "expected"),
    [
        ([1e-3, 1e-2], CategoricalDistribution((1e-3, 1e-2))),
        ({"uniform": [0.1, 0.2]}, FloatDistribution(0.1, 0.2)),
        ({"loguniform": [1e-4, 1e-2]}, FloatDistribution(1e-4, 1e-2, log=True)),
    ],
)
def test_a_value_that_varies_keeps_its_kind(axis: Any, expected: Any) -> None:
    point, trial = draw({"families": {"sketch": {}}, "lr": axis})
    assert trial.distributions == {"lr": expected}
    assert point["lr"] == trial.params["lr"]


def test_a_range_of_whole_numbers_gives_whole_numbers() -> None:
    point, trial = draw({"families": {"sketch": {}}, "rank": {"int": [2, 9]}})
    assert trial.distributions == {"rank": IntDistribution(2, 9)}
    assert isinstance(point["rank"], int)


@pytest.mark.parametrize("family", ["direct", "sketch"])
def test_a_familys_own_parameters_are_drawn_for_it_alone(family: str) -> None:
    space = {"families": {"direct": {"lambda_b": {"loguniform": [1e-6, 1e-2]}}, "sketch": {}}}
    point, trial = draw(space, {"family": family})
    assert ("lambda_b" in point) == (family == "direct")
    assert ("direct.lambda_b" in trial.params) == (family == "direct")
    assert ("lambda_ortho" in point) == (family == "direct")


def test_an_enqueued_point_is_drawn_as_it_was() -> None:
    space = {"families": {"direct": {"lambda_b": [0.0, 0.5]}, "sketch": {}}, "rank": [2, 4], "lr": [0.1, 0.2]}
    wanted = {"family": "direct", "rank": 4, "lr": 0.2, "weight_decay": 1e-5, "batch_size": 8}
    wanted |= {"lambda_b": 0.5, "lambda_ortho": 1e-3}
    point, _ = draw(space, optuna_params(wanted))
    assert point == wanted
