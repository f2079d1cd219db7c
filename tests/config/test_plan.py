"""The plan is a pure function of the study and its start."""

import json
import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from study_strategies import studies

from lowrank_tune.config.loading import load_study, parse_study
from lowrank_tune.config.plan import (
    Plan,
    cache_bytes,
    confirmation_config,
    make_plan,
    max_rank,
    plan_cost,
    plan_summary,
    spec_hash,
    split_images,
    trial_config,
)
from lowrank_tune.config.points import first_params, grid_points
from lowrank_tune.config.render import render_study
from lowrank_tune.config.schema import SplitSpec, StudySpec
from lowrank_tune.errors import InputError

START = datetime(2026, 5, 4, 12, 0, 0, tzinfo=UTC)
RESULTS = Path("/nowhere/results")
GRID = """\
name: grid
seed: 7
features: {source: {samples: 12}}
search:
  method: grid
  space:
    rank: [8, 4]
    lr: [1e-3, 1e-2]
    families:
      sketch:
      direct: {lambda_b: [0, 1e-4]}
training: {epochs: 5, patience: 2}
"""


def plan_of(text: str = GRID, *overrides: str, started: datetime = START) -> Plan:
    return make_plan(parse_study(text, "study.yaml", overrides), RESULTS, started)


def test_a_grid_is_every_combination_family_by_family_and_the_last_axis_fastest() -> None:
    grid = plan_of().grid
    assert len(grid) == plan_of().n_trials == 2 * 2 * 2 + 2 * 2
    assert grid[0] == {
        "family": "direct",
        "rank": 8,
        "lr": 1e-3,
        "weight_decay": 1e-5,
        "batch_size": 8,
        "lambda_b": 0.0,
        "lambda_ortho": 1e-3,
    }
    assert [(point["rank"], point["lr"], point.get("lambda_b")) for point in grid] == [
        *[(rank, lr, lambda_b) for rank in (8, 4) for lr in (1e-3, 1e-2) for lambda_b in (0.0, 1e-4)],
        *[(rank, lr, None) for rank in (8, 4) for lr in (1e-3, 1e-2)],
    ]
    assert list(grid[-1]) == ["family", "rank", "lr", "weight_decay", "batch_size"]
    plan = plan_of(GRID, "search.method=random", "search.trials=3")
    assert (plan.grid, plan.n_trials) == ((), 3)


@settings(deadline=None, max_examples=15)
@given(studies())
def test_every_study_has_a_plan_that_json_can_hold(spec: StudySpec) -> None:
    plan = make_plan(spec, RESULTS, START)
    summary = plan_summary(plan)
    assert json.loads(json.dumps(summary, allow_nan=False))["study_id"] == plan.study_id
    assert summary["max_epochs"] == plan.n_trials * spec.training.epochs
    if spec.search.method == "grid":
        assert len(plan.grid) == sum(size or 0 for size in summary["combinations"].values())
    config = trial_config(plan, 0, first_params(spec.search.space))
    assert config.rank <= max_rank(spec)
    assert config.family in spec.search.space.families.chosen()


def test_each_start_has_an_id_and_a_folder_of_its_own_and_ids_sort_by_time(tmp_path: Path) -> None:
    spec = parse_study(GRID, "study.yaml")
    starts = [START + timedelta(minutes=10 * step) for step in range(0, 6 * 24 * 400, 1997)]
    plans = [make_plan(spec, tmp_path / "results", start) for start in starts]
    ids = [plan.study_id for plan in plans]
    assert ids == sorted(ids)
    assert all(re.fullmatch("grid-[0-9a-f]{8}", study_id) for study_id in ids)
    assert plans[0].study_dir == tmp_path / "results/studies" / ids[0]
    assert plans[0].features_root == tmp_path / "results/features"
    assert list(tmp_path.iterdir()) == []
    others = (plan_of(), plan_of(GRID, "seed=8"), plan_of(started=START + timedelta(microseconds=1)))
    assert len({plan.study_id for plan in others}) == 3
    assert plan_of(started=START.astimezone()).study_id == ids[0]


def test_equal_studies_have_one_hash_however_they_are_written() -> None:
    spec = parse_study(GRID, "study.yaml")
    assert spec_hash(spec) == spec_hash(parse_study(render_study(spec), "rendered.yaml"))
    assert spec_hash(spec) == spec_hash(parse_study(GRID, "study.yaml", ["resources.cpus_per_trial=1"]))
    assert spec_hash(spec) != spec_hash(parse_study(GRID, "study.yaml", ["seed=8"]))


def test_a_trial_has_a_readable_name_the_start_of_its_kind_and_only_its_familys_parameters() -> None:
    plan = plan_of()
    configs = [trial_config(plan, number, params) for number, params in enumerate(plan.grid)]
    assert configs[0].trial_id == "r008-direct-0000"
    assert configs[0].family_params == {"lambda_b": 0.0, "lambda_ortho": 1e-3}
    assert configs[-1].family_params == {}
    assert (configs[0].epochs, configs[0].patience) == (5, 2)
    kinds = {(config.family, config.rank) for config in configs}
    assert len({config.seed for config in configs}) == len(kinds) < len(configs)
    assert len({(config.family, config.rank, config.seed) for config in configs}) == len(kinds)
    assert all(0 <= config.seed < 2**32 for config in configs)
    assert configs[3] == trial_config(plan_of(started=START + timedelta(days=1)), 3, plan.grid[3])
    assert configs[3].seed != trial_config(plan_of(GRID, "seed=8"), 3, plan.grid[3]).seed


def test_a_repetition_is_its_trial_with_a_fresh_seed_and_a_name_that_says_so() -> None:
    plan = plan_of()
    trials = [trial_config(plan, number, params) for number, params in enumerate(plan.grid)]
    repeats = [confirmation_config(plan, trial, repeat) for trial in trials for repeat in (1, 2, 3)]
    first = repeats[0]
    assert (first.trial_id, first.confirms) == ("r008-direct-0000-s1", "r008-direct-0000")
    assert replace(first, trial_id=trials[0].trial_id, seed=trials[0].seed, confirms="") == trials[0]
    starts = {config.seed for config in trials}
    assert len(starts | {config.seed for config in repeats}) == len(starts) + len(repeats)
    later = plan_of(started=START + timedelta(days=1))
    assert confirmation_config(later, trials[0], 1) == first
    assert confirmation_config(plan_of(GRID, "seed=8"), trials[0], 1).seed != first.seed


@pytest.mark.parametrize(
    ("axis", "first"),
    [("[1e-2, 1e-3]", 1e-2), ("3e-3", 3e-3), ("{loguniform: [1e-4, 1e-2]}", 1e-3), ("{uniform: [0, 1]}", 0.5)],
)
def test_the_first_point_is_a_lists_first_or_a_ranges_middle(axis: str, first: float) -> None:
    spec = parse_study(GRID, "study.yaml", ["search.method=tpe", f"search.space.lr={axis}"])
    params = first_params(spec.search.space)
    assert params["lr"] == pytest.approx(first)
    assert params["family"] == "direct"
    assert list(params) == list(next(grid_points(parse_study(GRID, "study.yaml").search.space)))


def test_the_highest_rank_is_known_before_any_trial() -> None:
    highest = {"4": 4, "[2, 9, 3]": 9, "{int: [2, 12]}": 12, "{nested: [4, 2]}": 4}
    overrides = ("search.method=tpe", "search.space.families={sketch: }")
    plans = {axis: plan_of(GRID, *overrides, f"search.space.rank={axis}") for axis in highest}
    assert {axis: max_rank(plan.spec) for axis, plan in plans.items()} == highest


def test_the_cost_of_the_reference_study_is_the_missions_and_a_range_has_no_number_of_combinations() -> None:
    spec = load_study(Path(__file__).parents[2] / "studies" / "reference.yaml")
    cost = plan_cost(make_plan(spec, RESULTS, START))
    assert cost == {"n_trials": 1, "max_epochs": 20, "confirmations": 0, "combinations": {"direct": 1}}
    assert cache_bytes(4370, 256, 2048, "float16") == 4370 * 256 * 2048 * 2
    assert cache_bytes(2, 3, 5, "float32") == 120
    plan = plan_of(GRID, "search.method=tpe", "search.space.families.direct.lambda_b={uniform: [0, 1]}")
    assert plan_cost(plan)["combinations"] == {"direct": None, "sketch": 4}


@pytest.mark.parametrize(
    ("rank", "seeds", "expected"), [("8", 3, 3), ("[4, 6, 8]", 3, 9), ("[4, 6, 8]", 0, 0), ("{int: [2, 10]}", 2, 8)]
)
def test_the_best_of_each_rank_is_repeated_and_no_more_often_than_there_are_trials(
    rank: str, seeds: int, expected: int
) -> None:
    overrides = ["search.method=random", "search.trials=4", f"search.space.rank={rank}"]
    assert plan_cost(plan_of(GRID, *overrides, f"report.confirm_seeds={seeds}"))["confirmations"] == expected


shares = st.one_of(st.integers(1, 20), st.floats(0.01, 0.45))
key_sets = st.sets(st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=8), min_size=3, max_size=200)


def members(keys: list[str], indices: tuple[int, ...]) -> set[str]:
    return {keys[index] for index in indices}


@settings(deadline=None, max_examples=50)
@given(key_sets, shares, shares, st.integers(0, 2**32 - 1), st.randoms(use_true_random=False))
def test_a_split_is_disjoint_complete_and_the_same_in_any_order_and_one_more_image_moves_few(
    key_set: set[str], validation: float, test: float, seed: int, random: Any
) -> None:
    keys = sorted(key_set)
    spec = SplitSpec(validation=validation, test=test)
    n_validation, n_test = spec.counts(len(keys))
    if n_validation + n_test >= len(keys):
        with pytest.raises(InputError, match="leave none"):
            split_images(keys, spec, seed)
        return
    split = split_images(keys, spec, seed)
    assert sorted(split.train + split.validation + split.test) == list(range(len(keys)))
    assert (len(split.validation), len(split.test)) == (n_validation, n_test)
    assert all(list(part) == sorted(part) for part in (split.train, split.validation, split.test))
    shuffled = random.sample(keys, len(keys))
    again = split_images(shuffled, spec, seed)
    assert members(shuffled, again.test) == members(keys, split.test)
    assert members(shuffled, again.validation) == members(keys, split.validation)
    # At most one leaves each judge, and none goes from one to the other.
    more = [*keys, "a new image"]
    after = split_images(more, spec, seed)
    for part in ("test", "validation"):
        old, new = members(keys, getattr(split, part)), members(more, getattr(after, part))
        assert len(old - new) <= 1
        assert len(new - old) <= 2
    assert not members(keys, split.test) & members(more, after.validation)
    assert not members(keys, split.validation) & members(more, after.test)


@given(st.lists(st.integers(0, 12), min_size=3, max_size=60), st.integers(1, 8), st.integers(1, 8), st.integers(0, 99))
def test_a_group_is_never_on_two_sides(groups: list[int], validation: int, test: int, seed: int) -> None:
    names = [f"scene {group}" for group in groups]
    try:
        split = split_images(names, SplitSpec(validation=validation, test=test), seed)
    except InputError as error:
        assert "leave none" in str(error)
        return
    assert sorted(split.train + split.validation + split.test) == list(range(len(names)))
    sides = [members(names, part) for part in (split.train, split.validation, split.test)]
    assert sum(len(side) for side in sides) == len(set(names))
    for part, count in ((split.validation, validation), (split.test, test)):
        sizes = [names.count(name) for name in members(names, part)]
        assert len(part) >= min(count, len(names))
        assert len(part) - max(sizes) < count, "no group more than it takes"


def test_a_fraction_is_what_it_says_and_one_image_at_least_and_the_seed_decides_the_split() -> None:
    assert SplitSpec(validation=0.29, test=0.1).counts(100) == (29, 10)
    assert SplitSpec(validation=0.01, test=5).counts(30) == (1, 5)
    keys = [str(number) for number in range(60)]
    assert len({split_images(keys, SplitSpec(), seed) for seed in (0, 1, 2, 3, 4, 0)}) == 5
    with pytest.raises(InputError, match=r"80 to test leave none of 60 to train; lower split.validation"):
        split_images(keys, SplitSpec(test=80), 0)
    with pytest.raises(InputError, match=r"of 60 images, kept together in 1 group, to train; .* column of more values"):
        split_images(["x"] * 60, SplitSpec(), 0)
