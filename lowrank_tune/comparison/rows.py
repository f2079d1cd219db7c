"""From the figures of single images to the rows of a comparison: means, spreads, and the difference to the SVD."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.stats import t as student_t

from lowrank_tune.comparison.methods import Method
from lowrank_tune.comparison.scoring import Kind
from lowrank_tune.lowrank.dataset import FeatureMatrix
from lowrank_tune.records import ComparisonRow

CONFIDENCE = 0.95
"""Of the interval around the mean paired difference."""

Interval = tuple[float, float | None, float | None]
"""A mean, and the ends of its confidence interval where there is one."""


def make_rows(
    data: FeatureMatrix,
    per_image: pd.DataFrame,
    methods: Sequence[Method],
    repeats: Sequence[Method],
    speeds: Mapping[Kind, float],
) -> list[ComparisonRow]:
    """Make a row of each method at each rank.

    Args:
        data: the features.
        per_image: `score`'s table of the methods, their repetitions and the SVD.
        methods: what the rows are of, beside the SVD.
        repeats: the repetitions of trained ones, by `confirms`; those that the table lacks are passed over.
        speeds: images a second of each method and of the SVD.

    Returns:
        The rows by rank.
    """
    trials = {(method.name, method.rank): method.trial_id for method in methods}
    tables = {kind: table.set_index("index") for kind, table in per_image.groupby(["method", "rank"], sort=False)}
    rows = []
    for name, rank in sorted(speeds, key=lambda kind: kind[1]):
        images, trial_id = tables[name, rank], trials.get((name, rank), "")
        again = [
            tables[repeat.name, rank]
            for repeat in repeats
            if trial_id and repeat.confirms == trial_id and (repeat.name, repeat.rank) in tables and repeat.rank == rank
        ]
        ratio_mean, ratio_sd = _over_seeds([table["residual_ratio"].mean() for table in again])
        cosine_mean, cosine_sd = _over_seeds([table["token_cosine"].mean() for table in again])
        difference, low, high = mean_interval(images["token_cosine"] - tables["svd", rank]["token_cosine"])
        rows.append(
            ComparisonRow(
                method=name,
                rank=rank,
                n_images=len(images),
                token_cosine_mean=float(images["token_cosine"].mean()),
                token_cosine_sd=float(images["token_cosine"].std(ddof=1)) if len(images) > 1 else 0.0,
                flat_cosine_mean=float(images["flat_cosine"].mean()),
                mse_mean=float(images["mse"].mean()),
                residual_ratio_mean=float(images["residual_ratio"].mean()),
                residual_ratio_max=float(images["residual_ratio"].max()),
                bytes_per_image=(data.tokens + data.dim) * rank * data.dtype.itemsize,
                images_per_second=speeds[name, rank],
                trial_id=trial_id,
                seeds=len(again),
                residual_ratio_seed_mean=ratio_mean,
                residual_ratio_seed_sd=ratio_sd,
                token_cosine_seed_mean=cosine_mean,
                token_cosine_seed_sd=cosine_sd,
                token_cosine_minus_svd=difference,
                token_cosine_minus_svd_low=low,
                token_cosine_minus_svd_high=high,
            )
        )
    return rows


def mean_interval(values_N: ArrayLike) -> Interval:
    """Take the mean of values with its confidence interval by Student's t, for values drawn independently.

    Args:
        values_N: N finite numbers, at least one.

    Returns:
        The mean and the interval's ends; no ends for a single value.
    """
    values = np.asarray(values_N, dtype=np.float64)
    mean = float(values.mean())
    if len(values) == 1:
        return mean, None, None
    half = float(student_t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return mean, mean - half, mean + half


def _over_seeds(means: Sequence[float]) -> tuple[float | None, float | None]:
    mean = float(np.mean(means)) if means else None
    return mean, float(np.std(means, ddof=1)) if len(means) > 1 else None
