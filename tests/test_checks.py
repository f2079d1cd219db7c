"""What refuses a study before it leaves a trace: ranks and words that its features do not have."""

from typing import Any

import pytest

from lowrank_tune.checks import check_space
from lowrank_tune.config.axes import FamiliesSpec
from lowrank_tune.config.loading import parse_study
from lowrank_tune.errors import InputError
from lowrank_tune.lowrank.decomposers import FAMILIES


def space(rank: Any, families: str, *overrides: str) -> Any:
    text = "name: a\nfeatures: {source: {tensors: cache}}\nsearch: {space: {rank: 8, families: {sketch: }}}\n"
    given = (f"search.space.rank={rank}", f"search.space.families={{{families}}}", *overrides)
    return parse_study(text, "study.yaml", given)


def test_the_study_file_and_the_models_know_the_same_families_parameters_and_limits() -> None:
    every = FamiliesSpec.model_validate(dict.fromkeys(FamiliesSpec.model_fields))
    assert list(every.chosen()) == list(FAMILIES)
    for name, own in every.chosen().items():
        assert sorted(type(own).model_fields) == sorted(FAMILIES[name].params)
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
