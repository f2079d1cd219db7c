"""Fronts against the definition of dominance, and what stands as a candidate."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from lowrank_tune.comparison.compare import pareto_fronts
from tests.comparison.small_study import make_outcome, make_row


def trial(number, rank, mse, **fields):
    return make_outcome("sketch", rank, number, **{"best": {"val_mse": mse}, **fields})


few = st.integers(1, 5)  # so that ties are common


@given(st.lists(st.tuples(few, few), min_size=1, max_size=12), st.booleans())
def test_the_front_is_what_nothing_dominates(pairs, storage):
    if storage:
        (front,) = pareto_fronts(
            [], [make_row(str(n), 1, cosine=-y / 10, bytes_per_image=size) for n, (size, y) in enumerate(pairs)]
        )
        assert (front.x, front.y, front.better) == ("bytes_per_image", "token_cosine_mean", "higher")
    else:
        (front,) = pareto_fronts([trial(n, rank, y / 10) for n, (rank, y) in enumerate(pairs)], [])
        assert (front.x, front.y, front.better) == ("rank", "val_mse", "lower")
    assert front.name == ("storage" if storage else "search") and len(front.points) == len(pairs)
    costs = [(point.x, abs(point.y)) for point in front.points]
    assert [x for x, _ in costs] == sorted(x for x, _ in costs)
    for point, cost in zip(front.points, costs, strict=True):
        dominated = any(x <= cost[0] and y <= cost[1] and (x, y) != cost for x, y in costs)
        assert point.on_front is not dominated


def test_every_trial_with_a_model_of_one_rank_is_a_candidate_of_the_search():
    trials = [
        trial(0, 4, 0.3),
        trial(1, 4, 0.2, status="pruned", stopped_by="asha"),
        trial(2, 2, 0.0, status="failed", stopped_by="error"),
        trial(3, 2, 0.0, best={}),
    ]
    nested = trial(4, 16, 0.05)
    trials.append(replace(nested, config=replace(nested.config, nested_ranks=(4, 16))))
    (front,) = pareto_fronts(trials, [])
    assert [(point.trial_id[-1], point.on_front) for point in front.points] == [("1", True), ("0", False)]
    assert pareto_fronts(trials[2:], []) == ()
