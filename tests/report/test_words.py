"""Numbers and sentences."""

import pytest

from lowrank_tune.report.words import cosine_text, duration_text, rate_text, ratio_text, summary


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
