"""From replies to rows, intervals and sentences, on small made replies."""

import math

import pandas as pd
import pytest
import torch

from lowrank_tune.comparison.intervals import proportion
from lowrank_tune.features.asked import Asked
from lowrank_tune.fidelity.figures import fewer_flips, fold, table_of
from lowrank_tune.fidelity.kept import Kept, Reply
from lowrank_tune.fidelity.ways import Wanted
from lowrank_tune.fidelity.words import fidelity_words, stays_from

X, HALF = Wanted("x", 0, "float16"), Wanted("half-side", 0, "jpeg")
SVD = {rank: Wanted("svd", rank, "factors") for rank in (2, 4, 8)}
SKETCH = {rank: Wanted("sketch", rank, "factors", "t0") for rank in (2, 4, 8)}
CODED = Wanted("shared", 8, "coded 0.05", "t1")
WANTED = (X, *SVD.values(), *SKETCH.values(), CODED, HALF)
PEOPLE = tuple(["cat"] * 10)


def kept(number: int, flipped: set[Wanted], missing: frozenset[Wanted] = frozenset()) -> Kept:
    """A question about image `number`, whose answer some forms flip."""
    replies = {}
    for each in WANTED:
        flip = each in flipped
        reply = Reply(kl=0.5 * flip, first=flip, flip=flip, delta=-1.0 * flip, text="dog" if flip else "cat", error=0.1)
        replies[each.key] = Reply(reason="too far") if each in missing else reply
    return Kept(f"key{number}", "What?", (1, 2), "cat", False, replies)


def rows_of(answered: list[Kept]) -> tuple[pd.DataFrame, tuple]:
    groups = {each.key: each.key for each in answered}
    right = {(each.key, each.question): Asked(each.question, PEOPLE) for each in answered}
    table = table_of(answered, WANTED, groups, right)
    return table, fold(table, WANTED, lambda wanted: 100.0 * wanted.rank)


def test_each_form_has_a_row_and_x_itself_is_exactly_nothing() -> None:
    table, rows = rows_of([kept(number, {SVD[2], HALF} if number < 3 else set()) for number in range(12)])
    by = {(row.method, row.rank): row for row in rows}
    itself, worst = by["x", 0], by["svd", 2]
    assert (itself.kl_mean, itself.answer_flips, itself.loglik_delta_mean, itself.accuracy) == (0, 0, 0, 1)
    assert (itself.answer_flips_low, itself.answer_flips_high) == (0, 0)
    assert (worst.n_questions, worst.n_images, worst.answer_flips, worst.kl_mean) == (12, 12, 0.25, 0.125)
    assert worst.answer_flips_low is not None and worst.answer_flips_high is not None
    assert 0.0 < worst.answer_flips_low < 0.25 < worst.answer_flips_high < 0.6
    assert worst.accuracy == pytest.approx(0.75)
    assert worst.accuracy_minus_x == pytest.approx(-0.25)
    assert (worst.n_hard, worst.accuracy_hard) == (3, 0.0)
    assert by["svd", 4].accuracy_hard == 1.0
    assert by["svd", 4].bytes_per_image == 400
    # None of twelve flips: a next one may.
    assert by["svd", 4].answer_flips_high == pytest.approx(1 - 0.025 ** (1 / 12))
    mean, low, high = fewer_flips(table, ("svd", 4), ("svd", 2))
    assert mean == pytest.approx(0.25)
    assert low < mean < high


def test_a_form_that_some_images_have_not_is_of_fewer_questions() -> None:
    _, rows = rows_of([kept(number, set(), frozenset({CODED} if number else ())) for number in range(3)])
    counts = {row.method: row.n_questions for row in rows}
    assert (counts["shared"], counts["x"]) == (1, 3)
    single = next(row for row in rows if row.method == "shared")
    assert single.answer_flips_low is None


def test_bytes_and_errors_are_means_over_images_not_questions() -> None:
    def coded(number: int, question: str, size: int) -> Kept:
        replies = {X.key: Reply(text="cat"), CODED.key: Reply(text="cat", bytes=size, error=size / 1000)}
        return Kept(f"key{number}", question, (1, 2), "cat", False, replies)

    answered = [coded(0, "What?", 100), coded(0, "Where?", 100), coded(1, "What?", 400)]
    right = {(each.key, each.question): Asked(each.question) for each in answered}
    table = table_of(answered, (X, CODED), {"key0": "0", "key1": "1"}, right)
    row = fold(table, (X, CODED), lambda _: 0.0)[1]
    assert (row.n_questions, row.n_images, row.bytes_per_image) == (3, 2, 250.0)
    assert row.relative_error_mean == pytest.approx(0.25)


def test_an_interval_of_a_part_is_of_groups_and_stays_within_0_and_1() -> None:
    def interval(flips: list[int], groups: list[int]) -> tuple[float, float]:
        table = pd.DataFrame({"kind": "a", "flip": [float(flip) for flip in flips], "group": groups})
        _, low, high = proportion(table, "flip", ["kind"])
        return low.iloc[0], high.iloc[0]

    alone = interval([1, 0, 0, 0] * 10, list(range(40)))
    together = interval([1] * 10 + [0] * 30, [number // 10 for number in range(40)])
    assert 0.1 < alone[0] < 0.25 < alone[1] < 0.42
    assert together[0] < alone[0] and together[1] > alone[1]
    assert interval([1] * 4, list(range(4)))[1] == 1.0
    assert all(math.isnan(end) for end in interval([1, 0], [0, 0]))


def test_answers_stay_from_the_rank_above_which_none_flips_more() -> None:
    assert stays_from([(2, 0.0), (4, 0.2), (8, 0.04), (16, 0.0)]) == 8
    assert stays_from([(2, 0.0), (4, 0.2)]) is None


def test_the_sentences_name_rank_bytes_and_rivals() -> None:
    from tests.comparison.small_study import make_row

    answered = [kept(number, {SVD[2], SVD[4], SKETCH[2], HALF} if number % 2 else set()) for number in range(12)]
    table, rows = rows_of(answered)
    compared = [*(make_row("svd", rank) for rank in SVD), *(make_row("sketch", rank) for rank in SKETCH)]
    first, *others = fidelity_words(rows, compared, 16, lambda kind, other: fewer_flips(table, kind, other))
    assert first == (
        "From rank 4 (0.391 KiB; 0.781 KiB coded, shared) on, 95 % of the answers stay with the best trained model; "
        "svd needs 8; the half-side image keeps 50 % at 4 tokens."
    )
    told = " ".join(others)
    assert "50 % fewer at rank 4 (" in told
    assert "X itself is right on 100 % of the questions" in told
    assert "on the 6 questions that X answers and the half-side image does not" in told.replace("On the", "on the")


def test_what_is_compared_is_the_first_of_the_pass() -> None:
    from lowrank_tune.fidelity.job import compared

    log_NPV = torch.log_softmax(torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0)), -1)
    log_NPV[2] = log_NPV[0]
    ids = log_NPV[0].argmax(-1).tolist()
    kl_N, first_N, flip_N, delta_N = compared(log_NPV, ids)
    expected = (log_NPV[0].exp() * (log_NPV[0] - log_NPV[1])).sum(-1).mean()
    assert kl_N.tolist() == pytest.approx([0.0, expected.item(), 0.0])
    assert flip_N.tolist() == [False, log_NPV[1].argmax(-1).tolist() != ids, False]
    assert bool(first_N[1]) is (log_NPV[1, 0].argmax().item() != ids[0])
    assert delta_N[0] == delta_N[2] == 0.0
    assert delta_N[1] < 0.0
