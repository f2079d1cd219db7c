"""Numbers and sentences."""

import pytest

from lowrank_tune.report.text import (
    cosine_text,
    difference_text,
    duration_text,
    rate_text,
    ratio_text,
    seed_texts,
    summary,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (cosine_text(0.98931), "0.9893"),
        (cosine_text(0.999987), "0.999987"),
        (cosine_text(1.0), "1.0000"),
        (cosine_text(-0.25), "-0.2500"),
        (cosine_text(float("nan")), "—"),
        (ratio_text(1.0304), "1.030"),
        (ratio_text(12.345), "12.3"),
        (ratio_text(12345.6), "12,346"),
        (ratio_text(1.2e7), "1.2e+07"),
        (ratio_text(float("inf")), "—"),
        (rate_text(12345.0), "12,300"),
        (rate_text(123.4), "123"),
        (rate_text(32.0), "32.0"),
        (rate_text(0.0512), "0.051"),
        (rate_text(0.0), "—"),
        (duration_text(0.42), "0.4 s"),
        (duration_text(59.6), "1 min 00 s"),
        (duration_text(7505), "2 h 05 min"),
    ],
)
def test_figures_read_well(text, expected):
    assert text == expected


def test_the_summary_says_what_each_rank_reached(row, comparison_of, outcome):
    comparison = comparison_of(
        row("svd", 64, 1.0, 0.98931), row("sketch", 64, 1.0304, 0.98914, trial_id="t"), row("direct", 64, 9.0, 0.8),
        row("random_sketch", 64, 1.8, 0.97), row("randomized_svd", 64, 1.01, 0.9892),
        row("svd", 8, 1.0, 0.9), row("pca_basis", 8, 1.1, 0.89),
    )  # fmt: skip
    assert summary(comparison, [outcome(), outcome(number=1)]) == [
        "At rank 8 no trained model stands beside SVD's 0.9000 token cosine; "
        "the best control, pca_basis, 0.8900 (ρ 1.100).",
        "At rank 64 sketch reaches 0.9891 of SVD's 0.9893 token cosine (ρ 1.030); "
        "the best control, randomized_svd, 0.9892 (ρ 1.010).",
        "2 trials trained for 8 epochs in all, 4.0 s of training.",
    ]


def test_the_summary_says_what_a_winner_gives_with_fresh_seeds(row, comparison_of):
    seeds = {"seeds": 2, "residual_ratio_seed_mean": 1.25, "residual_ratio_seed_sd": 0.02}
    cosines = {"token_cosine_seed_mean": 0.94, "token_cosine_seed_sd": 0.001}
    winner = row("sketch", 64, 1.2, 0.95, trial_id="r064-sketch-0003", **seeds, **cosines)
    assert summary(comparison_of(row("svd", 64, 1.0), winner), [])[1:] == [
        "At rank 64 the configuration of r064-sketch-0003, trained again with 2 fresh seeds, reaches ρ 1.250 ± 0.020 "
        "and a token cosine of 0.9400 ± 0.0010."
    ]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ((None, None, None), "—"),
        ((0.0, 0.0, 0.0), "0.0000 ± 0.0000"),
        ((-1e-6, None, None), "0.0000"),
        ((-0.25, None, None), "-0.2500"),
        ((0.0012, -0.0001, 0.0025), "+0.0012 ± 0.0013"),
    ],
)
def test_a_difference_has_its_sign_and_its_interval(row, fields, expected):
    names = ("token_cosine_minus_svd", "token_cosine_minus_svd_low", "token_cosine_minus_svd_high")
    assert difference_text(row("sketch", 4, **dict(zip(names, fields, strict=True)))) == expected


def test_one_seed_has_no_spread_and_a_far_ratio_few_digits(row):
    one = row("direct", 4, seeds=1, residual_ratio_seed_mean=34.56, token_cosine_seed_mean=0.8)
    assert seed_texts(one) == ("34.6", "0.8000")
    two = row(
        "direct", 4, seeds=2, residual_ratio_seed_mean=34.56, residual_ratio_seed_sd=2.345,
        token_cosine_seed_mean=0.8, token_cosine_seed_sd=0.01,
    )  # fmt: skip
    assert seed_texts(two) == ("34.6 ± 2.3", "0.8000 ± 0.0100")
    assert seed_texts(row("svd", 4)) == ("—", "—")
