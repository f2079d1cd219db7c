"""Figures and outcomes as people read them: numbers with the digits that matter, and sentences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from lowrank_tune.records import Comparison, ComparisonRow, TrialOutcome
from lowrank_tune.report.palette import CONTROLS, is_trained

ABSENT = "—"

STOPPED = {
    "budget": "ran its full budget",
    "patience": "stopped by patience",
    "asha": "stopped by ASHA",
    "interruption": "interrupted",
    "error": "failed",
}

METHOD_NOTES = {
    "svd": "the truncated SVD of each image: the least Frobenius error there is, ρ = 1",
    "svd_rows": "the SVD after each token is scaled to length one: about the best token cosine there is, at a larger ρ",
    "random_sketch": "no training: the columns of XΩ for a random Ω, orthonormalised",
    "pca_basis": "no training beyond the mean Gram matrix: one basis for all images, from the training split",
    "power_1": "no training: a random start and one power step in X Xᵀ",
    "randomized_svd": "no training: Halko, Martinsson and Tropp's randomised SVD, width r + 25 %, two steps",
    "direct": "trained: a network regresses both factors",
    "sketch": "trained: a learned Ω, A = orth(XΩ), B = AᵀX",
    "refined": "trained: a random start, sharpened by a learned filter of the image's own X Xᵀ; B = AᵀX",
}


def cosine_text(value: float) -> str:
    """Four decimals, the digits in which methods differ; more where four would round up to a false 1."""
    if not math.isfinite(value):
        return ABSENT
    return f"{value:.6f}" if 0.99995 <= value < 1 else f"{value:.4f}"


def ratio_text(value: float) -> str:
    """A residual ratio: three decimals near the optimum, fewer digits far from it."""
    if not math.isfinite(value):
        return ABSENT
    if value < 10:
        return f"{value:.3f}"
    if value < 1000:
        return f"{value:.1f}"
    return f"{value:,.0f}" if value < 1e6 else f"{value:.1e}"


def spread_text(mean: str, spread: float | None, decimals: int) -> str:
    """A mean with its spread, `1.214 ± 0.003`.

    Args:
        mean: as it is shown.
        spread: a standard deviation or half an interval; None where there is none.
        decimals: the mean's.
    """
    if spread is None or not math.isfinite(spread):
        return mean
    return f"{mean} ± {spread:.{decimals}f}"


def difference_text(row: ComparisonRow) -> str:
    """The token cosine minus the SVD's, image by image, and half its 95 % interval: `-0.0132 ± 0.0021`."""
    mean, low, high = row.token_cosine_minus_svd, row.token_cosine_minus_svd_low, row.token_cosine_minus_svd_high
    if mean is None:
        return ABSENT
    half = None if low is None or high is None else (high - low) / 2
    # A sign before nothing but zeros would claim a direction that four digits do not show.
    return spread_text(f"{mean:+.4f}" if abs(mean) >= 5e-5 else "0.0000", half, 4)


def seed_texts(row: ComparisonRow) -> tuple[str, str]:
    """The residual ratio and the token cosine over fresh seeds, each mean ± sd."""
    ratio, cosine = row.residual_ratio_seed_mean, row.token_cosine_seed_mean
    if ratio is None or cosine is None:
        return ABSENT, ABSENT
    return (
        spread_text(ratio_text(ratio), row.residual_ratio_seed_sd, 3 if ratio < 10 else 1),
        spread_text(cosine_text(cosine), row.token_cosine_seed_sd, 4),
    )


def rate_text(value: float) -> str:
    """Images a second, three significant digits, thousands separated."""
    if not math.isfinite(value) or value <= 0:
        return ABSENT
    if value >= 100:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2g}"


def duration_text(seconds: float) -> str:
    """A duration in the two largest units that matter: `0.4 s`, `52 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def summary(comparison: Comparison, outcomes: Sequence[TrialOutcome], *, seeds: bool = True) -> list[str]:
    """Say in plain words what the study found: a sentence a rank, one on its repetitions, and what it took.

    Args:
        comparison: the post-study figures.
        outcomes: every trial of the study.
        seeds: say what the repetitions gave; a table may say it already.

    Returns:
        Sentences; the comparison's remarks are not repeated among them.
    """
    ranks = sorted({row.rank for row in comparison.rows})
    sentences = [_rank_sentence([row for row in comparison.rows if row.rank == rank]) for rank in ranks]
    sentences += [_seeds_sentence(row) for row in comparison.rows if row.seeds and seeds]
    if outcomes:
        epochs = count(sum(trial.epochs for trial in outcomes), "epoch")
        spent = duration_text(sum(trial.seconds for trial in outcomes))
        sentences.append(f"{count(len(outcomes), 'trial')} trained for {epochs} in all, {spent} of training.")
    return sentences


def _rank_sentence(rows: Sequence[ComparisonRow]) -> str:
    optimum = next((row for row in rows if row.method == "svd"), None)
    trained = best_row(row for row in rows if is_trained(row.method))
    control = best_row(row for row in rows if row.method in CONTROLS)
    bound = f"SVD's {cosine_text(optimum.token_cosine_mean)} token cosine" if optimum else "an optimum not measured"
    beside = f"the best control, {control.method}, {_figures(control)}" if control else "no control was measured"
    if trained is None:
        return f"At rank {rows[0].rank} no trained model stands beside {bound}; {beside}."
    return f"At rank {rows[0].rank} {trained.method} reaches {_figures(trained, bound)}; {beside}."


def _seeds_sentence(row: ComparisonRow) -> str:
    ratio, cosine = seed_texts(row)
    return (
        f"At rank {row.rank} the configuration of {row.trial_id}, trained again with {count(row.seeds, 'fresh seed')}, "
        f"reaches ρ {ratio} and a token cosine of {cosine}."
    )


def _figures(row: ComparisonRow, bound: str = "") -> str:
    of_bound = f" of {bound}" if bound else ""
    return f"{cosine_text(row.token_cosine_mean)}{of_bound} (ρ {ratio_text(row.residual_ratio_mean)})"


def best_row(rows: Iterable[ComparisonRow]) -> ComparisonRow | None:
    """The row nearest to the optimum: the least mean residual ratio, the faster one of equals; None among none."""
    return min(rows, key=lambda row: (row.residual_ratio_mean, -row.images_per_second), default=None)


def count(number: int, noun: str) -> str:
    """A number with its noun, in the plural where it must be."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
